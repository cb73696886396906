"""P3O on an engine that already shards, serves and adapts: the loss of p3o.py in TRL's RLOOTrainer.

    pip install -r requirements.txt -r examples/requirements.txt    then toy.py, sft.py and reward_model.py
    python examples/p3o_with_trl.py                                 the embedded task, one process
    accelerate launch --multi_gpu --num_processes 2 examples/p3o_with_trl.py --per_device_train_batch_size 32
                                                                    DDP; with --use_cpu it needs no GPU
    accelerate launch --config_file fsdp2.yaml examples/p3o_with_trl.py --bf16 true ...                 FSDP
    accelerate launch --config_file zero3.yaml examples/p3o_with_trl.py --bf16 true ...                 ZeRO-3
    ... --use_vllm --vllm_mode colocate                             generation by vLLM, on the same GPUs
    ... --use_peft --lora_r 16                                      LoRA; the reference needs no memory then

The .yaml files come with TRL, in trl/accelerate_configs. The defaults are p3o.py's, but that the learning
rate falls at every optimizer step; the last line is p3o.py's: reward and KL on held-out prompts.

What P3O asks of a distributed trainer is little, and marked (1) to (3) below:

(1) The K responses to a prompt meet in one micro-batch. RLOOTrainer shuffles and splits what it sampled along
    the first dimension: make that the prompts, (B, K, ...) for (B * K, ...). A split pair ends the run.
(2) Equal shares, and a loss that is a mean over prompts: gradients averaged over processes are the whole one.
(3) No statistics over the batch: no normalisation, no whitening, no critic. R, with the KL under pi_old in it
    as in the paper, comes as A, its lead over the mean of the others: A_i - A_j = (R_i - R_j) K / (K - 1).
    P3O sees differences alone, so A (K - 1) / K is as good a reward as R.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import ModelConfig, RLOOConfig, RLOOTrainer, TrlParser, get_peft_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # p3o.py; or paste what is used here
import p3o  # noqa: E402


@dataclass
class Flags:
    reward_model: str = p3o.flag("out/reward_model", "sequence-classification model with one label")
    dataset: str = p3o.flag("data/toy/prompts", "hub name or folder with a text column prompt; see data.py")
    prompt_length: int = p3o.flag(32, "tokens; longer prompts are left out and counted")
    eval_prompts: int = p3o.flag(256, "held-out prompts of the evaluation at the end")
    clipping: Literal["joint", "separate", "none"] = p3o.flag("joint", "P3O-V2, V1, plain pairwise gradient")
    clip_range: float = p3o.flag(0.2, "epsilon: of rho (V1), of the difference of log rho in nats (V2)")
    missing_eos_penalty: float = p3o.flag(1.0, "off the score of a response cut off without EOS")


DEFAULTS = {"model_name_or_path": "out/sft", "output_dir": "out/p3o_trl", "seed": 0, "save_strategy": "no"}
DEFAULTS |= {"max_steps": 240}  # optimizer steps: 60 rollouts, 2 epochs of 2 minibatches on each
DEFAULTS |= {"per_device_train_batch_size": 64, "num_generations": 2}  # rows: 32 prompts, K = 2
DEFAULTS |= {"steps_per_generation": 2, "num_iterations": 2}  # minibatches, epochs
DEFAULTS |= {"beta": 0.5, "max_completion_length": 24, "disable_dropout": True}
DEFAULTS |= {"learning_rate": 3e-4, "lr_scheduler_type": "linear", "adam_beta2": 0.95, "adam_epsilon": 1e-5}
DEFAULTS |= {"bf16": False, "gradient_checkpointing": False, "per_device_eval_batch_size": 128}
DEFAULTS |= {"logging_steps": 20, "report_to": "none"}


class P3OTrainer(RLOOTrainer):
    def __init__(self, flags, args, **options):
        whole = args.per_device_train_batch_size % args.num_generations == 0
        whole &= args.per_device_eval_batch_size % (args.num_generations_eval or args.num_generations) == 0
        p3o.require(
            whole, "--num_generations does not divide --per_device_{train,eval}_batch_size; alter one"
        )
        plain = not (args.normalize_advantages or args.reward_clip_range or args.mask_truncated_completions)
        p3o.require(plain, "P3O takes rewards as they are; leave out what normalises, clips or masks them")
        super().__init__(args=args, **options)
        self.flags = flags

    def _tokenize_prompts(self, prompts):
        """Prompts are literal: no special token is added."""
        return self.processing_class(text=prompts, add_special_tokens=False)["input_ids"], None, {}

    def _get_per_token_logps_and_entropies(self, model, *args, **options):
        """Positions count real tokens, as in sampling. TRL counts padding too; GPT-2's positions see that."""

        def forward(**inputs):
            return model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))

        return super()._get_per_token_logps_and_entropies(forward, *args, **options)

    def _generate_and_score_completions(self, inputs):
        """(1) Prompts first: (N, ...) -> (B, K, ...)."""
        K = self.num_generations if self.model.training else self.num_generations_eval
        batch = super()._generate_and_score_completions(inputs)
        return {name: x.unflatten(0, (-1, K)) for name, x in batch.items()}

    def _compute_loss(self, model, inputs):
        """(2) The loss of p3o.py, a mean over the B prompts of this micro-batch."""
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
    """The reward model, read at the last response token; whole on every process, in bfloat16 with --bf16."""
    zero = config.deepspeed_plugin  # ZeRO-3 would shard what is loaded, and nothing gather it again
    with zero.zero3_init_context_manager(enable=False) if zero else nullcontext():
        options = args.reward_model, tokenizer, args
        model = p3o.load_model(AutoModelForSequenceClassification, *options, num_labels=1)
    same = p3o.load_tokenizer(args.reward_model).get_vocab() == tokenizer.get_vocab()
    p3o.require(same, f"{args.reward_model!r} has another tokenizer; write a reward on texts in its place")
    if config.bf16:
        model.base_model.to(torch.bfloat16)  # the head stays in float32
    size = config.per_device_train_batch_size

    @torch.no_grad()
    def reward(prompts, completion_ids, **others):
        prompt_ids, scores = tokenizer(prompts, add_special_tokens=False)["input_ids"], []
        for first in range(0, len(prompts), size):
            tokens = p3o.pad(prompt_ids[first : first + size], "left", tokenizer, args.device)
            tokens += p3o.pad(completion_ids[first : first + size], "right", tokenizer, args.device)
            scores += p3o.read_score(model, *tokens).tolist()
        ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        return [r if end else r - missing_eos_penalty for r, end in zip(scores, ended)]

    return reward


