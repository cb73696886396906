"""TRL's RLOOTrainer on the work of p3o.py: the same command line, data, reward, batches and rollouts.

    python results/trl/rloo.py --learning_rate 3e-4     where trl can be imported; after the quick start

Of p3o.py's flags it has no --clipping, it clips the ratio of whole responses by --clip_range; it does without
evaluation, --save_every, --resume, --reward_shift and --max_importance_weight. The optimizer is TRL's own.
Prompts are taken word for word and positions count real tokens, as in examples/p3o_with_trl.py: it would
start behind without.
"""

import json
import sys
import time
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback
from trl import RLOOConfig, RLOOTrainer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import p3o  # noqa: E402, I001
import p3o_with_trl  # noqa: E402


class Trainer(p3o_with_trl.P3OTrainer):
    """RLOO again: batches and loss are TRL's own."""

    _generate_and_score_completions = RLOOTrainer._generate_and_score_completions
    _compute_loss = RLOOTrainer._compute_loss


class Clock(TrainerCallback):
    """The time at the start of every rollout, and at the end."""

    def __init__(self, updates):
        self.updates, self.times = updates, []

    def on_step_begin(self, args, state, control, **options):
        if state.global_step % self.updates == 0:
            self.times.append(time.perf_counter())

    def on_train_end(self, args, state, control, **options):
        self.times.append(time.perf_counter())


def main(args, **more):
    """more: fields of RLOOConfig."""
    args.micro_batch_size = args.micro_batch_size or args.minibatch_size
    args.device = "cpu"
    B, K, micro = args.prompts_per_step, args.num_responses, args.micro_batch_size
    updates = args.epochs * B // args.minibatch_size  # optimizer steps on a rollout
    config = RLOOConfig(
        output_dir=args.output_dir,
        seed=args.seed,
        learning_rate=args.learning_rate,
        max_steps=args.steps * updates,
        per_device_train_batch_size=micro * K,
        gradient_accumulation_steps=args.minibatch_size // micro,
        steps_per_generation=B // micro,
        num_iterations=args.epochs,
        num_generations=K,
        max_completion_length=args.response_length,
        temperature=args.temperature,
        beta=args.beta,
        epsilon=args.clip_range,
        max_grad_norm=args.max_grad_norm,
        disable_dropout=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        model_init_kwargs={"dtype": "float32"},
        **more,
    )
    tokenizer = p3o.load_tokenizer(args.model)
    prompts = p3o.read_prompts(args.dataset, ["train"], tokenizer, args)
    reward = p3o_with_trl.make_reward(args, args.missing_eos_penalty, tokenizer, config)
    clock = Clock(updates)
    options = {
        "model": args.model,
        "processing_class": tokenizer,
        "reward_funcs": reward,
        "callbacks": [clock],
    }
    options["train_dataset"] = Dataset.from_dict({"prompt": [row["prompt"] for row in prompts]})
    trainer = Trainer(None, config, **options)
    trainer.train()
    trainer.save_model(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    spans = [end - start for start, end in zip(clock.times, clock.times[1:])]
    rows = [{"step": step, "seconds_step": span} for step, span in enumerate(spans, 1)]
    Path(args.output_dir, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.output_dir}: RLOO of TRL, {args.steps} rollouts, {sum(spans) / 60:.1f} minutes")


if __name__ == "__main__":
    p3o.guard(main, p3o.Args)
