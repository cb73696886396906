"""P3O on several processes: data parallelism with the functions of p3o.py and no further package.

    torchrun --nproc_per_node 2 examples/p3o_distributed.py --output_dir out/p3o_distributed

The flags are those of p3o.py. P3O asks little of a distributed trainer:

(1) Every process samples responses of its own, because it has prompts and a seed of its own.
(2) All K responses to a prompt stay on one process, so that no pair is split. Rewards need no communication,
    because P3O has no statistics over the batch: no reward normalization, no whitening and no critic.
(3) The processes take equal shares of every minibatch, and the loss is a mean over prompts. The mean of their
    gradients is therefore the gradient of the minibatch.
(4) One process evaluates, logs and saves.

The numbers mark the places below. With one process the model is that of p3o.py, byte for byte. This example
leaves out --resume and --reward_shift.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of p3o.py
import p3o  # noqa: E402


def average_gradients(model):
    """Makes every backward pass average the gradients over the processes (3).

    DistributedDataParallel does so in fewer and larger messages, which is faster for a large model.
    """

    def average(parameter):
        dist.all_reduce(parameter.grad)  # the sum
        parameter.grad /= dist.get_world_size()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(average)


def average_metrics(metrics, device):
    """Returns the means over the processes and, for log_ratio_max, the maximum."""
    values = torch.tensor(list(metrics.values()), device=device, dtype=torch.float64)
    highest = values.clone()
    dist.all_reduce(values)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    means = dict(zip(metrics, (values / dist.get_world_size()).tolist()))
    return means | {"log_ratio_max": dict(zip(metrics, highest.tolist()))["log_ratio_max"]}


def finish_step(step, metrics, models, optimizer, held_out, tokenizer, args):
    """Does what p3o.py does at the end of a step."""
    if step % args.eval_every == 0 or step == args.steps:
        metrics |= p3o.evaluate(step, *models, held_out, tokenizer, args)
    with open(Path(args.output_dir, "metrics.jsonl"), "a") as log:
        log.write(json.dumps({"step": step, **metrics}) + "\n")
    if step % args.save_every == 0 or step == args.steps:
        p3o.save(step, models[0], optimizer, tokenizer, args)


def main(args):
    p3o.check("RANK" in os.environ, "there is no process group; start this script with torchrun")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    del os.environ["WORLD_SIZE"]  # because check_args refuses to run p3o.py on several processes
    p3o.check_args(args, may_be_zero=["seed", "beta", "reward_shift", "missing_eos_penalty"])
    left_out = args.resume or args.reward_shift
    p3o.check(not left_out, "--resume and --reward_shift are not in this example; use p3o.py")
    p3o.check(args.num_responses >= 2, "--num_responses must be at least 2, because P3O learns from pairs")
    p3o.check(args.minibatch_size % world == 0, f"the {world} processes must divide --minibatch_size")
    divides = args.prompts_per_step % args.minibatch_size == 0
    p3o.check(divides, "--minibatch_size must divide --prompts_per_step")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    backend = "nccl" if args.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world)
    args.seed = args.seed * world + rank  # (1)
    args.prompts_per_step //= world  # (3)
    args.minibatch_size //= world
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = p3o.load_tokenizer(args)
    prompts = p3o.read_prompts(["train"], tokenizer, args)[rank::world]  # (1)
    held_out = p3o.read_prompts(["validation", "test"], tokenizer, args)[: args.eval_prompts]
    policy, reference = (p3o.load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
    models = policy, reference.requires_grad_(False), p3o.load_reward(tokenizer, args)
    average_gradients(policy)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    sampling |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    policy.generation_config = transformers.GenerationConfig(**sampling, max_new_tokens=args.response_length)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.95), eps=1e-5, fused=True)
    offset = torch.zeros(len(prompts), 1, dtype=torch.float64, device=args.device)  # no --reward_shift
    if rank == 0:
        p3o.open_run(policy, optimizer, args)
    for step in range(args.steps + 1):
        metrics = {}
        if step > 0:  # every process samples whole pairs (2) and meets the others in each backward pass (3)
            metrics = p3o.train_step(step, *models, optimizer, prompts, offset, tokenizer, args)
            metrics = average_metrics(metrics, args.device)
        if rank == 0:  # (4)
            finish_step(step, metrics, models, optimizer, held_out, tokenizer, args)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(transformers.HfArgumentParser(p3o.Args, allow_abbrev=False).parse_args_into_dataclasses()[0])
