"""TRL's RLOOTrainer on the work of p3o.py: its command line, its data, reward, batches and rollouts.

    python results/speed/trl_rloo.py --learning_rate 3e-4     where trl 1.16.0 can be imported

It has no --clipping: it clips the ratio of whole responses by --clip_range. It does without evaluation,
checkpoints, --reward_shift and --max_importance_weight, and the optimizer is TRL's own. Prompts are literal,
and positions count real tokens, because the toy's models would start behind otherwise.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o


class Trainer(RLOOTrainer):
    def _tokenize_prompts(self, prompts):
        """Prompts are literal: no special token is added."""
        return self.processing_class(text=prompts, add_special_tokens=False)["input_ids"], None, {}

    def _get_per_token_logps_and_entropies(self, model, *args, **options):
        """Positions count real tokens, as in sampling. TRL counts padding too; GPT-2's positions see that."""

        def forward(**inputs):
            return model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))

        return super()._get_per_token_logps_and_entropies(forward, *args, **options)


class Clock(TrainerCallback):
    """The time at the start of every rollout, and at the end."""

    def __init__(self, updates):
        self.updates, self.times = updates, []

    def on_step_begin(self, args, state, control, **options):
        if state.global_step % self.updates == 0:
            self.times.append(time.perf_counter())

    def on_train_end(self, args, state, control, **options):
        self.times.append(time.perf_counter())


def make_reward(args, tokenizer):
    """The reward model, read at the last token of each response, less the penalty for a missing EOS."""
    model = AutoModelForSequenceClassification.from_pretrained(args.reward_model, num_labels=1).eval()

    @torch.no_grad()
    def reward(prompts, completion_ids, **others):
        rows = [
            x + y for x, y in zip(tokenizer(prompts, add_special_tokens=False)["input_ids"], completion_ids)
        ]
        inputs = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        hidden = model.base_model(**inputs).last_hidden_state  # (N, T, D)
        last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
        ended = torch.tensor([ids[-1] == tokenizer.eos_token_id for ids in completion_ids])
        return (model.score(last).squeeze(-1) - args.missing_eos_penalty * ~ended).tolist()

    return reward


def main(args, **more):
    """more: fields of RLOOConfig."""
    B, K, micro = args.prompts_per_step, args.num_responses, args.micro_batch_size or args.minibatch_size
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
    tokenizer, clock = AutoTokenizer.from_pretrained(args.model), Clock(updates)
    data = Dataset.from_dict({"prompt": load_dataset(args.dataset, split="train")["prompt"][:]})
    options = {"processing_class": tokenizer, "train_dataset": data, "callbacks": [clock]}
    trainer = Trainer(args.model, make_reward(args, tokenizer), args=config, **options)
    trainer.train()
    trainer.save_model(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    Path(args.output_dir, "args.json").write_text(json.dumps({"args": vars(args)}))  # for evaluate.py
    spans = [end - start for start, end in zip(clock.times, clock.times[1:])]
    rows = [{"step": step, "seconds": span} for step, span in enumerate(spans, 1)]
    Path(args.output_dir, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.output_dir}: RLOO of TRL, {args.steps} rollouts, {sum(spans) / 60:.1f} minutes")


if __name__ == "__main__":
    main(
        *HfArgumentParser(p3o.Args, allow_abbrev=False).parse_args_into_dataclasses(look_for_args_file=False)
    )
