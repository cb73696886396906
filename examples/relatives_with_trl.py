"""RLOO, GRPO and Dr. GRPO of TRL on the work of p3o.py: its model, reward, prompts, lengths and optimizer.

    pip install -r requirements.txt -r examples/requirements.txt
    python examples/relatives_with_trl.py --method grpo --output_dir out/grpo    after the quick start

It takes the flags of p3o.py and --method, and writes a run folder that evaluate.py reads. The clip, the
advantages and the place of the KL are TRL's own. --resume, --clipping and --max_importance_weight are
ignored, and a run is not evaluated while it goes. Prompts are taken literally and positions count real
tokens, because TRL would start behind without that.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import p3o  # noqa: E402
from examples.p3o_with_trl import LiteralPrompts  # noqa: E402

OPTIONS = {  # what makes the three methods out of TRL's two trainers
    "rloo": {},
    "grpo": {"scale_rewards": "group"},
    "dr_grpo": {"scale_rewards": "none", "loss_type": "dr_grpo"},
}


@dataclass
class Args(p3o.Args):
    method: Literal["rloo", "grpo", "dr_grpo"] = p3o.flag("grpo", "the method to train with")


class RLOO(LiteralPrompts, RLOOTrainer):
    pass


class GRPO(LiteralPrompts, GRPOTrainer):
    pass


class Clock(TrainerCallback):
    """Notes when each rollout begins and when training ends."""

    def __init__(self, updates_per_rollout):
        self.updates_per_rollout, self.times = updates_per_rollout, []

    def on_step_begin(self, args, state, control, **options):
        if state.global_step % self.updates_per_rollout == 0:
            self.times.append(time.perf_counter())

    def on_train_end(self, args, state, control, **options):
        self.times.append(time.perf_counter())


def make_reward(model, prompts, tokenizer, args):
    """The score of each response, minus the missing-EOS penalty, plus the prompt's offset as in p3o.py."""
    ids = {row["prompt"]: row["prompt_ids"] for row in prompts}
    offset = args.reward_shift * torch.randn(len(prompts), 1, generator=torch.Generator().manual_seed(0))
    offset = dict(zip([row["prompt"] for row in prompts], ((256 * offset).round() / 256).flatten().tolist()))

    @torch.no_grad()
    def reward(prompts, completion_ids, **others):
        scores, size = [], args.micro_batch_size * args.num_responses
        for first in range(0, len(prompts), size):
            padded = []
            for rows, side in (([ids[text] for text in prompts], "left"), (completion_ids, "right")):
                part = {"input_ids": rows[first : first + size]}
                padded.append(tokenizer.pad(part, padding_side=side, return_tensors="pt"))
            tokens = {"prompt_ids": padded[0]["input_ids"], "prompt_mask": padded[0]["attention_mask"].bool()}
            tokens |= {"response_ids": padded[1]["input_ids"]}
            tokens |= {"response_mask": padded[1]["attention_mask"].bool()}
            scores += p3o.read_score(model, **tokens).tolist()
        missing = [args.missing_eos_penalty * (y[-1] != tokenizer.eos_token_id) for y in completion_ids]
        return [r - penalty + offset[text] for r, penalty, text in zip(scores, missing, prompts)]

    return reward


def main(args):
    transformers.logging.set_verbosity_error()
    B, K = args.prompts_per_step, args.num_responses
    updates_per_rollout = args.epochs * B // args.minibatch_size
    config_class, trainer_class = (RLOOConfig, RLOO) if args.method == "rloo" else (GRPOConfig, GRPO)
    config = config_class(
        output_dir=args.output_dir,
        seed=args.seed,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        max_grad_norm=args.max_grad_norm,
        max_steps=args.steps * updates_per_rollout,
        per_device_train_batch_size=args.minibatch_size * K,
        steps_per_generation=B // args.minibatch_size,
        num_iterations=args.epochs,
        num_generations=K,
        max_completion_length=args.response_length,
        temperature=args.temperature,
        beta=args.beta,
        epsilon=args.clip_range,
        disable_dropout=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=args.device == "cpu",
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
        **OPTIONS[args.method],
    )
    tokenizer = p3o.load_tokenizer(args)
    prompts = p3o.read_prompts(["train"], tokenizer, args)
    options = {"num_labels": 1}
    reward_model = p3o.load_model(
        AutoModelForSequenceClassification, args.reward_model, tokenizer, args, **options
    )
    clock = Clock(updates_per_rollout)
    trainer = trainer_class(
        model=args.model,
        args=config,
        processing_class=tokenizer,
        reward_funcs=make_reward(reward_model, prompts, tokenizer, args),
        train_dataset=Dataset.from_dict({"prompt": [row["prompt"] for row in prompts]}),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    folder, spans = Path(args.output_dir), [b - a for a, b in zip(clock.times, clock.times[1:])]
    rows = [{"step": step, "seconds": span} for step, span in enumerate(spans, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "args.json").write_text(json.dumps({"args": vars(args)}, indent=2))
    print(f"{folder}: {args.method} of TRL, {args.steps} rollouts, {sum(spans):.0f} seconds")


if __name__ == "__main__":
    parser = transformers.HfArgumentParser(Args, allow_abbrev=False)
    main(Args(**vars(parser.parse_args())))
