"""TRL's PPOTrainer on the work of ppo.py: the same command line, data, reward model, batches and rollouts.

    python results/trl/ppo.py --steps 6     where trl 1.10.0 can be imported, the last with PPO; for speed.py

It keeps ppo.py's beta, lam, gamma, both clip ranges, epochs and minibatches; one learning rate and one
optimizer for policy and critic. It goes without evaluation, presets, --save_every and --resume. Every prompt
stands K times in a batch.
"""

import json
import sys
import time
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import ppo  # noqa: E402


class Clock(TrainerCallback):
    """The time at the start of training and at the end of every rollout with its updates."""

    def __init__(self):
        self.times = []

    def on_train_begin(self, args, state, control, **options):
        self.times.append(time.perf_counter())

    def on_step_end(self, args, state, control, **options):
        self.times.append(time.perf_counter())


def main(args):
    args.device = "cpu"
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
        kl_coef=ppo.PRESETS["ppo"]["beta"] if args.beta is None else args.beta,
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
    tokenizer = ppo.load_tokenizer(args.model)
    prompts = ppo.read_rows(args.dataset, ["train"], [], tokenizer, args)
    tokenizer.padding_side = "left"
    policy, reference = (ppo.load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
    scorer, options = AutoModelForSequenceClassification, {"num_labels": 1}
    reward_model = ppo.load_model(scorer, args.reward_model, tokenizer, args, **options)
    clock = Clock()
    PPOTrainer(
        config,
        tokenizer,
        policy,
        reference,
        reward_model,
        Dataset.from_dict(
            {"input_ids": [x["prompt_ids"] for x in prompts for _ in range(args.num_responses)]}
        ),
        ppo.load_critic(tokenizer, args),
        callbacks=[clock],
    ).train()
    spans = [end - start for start, end in zip(clock.times, clock.times[1:])]
    log = [json.dumps({"step": step, "seconds_step": span}) + "\n" for step, span in enumerate(spans, 1)]
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    Path(args.output_dir, "metrics.jsonl").write_text("".join(log))
    print(f"{args.output_dir}: PPO of TRL, {args.steps} rollouts, {sum(spans) / 60:.1f} minutes")


if __name__ == "__main__":
    ppo.guard(main, ppo.Args)
