"""How much of a step is the library's own passes, and what would be left without padding?

    python results/floor.py      one thread; after the quick start; run nothing beside it

Every phase of a step of p3o.py on the toy is timed in turns with the bare passes of transformers that it
cannot do without, on the same tokens: generate; the forward passes of policy, reference and reward model; a
forward and a backward pass of the policy for each minibatch. Two more rows for the update: with micro-batches
of 8 prompts sorted by length, each trimmed to its longest prompt and response, and the bare passes on as many
rows of average length, without a single pad. Of ppo.py the update alone, beside the bare passes of policy and
critic: its other phases are p3o.py's and a pass of the critic. Writes floor.csv and floor.md.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import speed

import p3o
import ppo

SORTED = 8  # prompts of a micro-batch, as few as still pay


def load(args):
    """The models of a run of p3o.py, its optimizer, tokenizer and prompts."""
    tokenizer = p3o.load_tokenizer(args.model)
    prompts = p3o.read_prompts(args.dataset, ["train"], tokenizer, args)
    kinds = AutoModelForCausalLM, AutoModelForCausalLM, AutoModelForSequenceClassification
    names, more = (args.model, args.model, args.reward_model), ({}, {}, {"num_labels": 1})
    models = [p3o.load_model(*x, tokenizer, args, **y) for *x, y in zip(kinds, names, more)]
    for model in models[1:]:
        model.requires_grad_(False)
    optimizer = torch.optim.Adam(models[0].parameters(), lr=1e-7, betas=(0.9, 0.95), eps=1e-5, fused=True)
    return models, optimizer, tokenizer, prompts


def trim(prompt_ids, prompt_mask, response_ids, response_mask):
    """The same rows without the columns that hold pads alone."""
    P, R = int(prompt_mask.sum(1).max()), int(response_mask.sum(1).max())
    return prompt_ids[:, -P:], prompt_mask[:, -P:], response_ids[:, :R], response_mask[:, :R]


def load_ppo(tokenizer, args):
    """Settings of ppo.py with these sizes, its critic and the critic's optimizer."""
    names = "model reward_model device prompts_per_step num_responses minibatch_size micro_batch_size".split()
    sizes = {name: getattr(args, name) for name in names}
    args = replace(ppo.Args(), **ppo.PRESETS["ppo"] | sizes)
    critic = ppo.load_critic(tokenizer, args)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-7, betas=(0.9, 0.95), eps=1e-5, fused=True)
    return args, critic, optimizer


def passes(policy, tokens, size, lengths=None):
    """A forward and a backward pass for every `size` rows; if `lengths` are given, sorted and trimmed."""
    order = torch.arange(len(tokens[0])) if lengths is None else lengths.argsort()
    for rows in order.split(size):
        part = [x[rows] for x in tokens]
        p3o.response_logps(policy, *(part if lengths is None else trim(*part))).sum().backward()


def bare(policy, tokens, size, critic=None):
    """passes, and nothing but what transformers does for them."""
    keep = tokens[2].shape[1] + 1
    for first in range(0, len(tokens[0]), size):
        inputs = p3o.model_inputs(*(x[first : first + size] for x in tokens))
        policy(**inputs, use_cache=False, logits_to_keep=keep).logits.sum().backward()
        if critic:
            critic.base_model(**inputs, use_cache=False).last_hidden_state.sum().backward()


@torch.no_grad()
def forwards(models, tokens, size):
    """The forward passes of scoring, and nothing else."""
    keep = tokens[2].shape[1] + 1
    for first in range(0, len(tokens[0]), size):
        inputs = p3o.model_inputs(*(x[first : first + size] for x in tokens))
        for model in models[:2]:
            model(**inputs, use_cache=False, logits_to_keep=keep)
        models[2].base_model(**inputs, use_cache=False)


def measure(models, optimizer, tokenizer, prompts, args, repeats):
    """{what: seconds of each repeat}, all of them in turns."""
    policy, reference, reward_model = models
    B, K, found = args.prompts_per_step, args.num_responses, {}
    size = args.minibatch_size * K
    own, critic, critic_optimizer = load_ppo(tokenizer, args)

    def timed(what, function):
        policy.zero_grad()
        critic.zero_grad()
        start = time.perf_counter()
        result = function()
        found.setdefault(what, []).append(time.perf_counter() - start)
        return result

    def score(batch):
        return p3o.read_score(reward_model, *(batch[x] for x in p3o.TOKENS))

    def update(batch, reward):
        for minibatch in torch.randperm(B).split(args.minibatch_size):
            p3o.update_policy(policy, optimizer, batch, reward, minibatch, 1, args)

    def update_ppo(batch):
        for minibatch in torch.randperm(B).split(args.minibatch_size):
            optimizers = optimizer, critic_optimizer
            ppo.update_models((policy, critic), optimizers, batch, minibatch, None, 1, tokenizer, own)

    for step in range(repeats + 2):
        rows = [prompts[number] for number in p3o.data_order(len(prompts), B, step + 1, 0)]
        torch.manual_seed(step)
        batch = timed("rollout", lambda: p3o.sample_batch(policy, rows, K, tokenizer, args))
        torch.manual_seed(step)
        inputs = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"].long()}
        with torch.no_grad():
            ids = timed("rollout, bare", lambda: policy.generate(**inputs))
        assert ids.shape[1] == sum(batch[x].shape[1] for x in ("prompt_ids", "response_ids"))
        batch = timed("score", lambda: p3o.score_batch(batch, (policy, reference, score), size, args))
        tokens = [batch[x] for x in p3o.TOKENS]
        timed("score, bare", lambda: forwards(models, tokens, size))
        timed("update, an epoch", lambda: update(batch, batch["score"].view(B, K)))
        timed("update, bare", lambda: bare(policy, tokens, size))
        lengths = tokens[3].view(B, -1).sum(1).repeat_interleave(K) * B + torch.arange(B).repeat_interleave(K)
        timed("update, in order", lambda: passes(policy, tokens, size))
        timed("update, sorted", lambda: passes(policy, tokens, SORTED * K, lengths))
        P, R = (int(tokens[x].sum(1).float().mean().round()) for x in (1, 3))
        dense = [torch.ones_like(x) for x in (tokens[0][:, :P], tokens[1][:, :P])]
        dense += [torch.ones_like(x) for x in (tokens[2][:, :R], tokens[3][:, :R])]
        timed("update, no padding", lambda: bare(policy, dense, size))
        ppo.estimate_advantages(critic, batch, batch["score"], own.beta, own)
        timed("ppo's update, an epoch", lambda: update_ppo(batch))
        timed("ppo's update, bare", lambda: bare(policy, tokens, size, critic))
    return {what: seconds[2:] for what, seconds in found.items()}


def main(options):
    os.chdir(speed.ROOT)
    torch.set_num_threads(1)
    args = replace(p3o.Args(), device="cpu")
    args.micro_batch_size = args.minibatch_size
    found = measure(*load(args), args, options.repeats)
    rows = []
    for what, seconds in found.items():
        row = {"what": what, "seconds": speed.spread(seconds)}
        phase = what.split(",")[0]
        own = found.get(phase) or found[f"{phase}, an epoch"]
        row["of the phase"] = speed.spread([x / y for x, y in zip(seconds, own)])
        rows.append(row)
    speed.write_table("floor", rows, "1 thread", options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=20, help="of everything; default: 20")
    parser.add_argument("--folder", default=str(speed.ROOT / "results"), help="of the table")
    main(parser.parse_args())
