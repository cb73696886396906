"""P3O inside a distributed trainer: data parallel over processes, with the functions of p3o.py.

    torchrun --nproc_per_node 2 examples/p3o_distributed.py --output_dir out/p3o_distributed

takes the flags of p3o.py. What P3O asks of a distributed trainer is little, and marked (1) to (4) below:

(1) Every process draws responses of its own: another seed, other prompts of the same batch.
(2) All K responses to a prompt stay on one process, so that no pair is split; rewards need no communication,
    for P3O has no statistics over the batch to share: no reward normalisation, no whitening, no critic.
(3) Equal shares, and a loss that is a mean over prompts: gradients averaged over processes are the whole one.
(4) One process logs and saves.

Left out: evaluations (--eval_every, --eval_prompts do nothing), --reward_shift and --resume. With one process
the result is, bit for bit, that of p3o.py.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # p3o.py; or paste what is used here
import p3o  # noqa: E402


def mean_over_processes(metrics, device):
    """Every value averaged over the processes; of log_ratio_max and log_ratio_first the largest."""
    values = torch.tensor(list(metrics.values()), device=device, dtype=torch.float64)
    largest = values.clone()
    dist.all_reduce(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    means = dict(zip(metrics, (values / dist.get_world_size()).tolist()))
    largest = dict(zip(metrics, largest.tolist()))
    return means | {name: largest[name] for name in ("log_ratio_max", "log_ratio_first")}


def main(args):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    p3o.require("RANK" in os.environ, "there is no process group; start this with torchrun")
    left_out = args.resume or args.reward_shift
    p3o.require(not left_out, "--resume and --reward_shift are not in this example; use p3o.py")
    if args.device == "auto" and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    p3o.check_args(args, "seed micro_batch_size beta missing_eos_penalty eval_every save_every reward_shift")
    B, K, divides = args.prompts_per_step, args.num_responses, args.minibatch_size % world == 0
    p3o.require(K >= 2, "--num_responses is 1; give 2 or more")
    p3o.require(divides, f"{world} processes do not divide --minibatch_size; use other numbers")
    p3o.require(B % args.minibatch_size == 0, f"--minibatch_size does not divide {B} prompts; alter it")
    args.minibatch_size //= world  # (3)
    args.micro_batch_size = args.micro_batch_size or args.minibatch_size
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    tokenizer = p3o.load_tokenizer(args.model)
    prompts = p3o.read_prompts(args.dataset, ["train"], tokenizer, args)
    policy, reference = (p3o.load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
    models = policy, reference.requires_grad_(False), p3o.load_reward(tokenizer, args)
    parallel = DistributedDataParallel(policy)  # averages the gradients of the processes in backward (3)
    settings = {"lr": args.learning_rate, "betas": (0.9, 0.95), "eps": 1e-5, "fused": True}
    optimizer = torch.optim.Adam(policy.parameters(), **settings)
    parts = {"": policy, "optimizer": optimizer}
    if rank == 0:
        p3o.open_run(args, parts)

    for step in range(1, args.steps + 1):
        torch.manual_seed(args.seed * 10**6 + step + rank * 10**5)  # (1)
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (step - 1) / args.steps)
        rows, clock = p3o.data_order(len(prompts), B, step, args.seed)[rank::world], [time.perf_counter()]
        batch = p3o.sample_batch(policy, [prompts[row] for row in rows], K, tokenizer, args)  # (2)
        clock.append(time.perf_counter())
        batch = p3o.score_batch(batch, models, args.micro_batch_size * K, args)
        logp_old_seq, logp_ref_seq = (batch[x].sum(1).view(-1, K) for x in ("logp_old_tok", "logp_ref_tok"))
        score = batch["score"].view(-1, K)  # (B / processes, K)
        reward = p3o.trajectory_reward(score, logp_old_seq, logp_ref_seq, args.beta)
        clock.append(time.perf_counter())
        updates = []
        for _ in range(args.epochs):
            for minibatch in torch.randperm(len(rows)).split(args.minibatch_size):
                updates.append(p3o.update_policy(parallel, optimizer, batch, reward, minibatch, step, args))
        clock.append(time.perf_counter())
        metrics = p3o.batch_metrics(batch, K, args.beta) | p3o.cost_metrics(batch, clock)
        metrics |= {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        metrics["log_ratio_max"] = max(u["log_ratio_max"] for u in updates)
        metrics["log_ratio_first"] = updates[0]["log_ratio_max"]
        metrics = mean_over_processes(metrics, args.device)
        if rank == 0:  # (4)
            p3o.end_step(args, step, metrics, parts, tokenizer)
            reached = f"reward {metrics['reward']:.3f}, KL {metrics['kl']:.2f} nats/response"
            print(f"step {step}: {reached}", flush=True)
    dist.barrier()
    del parallel  # or it would end gloo's threads while it holds the lock that they may wait for
    dist.destroy_process_group()


if __name__ == "__main__":
    p3o.guard(main, p3o.Args)
