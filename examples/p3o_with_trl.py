"""P3O in TRL's RLOOTrainer, which can shard the models, sample with vLLM and train LoRA adapters.

    pip install -r requirements.txt -r examples/requirements.txt    # then toy.py, sft.py and reward_model.py
    python examples/p3o_with_trl.py                                 # the embedded task on one process
    accelerate launch --multi_gpu --num_processes 2 examples/p3o_with_trl.py --per_device_train_batch_size 32
                                                                    # two processes; --use_cpu: without a GPU
    accelerate launch --config_file fsdp2.yaml examples/p3o_with_trl.py --bf16 true ...   # FSDP
    accelerate launch --config_file zero3.yaml examples/p3o_with_trl.py --bf16 true ...   # ZeRO-3
    ... --use_vllm --vllm_mode colocate                             # vLLM samples on the same GPUs
    ... --use_peft --lora_r 16                                      # LoRA; the reference needs no memory

The .yaml files are in TRL's folder accelerate_configs. The defaults are those of p3o.py, except that the
learning rate falls at every optimizer step. The last line is like that of p3o.py.

P3O asks little of a trainer. The numbers mark the places below:

(1) The K responses to a prompt stay in one micro-batch. RLOOTrainer shuffles and splits what it has sampled
    along the first dimension. So that dimension becomes the prompts: (B * K, ...) is reshaped to (B, K, ...).
(2) The processes take equal shares, and the loss is a mean over prompts. The mean of their gradients is
    therefore the gradient of the batch.
(3) There are no statistics over the batch: no reward normalization, no whitening and no critic. The reward R
    includes the KL under pi_old, as in the paper. RLOOTrainer passes on A_i, which is R_i minus the mean of
    the other R_j. P3O needs only the differences R_i - R_j, and they are (A_i - A_j) (K - 1) / K. So
    A (K - 1) / K serves as R.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig, RLOOConfig, RLOOTrainer, TrlParser, get_peft_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of p3o.py
import p3o  # noqa: E402
from dpo import pad_rows  # noqa: E402


@dataclass
class Flags:
    reward_model: str = p3o.flag("out/reward_model", "sequence-classification model with one label")
    dataset: str = p3o.flag("data/toy/prompts", "hub name or folder with a text column 'prompt'; see data.py")
    prompt_length: int = p3o.flag(32, "longest prompt in tokens; longer ones are left out")
    eval_prompts: int = p3o.flag(
        256, "number of held-out prompts to evaluate on, at the start and at the end"
    )
    clipping: Literal["joint", "separate", "none"] = p3o.flag(
        "joint", "P3O-V2, P3O-V1, or no clipping at all"
    )
    clip_range: float = p3o.flag(0.2, "epsilon, for rho (separate) or for a difference of log rho (joint)")
    missing_eos_penalty: float = p3o.flag(1.0, "number subtracted from the score of a response without EOS")


DEFAULTS = {"model_name_or_path": "out/sft", "output_dir": "out/p3o_trl", "seed": 0, "save_strategy": "no"}
DEFAULTS |= {"max_steps": 240}  # optimizer steps: 60 rollouts, 2 epochs of 2 minibatches on each
DEFAULTS |= {"per_device_train_batch_size": 64, "num_generations": 2}  # rows: 32 prompts, K = 2
DEFAULTS |= {"steps_per_generation": 2, "num_iterations": 2}  # minibatches, epochs
DEFAULTS |= {"beta": 0.5, "max_completion_length": 24, "disable_dropout": True}
DEFAULTS |= {"learning_rate": 3e-4, "lr_scheduler_type": "linear", "adam_beta2": 0.95, "adam_epsilon": 1e-5}
DEFAULTS |= {"bf16": False, "gradient_checkpointing": False, "per_device_eval_batch_size": 128}
DEFAULTS |= {"logging_steps": 20, "report_to": "none", "eval_on_start": True}


class LiteralPrompts:
    """What every trainer of TRL needs to see prompts as p3o.py sees them."""

    def _tokenize_prompts(self, prompts):
        """Adds no special tokens, because the data set holds what the model is to see."""
        return self.processing_class(text=prompts, add_special_tokens=False)["input_ids"], None, {}

    def _get_per_token_logps_and_entropies(self, model, *args, **options):
        """Counts positions without padding, as sampling does. TRL counts padding, which GPT-2 would see."""

        def forward(**inputs):
            return model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))

        return super()._get_per_token_logps_and_entropies(forward, *args, **options)


class P3OTrainer(LiteralPrompts, RLOOTrainer):
    def __init__(self, flags, args, **options):
        divides = args.per_device_train_batch_size % args.num_generations == 0
        divides &= args.per_device_eval_batch_size % (args.num_generations_eval or args.num_generations) == 0
        p3o.check(divides, "--num_generations must divide --per_device_{train,eval}_batch_size")
        plain = not (args.normalize_advantages or args.reward_clip_range or args.mask_truncated_completions)
        p3o.check(plain, "P3O takes rewards as they are; leave out what normalizes, clips or masks them")
        super().__init__(args=args, **options)
        self.flags = flags

    def _generate_and_score_completions(self, inputs):
        """Reshapes (N, ...) to (B, K, ...) (1)."""
        K = self.num_generations if self.model.training else self.num_generations_eval
        batch = super()._generate_and_score_completions(inputs)
        return {name: x.unflatten(0, (-1, K)) for name, x in batch.items()}

    def _compute_loss(self, model, inputs):
        """The loss of p3o.py, which is a mean over the B prompts of this micro-batch (2)."""
        (B, K, R), prompt_ids = inputs["completion_ids"].shape, inputs["prompt_ids"]
        if not (prompt_ids == prompt_ids[:, :1]).all():  # (1)
            raise RuntimeError("the responses to a prompt were split; P3O needs them in one micro-batch")
        ids = torch.cat([prompt_ids, inputs["completion_ids"]], 2).flatten(0, 1)  # (N, P + R)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 2).flatten(0, 1)
        logp_new_tok, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, R)  # (N, R)
        logp_new_seq = (logp_new_tok * mask[:, -R:]).sum(1).view(B, K)
        logp_old_seq, reward = inputs["old_logps"], inputs["advantages"] * (K - 1) / K  # (3)
        if self.flags.clipping == "none":
            loss, stats = p3o.pairwise_policy_gradient_loss(logp_new_seq, reward), {}
        else:
            settings = self.flags.clip_range, self.flags.clipping
            loss, stats = p3o.p3o_loss(logp_new_seq, logp_old_seq, reward, *settings)
        for name, value in stats.items():
            values = self.accelerator.gather(torch.tensor([value], device=loss.device))
            value = values.max() if name.endswith("max") else values.mean()
            self._metrics["train" if self.model.training else "eval"][name].append(value.item())
        return loss


def make_reward(args, missing_eos_penalty, tokenizer, config):
    """The reward model. Every process has all of it, in bfloat16 with --bf16."""
    zero = config.deepspeed_plugin  # ZeRO-3 would shard the model, and nothing would gather it again
    with zero.zero3_init_context_manager(enable=False) if zero else nullcontext():
        options = args.reward_model, tokenizer, args
        model = p3o.load_model(AutoModelForSequenceClassification, *options, num_labels=1)
    matches = AutoTokenizer.from_pretrained(args.reward_model).get_vocab() == tokenizer.get_vocab()
    p3o.check(matches, f"{args.reward_model} has another tokenizer; use a reward function on texts instead")
    if config.bf16:
        model.base_model.to(torch.bfloat16)  # the head stays in float32
    size = config.per_device_train_batch_size

    @torch.no_grad()
    def reward(prompts, completion_ids, **others):
        prompt_ids, scores = tokenizer(prompts, add_special_tokens=False)["input_ids"], []
        for first in range(0, len(prompts), size):
            rows = slice(first, first + size)
            batch = pad_rows(prompt_ids[rows], completion_ids[rows], tokenizer, args)
            scores += p3o.read_score(model, **batch).tolist()
        ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        return [score - missing_eos_penalty * (not end) for score, end in zip(scores, ended)]

    return reward


def main(argv=None):
    parser = TrlParser((Flags, RLOOConfig, ModelConfig))
    parser.set_defaults(**DEFAULTS)
    flags, config, model = parser.parse_args_and_config(argv)
    config.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    args = p3o.Args(model.model_name_or_path, flags.reward_model, flags.dataset, device=str(config.device))
    args.prompt_length, args.response_length = flags.prompt_length, config.max_completion_length
    tokenizer = p3o.load_tokenizer(args)
    train = p3o.read_prompts(["train"], tokenizer, args)
    held_out = p3o.read_prompts(["validation", "test"], tokenizer, args)[: flags.eval_prompts]
    options = {"model": args.model, "processing_class": tokenizer, "peft_config": get_peft_config(model)}
    options["reward_funcs"] = make_reward(args, flags.missing_eos_penalty, tokenizer, config)
    for name, rows in (("train_dataset", train), ("eval_dataset", held_out)):
        options[name] = Dataset.from_dict({"prompt": [row["prompt"] for row in rows]})
    trainer = P3OTrainer(flags, config, **options)
    trainer.train()
    trainer.save_model(config.output_dir)
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        start = next(row for row in trainer.state.log_history if "eval_reward" in row)  # by eval_on_start
        gain = f"gain {metrics['eval_reward'] - start['eval_reward']:.2f} over the SFT model"
        kl = metrics["eval_kl"] * metrics["eval_completions/mean_length"]  # TRL's KL is per token
        reached = f"{gain}, reward {metrics['eval_reward']:.3f} at KL {kl:.2f} nats/response"
        print(f"{config.output_dir}, step {trainer.state.global_step}: {reached} on held-out prompts")
    return trainer


if __name__ == "__main__":
    main().accelerator.end_training()  # ends the processes' group, without which an exit may abort
