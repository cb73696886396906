"""TRL's PPOTrainer on the work of ppo.py: the command line of ppo.py, its data, batches and rollouts.

    python results/speed/trl_ppo.py --steps 6     where trl 1.10.0, the last with PPO, can be imported

It keeps ppo.py's beta, lam, gamma, both clip ranges, epochs and minibatches. Policy and critic share one
learning rate and one optimizer. It does without evaluation, presets and checkpoints. Every prompt stands K
times in a batch.
"""

import json
import sys
import time
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ppo


class Clock(TrainerCallback):
    """The time at the start of training and at the end of every rollout with its updates."""

    def __init__(self):
        self.times = []

    def on_train_begin(self, args, state, control, **options):
        self.times.append(time.perf_counter())

    def on_step_end(self, args, state, control, **options):
        self.times.append(time.perf_counter())


def main(args):
    rows = args.prompts_per_step * args.num_responses
    config = PPOConfig(
        output_dir=args.output_dir,
        seed=args.seed,
        learning_rate=args.learning_rate,
        total_episodes=args.steps * rows,
        per_device_train_batch_size=rows,  # one rollout; a minibatch goes through the models in one piece
        gradient_accumulation_steps=1,
        num_mini_batches=args.prompts_per_step // args.minibatch_size,
        num_ppo_epochs=args.epochs,
        local_rollout_forward_batch_size=rows,
        response_length=args.response_length,
        stop_token="eos",
        temperature=args.temperature,
        missing_eos_penalty=args.missing_eos_penalty,
        kl_coef=0.5 if args.beta is None else args.beta,
        cliprange=args.clip_range,
        cliprange_value=args.value_clip_range,
        gamma=args.gamma,
        lam=args.lam,
        num_sample_generations=0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer, clock = AutoTokenizer.from_pretrained(args.model, padding_side="left"), Clock()
    prompts = load_dataset(args.dataset, split="train")["prompt"][:]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    data = Dataset.from_dict({"input_ids": [row for row in ids for _ in range(args.num_responses)]})
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.model) for _ in range(2))
    scorers = [
        AutoModelForSequenceClassification.from_pretrained(args.reward_model, num_labels=1) for _ in "rc"
    ]
    models = policy, reference, scorers[0], data, scorers[1]  # the critic starts as the reward model
    PPOTrainer(config, tokenizer, *models, callbacks=[clock]).train()
    spans = [end - start for start, end in zip(clock.times, clock.times[1:])]
    log = [json.dumps({"step": step, "seconds": span}) + "\n" for step, span in enumerate(spans, 1)]
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    Path(args.output_dir, "metrics.jsonl").write_text("".join(log))
    print(f"{args.output_dir}: PPO of TRL, {args.steps} rollouts, {sum(spans) / 60:.1f} minutes")


if __name__ == "__main__":
    main(
        *HfArgumentParser(ppo.Args, allow_abbrev=False).parse_args_into_dataclasses(look_for_args_file=False)
    )