def main(argv=None):
    parser = TrlParser((Flags, RLOOConfig, ModelConfig))
    parser.set_defaults(**DEFAULTS)
    flags, config, model = parser.parse_args_and_config(argv)
    config.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    args = p3o.Args(model.model_name_or_path, flags.reward_model, flags.dataset, device=str(config.device))
    args.prompt_length, args.response_length = flags.prompt_length, config.max_completion_length
    tokenizer = p3o.load_tokenizer(args.model)
    train = p3o.read_prompts(args.dataset, ["train"], tokenizer, args)
    held_out = p3o.read_prompts(args.dataset, ["validation", "test"], tokenizer, args, flags.eval_prompts)
    options = {"model": args.model, "processing_class": tokenizer, "peft_config": get_peft_config(model)}
    options["reward_funcs"] = make_reward(args, flags.missing_eos_penalty, tokenizer, config)
    for name, rows in (("train_dataset", train), ("eval_dataset", held_out)):
        options[name] = Dataset.from_dict({"prompt": [row["prompt"] for row in rows]})
    trainer = P3OTrainer(flags, config, **options)
    trainer.train()
    trainer.save_model(config.output_dir)
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        kl = metrics["eval_kl"] * metrics["eval_completions/mean_length"]  # TRL's is per token
        reached = f"reward {metrics['eval_reward']:.3f} at KL {kl:.2f} nats/response on held-out prompts"
        print(f"{config.output_dir}: {reached}; {trainer.state.global_step} optimizer steps")
    return trainer


if __name__ == "__main__":
    main()
