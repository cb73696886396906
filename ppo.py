"""Stage 3, the baseline: PPO for language models, token by token, with a critic.

    python ppo.py                      the embedded task, after toy.py, sft.py and reward_model.py
    python ppo.py --preset ppo_max     the recipe of "Secrets of RLHF"; other models: README.md

The first ends, on two x86 cores, with
    out/ppo: reward 2.440 at KL 1.22 nats/response on held-out prompts; 60 steps, 1.1 minutes

    token rewards   r_t = -beta (log pi_old - log pi_SFT)(y_t), + r(x, y) at the last      token_rewards
    TD error        delta_t = r_t + gamma V_t+1 - V_t, V behind the last token 0           gae
    advantages      A_t = sum_l (gamma lam)^l delta_t+l; returns R_t = A_t + V_t           gae
    PPO-Clip        max E min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)                ppo_clip_loss
    PPO-Penalty     max E rho_t A_t - c KL(pi_old || pi)                                   ppo_penalty_loss
    critic          min E max((V - R)^2, (clip(V, V_old -+ eps_v) - R)^2) / 2              value_loss
    adaptive beta   beta (1 + clip(KL / target - 1, -+0.2) n / horizon)                    adaptive_beta

Sources: [PPO] Schulman et al. 2017, 1707.06347; [GAE] Schulman et al. 2015, 1506.02438; [Secrets] Zheng et
al. 2023, "Secrets of RLHF in Large Language Models Part I: PPO", 2307.04964; [N+] Huang et al. 2024,
2403.17031; [KL] Ziegler et al. 2019, 1909.08593.

The tricks that [Secrets] studies, a flag each, stand in README.md; PRESETS below holds those of PPO-max.

Departures: KL(pi_old || pi) is estimated from the sampled tokens, mean of rho - 1 - log rho. Advantages are
whitened over the rollout. Steps of critic pretraining count as --steps. The ptx term reads demonstrations,
not raw text. A response cut off without EOS loses --missing_eos_penalty. "objective" is reward - beta KL with
--beta also where beta adapts: on the exact KL of the rollout before, by a fifth at most.

Legend: B prompts, K responses to each, N = B * K rows; P prompt length, R response length. Prompts are padded
on the left, responses on the right. Masks are boolean, True counts. Log-probs and KL in nats.
"""

import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait choke a busy machine

import datasets
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    model: str = flag("out/sft", "SFT model: where the policy starts, and the reference of the KL")
    reward_model: str = flag("out/reward_model", "sequence-classification model with one label")
    dataset: str = flag("data/toy/prompts", "hub name or folder with a text column prompt; see data.py")
    output_dir: str = flag("out/ppo", "folder of this run; the critic goes to its subfolder critic/")
    preset: Literal["ppo", "ppo_max"] = flag("ppo", "fills in the flags that are None here; see PRESETS")
    seed: int = flag(0, "of data order and sampling")
    device: str = flag("auto", "auto (cuda when there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16: autocast, over float32 weights")
    learning_rate: float = flag(3e-4, "of the policy; Adam, falls linearly to 0; 5e-7 for 7B in [Secrets]")
    critic_learning_rate: float = flag(1e-3, "of the critic, falls likewise; 1.65e-6 for 7B in [Secrets]")
    steps: int = flag(60, "rollouts in all; raised on --resume, the decay stretches: the rate jumps up")
    prompts_per_step: int = flag(64, "B, prompts per rollout: the experience buffer, better small [Secrets]")
    num_responses: int = flag(2, "K, responses per prompt")
    epochs: int = flag(2, "passes over each rollout; 1 to 4")
    minibatch_size: int = flag(32, "prompts per optimizer step, each with all its responses")
    micro_batch_size: int = flag(0, "prompts per forward pass, to save memory; 0: the minibatch")
    beta: float | None = flag(None, "weight of the KL to the SFT model in the token rewards")
    kl_target: float | None = flag(None, "nats per response: beta adapts to hold the KL there")
    kl_horizon: float = flag(1000, "responses in which beta adapts, with --kl_target; 10000 in [KL]")
    gamma: float = flag(1.0, "discount per token")
    lam: float = flag(0.95, "of GAE: 1 is the Monte-Carlo return, 0 the TD error")
    policy_loss: Literal["clip", "penalty"] = flag("clip", "PPO-Clip or PPO-Penalty")
    clip_range: float = flag(0.2, "epsilon of PPO-Clip")
    penalty_coef: float = flag(0.5, "weight of KL(pi_old || pi) per token in PPO-Penalty")
    value_clip_range: float = flag(0.2, "values move at most so far per rollout; 0: unclipped")
    normalize_reward: bool | None = flag(None, "true or false: (score - mean) / std of all scores so far")
    scale_reward: bool = flag(False, "score / std of all scores so far; studied in [Secrets], not in PPO-max")
    reward_clip: float | None = flag(None, "scores then held in [-c, c], 0.3 also studied; 0: not clipped")
    whiten_advantages: bool | None = flag(None, "true or false: (advantage - mean) / std [N+]")
    advantage_clip: float = flag(0.0, "held in [-c, c]; 0.12 to 0.5 in [Secrets], not in PPO-max; 0: not")
    critic_init: Literal["reward", "sft"] = flag("reward", "reward model, or SFT model with a zero head")
    critic_warmup_steps: int | None = flag(None, "critic pretraining: steps in which the policy rests")
    entropy_coef: float = flag(0.0, "weight of the entropy per token; studied in [Secrets], not in PPO-max")
    ptx_coef: float | None = flag(None, "PPO-ptx: weight of the demonstrations' log-likelihood per token")
    ptx_dataset: str = flag("data/toy/sft", "demonstrations of --ptx_coef: prompt, completion; see data.py")
    reward_shift: float = flag(0.0, "times a fixed normal offset per prompt, on scores but not in logs")
    missing_eos_penalty: float = flag(1.0, "subtracted from the score of a response cut off without EOS")
    temperature: float = flag(1.0, "divides the logits, when sampling and in every log-prob")
    prompt_length: int = flag(32, "tokens; longer prompts are left out and counted")
    response_length: int = flag(24, "tokens sampled at most, EOS included")
    max_grad_norm: float = flag(1.0, "global gradient-norm clip, of policy and critic each")
    eval_every: int = flag(20, "steps between evaluations on held-out prompts; 0: only before and after")
    eval_prompts: int = flag(256, "held-out prompts of an evaluation")
    save_every: int = flag(20, "steps between checkpoints; 0: only the last")
    resume: bool = flag(False, "go on; steps, save_every, micro_batch_size, device may differ")
    overwrite: bool = flag(False, "replace the run in output_dir")


PRESETS = {  # what the flags become that were not given
    "ppo": {"beta": 0.5, "normalize_reward": False, "reward_clip": 0.0, "whiten_advantages": True}
    | {"critic_warmup_steps": 0, "ptx_coef": 0.0},
    "ppo_max": {"beta": 0.05, "normalize_reward": True, "reward_clip": 0.8, "whiten_advantages": False}
    | {"critic_warmup_steps": 10, "ptx_coef": 0.05},
}


# ------------------------------------------------------------------------------------------- the mathematics
def masked_mean(x, mask):
    """Mean of x where mask is True. What stands elsewhere, be it nan, has no influence and no gradient."""
    return x.masked_fill(~mask, 0.0).sum() / mask.sum()


def masked_variance(x, mask):
    """Population variance of x where mask is True."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def masked_whiten(x, mask, shift_mean=True):
    """(x - mean) / std over the True positions, 0 elsewhere. shift_mean=False keeps the mean where it was."""
    mean = masked_mean(x, mask)
    whitened = (x - mean) / (masked_variance(x, mask) + 1e-8).sqrt()
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def token_rewards(score, logp_old_tok, logp_ref_tok, response_mask, beta):
    """r_t = -beta (log pi_old - log pi_SFT)(y_t), plus the score at the last response token [N+].

    score (B,), the others (B, R), log-probs in nats. Returns (B, R), 0 where response_mask is False.
    """
    kl = (logp_old_tok - logp_ref_tok).masked_fill(~response_mask, 0.0)
    last = response_mask & (response_mask.cumsum(1) == response_mask.sum(1, keepdim=True))
    return score.unsqueeze(1) * last - beta * kl


@torch.no_grad()
def gae(reward_tok, value_tok, response_mask, gamma=1.0, lam=0.95):
    """A_t = sum_l (gamma lam)^l delta_t+l, delta_t = r_t + gamma V_t+1 - V_t, V = 0 after the end [GAE].

    All (B, R); responses on the left of their rows. Returns (advantages, returns = A + V), both (B, R), 0
    outside the mask. lam = 1: returns are the discounted sums of the rewards still to come.
    """
    reward, value = (x.masked_fill(~response_mask, 0.0) for x in (reward_tok, value_tok))
    delta = reward + gamma * torch.nn.functional.pad(value[:, 1:], (0, 1)) - value  # (B, R)
    advantages, running = torch.zeros_like(delta), 0.0
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + value


def importance_ratio(logp_new_tok, logp_old_tok, response_mask):
    """rho_t = pi(y_t) / pi_old(y_t), (B, R), 1 outside the mask; approx_kl, (); and both in figures to watch.

    approx_kl: mean over tokens of rho - 1 - log rho, unbiased for KL(pi_old || pi), nats per token.
    """
    log_rho = (logp_new_tok - logp_old_tok).masked_fill(~response_mask, 0.0)
    rho = log_rho.exp()
    approx_kl = masked_mean(rho - 1 - log_rho, response_mask)
    stats = {"approx_kl": approx_kl.item(), "log_ratio_max": log_rho.detach().abs().max().item()}
    return rho, approx_kl, stats


def ppo_clip_loss(logp_new_tok, logp_old_tok, advantages, response_mask, clip_range=0.2):
    """-E_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t), mean over response tokens [PPO, eq. 7].

    All (B, R), log-probs in nats. Returns (loss, stats): clip_fraction, the share of tokens whose gradient
    the clip removed, approx_kl (see importance_ratio) and log_ratio_max, the largest |log rho_t|.
    """
    rho, _, stats = importance_ratio(logp_new_tok, logp_old_tok, response_mask)
    unclipped, clipped = rho * advantages, rho.clamp(1 - clip_range, 1 + clip_range) * advantages
    stats["clip_fraction"] = masked_mean((clipped < unclipped).float(), response_mask).item()
    return -masked_mean(torch.minimum(unclipped, clipped), response_mask), stats


def ppo_penalty_loss(logp_new_tok, logp_old_tok, advantages, response_mask, penalty):
    """-E_t rho_t A_t + penalty KL(pi_old || pi), mean over response tokens [PPO, eq. 8].

    All (B, R), log-probs in nats. The KL is approx_kl (see importance_ratio): unbiased, its gradient too.
    Returns (loss, stats) as ppo_clip_loss does, with a clip_fraction of 0.
    """
    rho, kl, stats = importance_ratio(logp_new_tok, logp_old_tok, response_mask)
    surrogate = masked_mean(rho * advantages, response_mask)
    return penalty * kl - surrogate, stats | {"clip_fraction": 0.0}


def value_loss(value_new_tok, value_old_tok, returns, response_mask, clip_range=0.2):
    """E_t max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2, mean over response tokens [N+].

    All (B, R). clip_range None: half the plain squared error. Returns a scalar.
    """
    new, old = value_new_tok.masked_fill(~response_mask, 0.0), value_old_tok
    held = new if clip_range is None else old + (new - old).clamp(-clip_range, clip_range)
    errors = torch.maximum((new - returns) ** 2, (held - returns) ** 2)
    return masked_mean(errors, response_mask) / 2


class RunningNormalizer:
    """(x - mean) / std, mean and std of everything seen so far, then clipped to [-clip, clip] [Secrets].

    std: the population's. shift_mean=False divides by std only: reward scaling. scale=False: clips only.
    """

    def __init__(self, shift_mean=True, scale=True, clip=None):
        self.shift_mean, self.scale, self.clip = shift_mean, scale, clip
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: sum of (x - mean)^2

    def __call__(self, x):
        """Takes x (any shape) into the statistics and returns it normalised by them."""
        n, mean = x.numel(), x.double().mean().item()
        total, delta = self.count + n, mean - self.mean
        self.squares += ((x.double() - mean) ** 2).sum().item() + delta**2 * self.count * n / total
        self.mean, self.count = self.mean + delta * n / total, total
        if self.scale:
            std = math.sqrt(self.squares / self.count) + 1e-8
            x = (x - self.mean) / std if self.shift_mean else x / std
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def state_dict(self):
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state):
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


def adaptive_beta(beta, kl, target, horizon, n):
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon) after n responses [KL]; kl, target in nats.

    n / horizon is held to at most 1, so that beta stays positive.
    """
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * min(n / horizon, 1))


# -------------------------------------------------------------------------------------- tokens and log-probs
TOKENS = "prompt_ids", "prompt_mask", "response_ids", "response_mask"  # (N, P), (N, P), (N, R), (N, R)


def pad(sequences, side, tokenizer, device):
    """Token lists -> ids (N, L), mask (N, L), padded to the longest on `side`, "left" or "right"."""
    rows = tokenizer.pad({"input_ids": sequences}, padding_side=side, return_tensors="pt").to(device)
    return rows["input_ids"], rows["attention_mask"].bool()


def model_inputs(prompt_ids, prompt_mask, response_ids, response_mask):
    """Joins prompts and responses for a forward pass. Positions count real tokens: padding shifts nothing."""
    ids = torch.cat([prompt_ids, response_ids], 1)
    mask = torch.cat([prompt_mask, response_mask], 1).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def response_distributions(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature=1.0):
    """log pi(. | x, y_<t) at every response position: (N, R, V), float32 whatever the model's dtype."""
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    keep = response_ids.shape[1] + 1  # the last prompt token predicts the first response token
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
    return torch.log_softmax(logits.float() / temperature, -1)


def response_logps(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature=1.0):
    """log pi(y_t | x, y_<t) in nats: (N, R), float32, 0 where response_mask is False; gradients flow.

    Prompts (N, P) are padded on the left, responses (N, R) on the right; masks are boolean.
    """
    logps = response_distributions(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature)
    return logps.gather(-1, response_ids.unsqueeze(-1)).squeeze(-1).masked_fill(~response_mask, 0.0)


def read_values(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """V(x, y_<t), the score head read before each response token: (N, R), float32."""
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.float()  # (N, P + R, D)
    with torch.autocast(hidden.device.type, enabled=False):  # as in read_score
        return model.score(hidden[:, prompt_ids.shape[1] - 1 :]).squeeze(-1)[:, :-1]


def read_score(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """r(x, y): the score head read at the last response token, by position: pad may be EOS. (N,), float32."""
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.float()  # (N, P + R, D)
    with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would round scores by up to 1%
        values = model.score(hidden[:, prompt_ids.shape[1] - 1 :]).squeeze(-1)  # (N, 1 + R)
    return values.gather(1, response_mask.sum(1, keepdim=True)).squeeze(1)


# ------------------------------------------------------------------------------------------- data and models
LEAST_SHARE = 0.1  # of the rows must be within the length limits


def read_rows(name, splits, columns, tokenizer, args, limit=None):
    """[{"prompt": text, "prompt_ids": [...], "response_ids": [[...], ...]}, ...], a response for each column.

    Of the first of `splits` there is. Texts are taken literally, EOS is added; longer rows are left out.
    """
    todo = f"python data.py --dataset {name} --model {args.model} --output_dir data/NAME makes it readable"
    with explained(f"cannot read data set {name!r}", todo):
        data = datasets.load_dataset(name)
        split = next((split for split in splits if split in data), splits[0])
        texts = {column: data[split][column][:] for column in ("prompt", *columns)}
        ids = {column: tokenizer(x, add_special_tokens=False)["input_ids"] for column, x in texts.items()}
    rows = []
    for i, prompt in enumerate(texts["prompt"]):
        response_ids = [ids[column][i] + [tokenizer.eos_token_id] for column in columns]
        longest = max([len(x) for x in response_ids], default=0)
        if 0 < len(ids["prompt"][i]) <= args.prompt_length and longest <= args.response_length:
            rows.append({"prompt": prompt, "prompt_ids": ids["prompt"][i], "response_ids": response_ids})
    used = f"{name} [{split}]: {len(rows)} of {len(texts['prompt'])} rows are within the length limits"
    todo = f"raise --prompt_length {args.prompt_length} or --response_length {args.response_length}"
    require(len(rows) > LEAST_SHARE * len(texts["prompt"]), f"{used}; {todo}")
    less = "" if 2 * len(rows) > len(texts["prompt"]) else "warning, less than half: "
    print(less + used, flush=True)
    return rows[:limit]


def data_order(num_rows, size, step, seed):
    """Row numbers of step 1, 2, ...: passes over the data, each shuffled by a seed: no state to save."""
    rows, place = [], (step - 1) * size
    while len(rows) < size:
        epoch, start = divmod(place + len(rows), num_rows)
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 10**6 + epoch))
        rows += order[start : start + size - len(rows)].tolist()
    return rows


def load_tokenizer(name):
    """The tokenizer of a model; where it has no padding token EOS serves, as masks go by position."""
    with explained(f"cannot load a tokenizer from {name!r}", "run the stage before, or name another model"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    useful = tokenizer.eos_token and len(tokenizer) > 1  # without its files GPT-2's knows EOS alone
    require(useful, f"{name!r} has no tokenizer, or it has no EOS; use another model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(auto_class, name, tokenizer, args, may_miss=(), **options):
    """A decoder-only model in float32 and eval mode: no dropout, ever. may_miss: weights made afresh."""
    todo = "name a decoder-only one, with embeddings for EOS and padding, or another --device"
    with explained(f"cannot use {name!r} as a model on --device {args.device}", todo):
        options |= {"dtype": torch.float32, "output_loading_info": True}
        model, info = auto_class.from_pretrained(name, **options)
        model = model.eval().to(args.device)
        # A probe: the hidden states of a row are the same alone and behind a pad, whatever follows.
        ids = [[1, 2, 0, tokenizer.eos_token_id], [tokenizer.pad_token_id, 1, 2, 0]]
        ids, mask = torch.tensor([ids, [[1, 1, 1, 1], [0, 1, 1, 1]]], device=args.device)  # (2, 4) each
        inputs = model_inputs(ids[:, :2], mask[:, :2], ids[:, 2:], mask[:, 2:])
        with torch.no_grad():
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # (2, 4, D)
        same = bool((hidden[0, :3] - hidden[1, 1:]).abs().max() <= 1e-3 * hidden.abs().max())
    require(same, f"{name!r} sees padding or later tokens, or is not finite; use a decoder-only model")
    whole = set(info["missing_keys"]) <= set(may_miss) and "score.weight" not in info["unexpected_keys"]
    whole &= hasattr(model, "score") or "num_labels" not in options
    whole &= not getattr(model, "_hf_peft_config_loaded", False)  # an adapter on some other model
    require(whole, f"{name!r} is not a whole {auto_class.__name__.removeprefix('AutoModelFor')}; name one")
    need = args.prompt_length + args.response_length
    most = getattr(model.config, "max_position_embeddings", None) or need
    require(need <= most, f"{name!r} holds {most} tokens, not {need}; lower --prompt_length")
    return model


def load_reward(tokenizer, args):
    """r(x, y), a function from a batch to scores (N,). To replace where the reward is your own: README.md."""
    model = load_model(AutoModelForSequenceClassification, args.reward_model, tokenizer, args, num_labels=1)
    model.requires_grad_(False)
    same = load_tokenizer(args.reward_model).get_vocab() == tokenizer.get_vocab()
    require(same, f"{args.reward_model!r} has another tokenizer; see 'Your own reward' in README.md")
    return lambda batch: read_score(model, *(batch[name] for name in TOKENS))


def load_critic(tokenizer, args):
    """A second copy of the reward model, or the SFT model with a score head of zeros, to be trained as V."""
    name = args.reward_model if args.critic_init == "reward" else args.model
    options = {"may_miss": ["score.weight"], "num_labels": 1}
    critic = load_model(AutoModelForSequenceClassification, name, tokenizer, args, **options)
    if args.critic_init == "sft":
        torch.nn.init.zeros_(critic.score.weight)
    return critic


# --------------------------------------------------------------------------- rollout, metrics and evaluation
def autocast(args):
    """--dtype bfloat16: forward passes in bfloat16 over float32 weights, where small updates are not lost."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


@torch.no_grad()
def sample_batch(policy, rows, num_responses, tokenizer, args):
    """K responses to each prompt of B rows: a batch, a dict of N = B * K rows, tensors and lists of texts."""
    rows = [row for row in rows for _ in range(num_responses)]
    prompt_ids, prompt_mask = pad([row["prompt_ids"] for row in rows], "left", tokenizer, args.device)
    config = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    config |= {"max_new_tokens": args.response_length, "remove_invalid_values": True}
    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    policy.generation_config = transformers.GenerationConfig(**config)  # saved too: it samples as here
    with autocast(args):
        ids = policy.generate(input_ids=prompt_ids, attention_mask=prompt_mask.long())
    ids = ids[:, prompt_ids.shape[1] :]  # (N, R)
    is_eos = ids == tokenizer.eos_token_id
    mask = is_eos.cumsum(1) - is_eos.int() == 0  # up to the first EOS, by position: pad may be EOS
    batch = dict(zip(TOKENS, (prompt_ids, prompt_mask, ids, mask)))
    batch["ended"] = is_eos.any(1)  # (N,)
    batch["prompt"] = [row["prompt"] for row in rows]
    batch["response"] = [tokenizer.decode(y[m], skip_special_tokens=True) for y, m in zip(ids, mask)]
    return batch


@torch.no_grad()
def score_batch(batch, models, size, args):
    """Adds score, float64 (N,): r(x, y) less the missing-EOS penalty; and, (N, R) in nats, logp_old_tok,
    logp_ref_tok, entropy_tok, and kl_tok, the exact KL of the next-token distributions.

    By the forward pass of training, as the sampler's log-probs are not the same bits; `size` rows at a time.
    """
    policy, reference, score_fn = models
    parts = []
    for first in range(0, len(batch["response"]), size):
        part = {name: x[first : first + size] for name, x in batch.items()}
        tokens = [part[name] for name in TOKENS]
        with autocast(args):
            log_old = response_distributions(policy, *tokens, args.temperature)  # (n, R, V)
            log_ref = response_distributions(reference, *tokens, args.temperature)
            score = torch.as_tensor(score_fn(part), dtype=torch.float64, device=args.device).flatten()
        ids, outside = part["response_ids"].unsqueeze(-1), ~part["response_mask"]
        values = {"logp_old_tok": log_old.gather(-1, ids).squeeze(-1)}
        values["logp_ref_tok"] = log_ref.gather(-1, ids).squeeze(-1)
        values["entropy_tok"] = -(log_old.exp() * log_old).sum(-1)
        values["kl_tok"] = (log_old.exp() * (log_old - log_ref)).sum(-1)
        values = {name: x.masked_fill(outside, 0.0) for name, x in values.items()}
        values["score"] = torch.where(part["ended"], score, score - args.missing_eos_penalty)
        parts.append(values)
    return batch | {name: torch.cat([values[name] for values in parts]) for name in parts[0]}


def batch_metrics(batch, num_responses, beta):
    """Means of a scored batch: reward, objective (reward - beta kl), kl and kl_exact (nats) per response;
    reward_std and kl_std among responses; entropy (nats) and perplexity under the reference per token;
    response_length (tokens); eos_rate; frac_identical_pairs, of the pairs of responses to a prompt."""
    mask, tokens = batch["response_mask"], batch["response_mask"].sum()
    reward, kl = batch["score"], (batch["logp_old_tok"] - batch["logp_ref_tok"]).sum(1)  # (N,) each
    metrics = {"reward": reward.mean(), "objective": reward.mean() - beta * kl.mean(), "kl": kl.mean()}
    metrics |= {"reward_std": reward.std(correction=0), "kl_std": kl.std(correction=0)}
    metrics["kl_exact"] = batch["kl_tok"].sum(1).mean()
    metrics["entropy"] = batch["entropy_tok"].sum() / tokens
    metrics["perplexity"] = (-batch["logp_ref_tok"].sum() / tokens).exp()
    metrics |= {"response_length": tokens / len(mask), "eos_rate": batch["ended"].float().mean()}
    if num_responses > 1:
        ids = batch["response_ids"].masked_fill(~mask, -1).unflatten(0, (-1, num_responses))  # (B, K, R)
        i, j = torch.triu_indices(num_responses, num_responses, offset=1)
        metrics["frac_identical_pairs"] = (ids[:, i] == ids[:, j]).all(-1).float().mean()
    return {name: value.item() for name, value in metrics.items()}


def cost_metrics(batch, clock):
    """Seconds of each phase, from the clock around them; tokens per second; the GPU's peak memory."""
    phases = zip(("seconds_rollout", "seconds_score", "seconds_update"), clock, clock[1:])
    metrics = {name: end - start for name, start, end in phases}
    mask = batch["response_mask"]
    metrics["tokens_per_second"] = mask.sum().item() / (clock[-1] - clock[0])
    peak = torch.cuda.max_memory_allocated(mask.device) if mask.is_cuda else 0
    return metrics | {"peak_memory_gb": peak / 1e9}


def evaluate(step, models, held_out, tokenizer, args):
    """eval_ metrics on held-out prompts, always with the same seed; the texts go to samples_STEP.jsonl."""
    torch.manual_seed(args.seed * 10**6)
    batch = sample_batch(models[0], held_out, 1, tokenizer, args)
    batch = score_batch(batch, models, args.micro_batch_size, args)
    samples = zip(batch["prompt"], batch["response"], batch["score"].tolist())
    rows = [{"step": step, "prompt": x, "response": y, "reward": r} for x, y, r in samples]
    Path(args.output_dir, f"samples_{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {f"eval_{name}": value for name, value in batch_metrics(batch, 1, args.beta).items()}
    reached = f"reward {metrics['eval_reward']:.3f}, KL {metrics['eval_kl']:.2f} nats/response"
    tqdm.write(f"step {step}: {reached}, {metrics['eval_response_length']:.1f} tokens, on held-out prompts")
    return metrics


# ------------------------------------------------------------------------------- the run folder and failures
MAY_CHANGE = "steps", "save_every", "micro_batch_size", "device", "resume", "overwrite"  # on --resume
stop_signals = []


def require(condition, message, status=2):
    """If it does not hold, ends the run in one line: what is wrong; what to do. Status 2: input, 1: run."""
    if not condition:
        message = "".join(c if c.isprintable() else "?" for c in message)  # no text may drive the terminal
        print(f"error: {message}", file=sys.stderr)
        sys.exit(status)


@contextmanager
def explained(wrong, todo, status=2):
    """Whatever is raised inside ends the run in one line: each library raises kinds of its own."""
    try:
        yield
    except Exception as error:
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:200]
        require(False, f"{wrong} ({reason}); {todo}", status)


def check_args(args, may_be_zero):
    """Numbers in range, an output folder that is free or holds a run to go on with; sets the device."""
    for name, value in vars(args).items():
        zero = name in may_be_zero.split()
        good = type(value) not in (int, float) or 0 < value <= 1e9 or (value == 0 and zero)
        need = "at least 0" if zero else "above 0"
        require(good, f"--{name} {value} is out of range; give {need}, up to 1e9")
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    folder, todo = Path(args.output_dir), "choose another --output_dir"
    is_run = (folder / "args.json").exists()
    require(is_run or not any(folder.glob("*")), f"{folder} holds files but no run; {todo}")
    require(is_run or not args.resume, f"{folder} holds no run; leave out --resume")
    clear = not is_run or args.resume != args.overwrite
    require(clear, f"{folder} holds a run; give either --resume or --overwrite, or {todo}")
    for name in [name for name in ("model", "reward_model", "dataset") if hasattr(args, name)]:
        inside = Path(getattr(args, name)).resolve().is_relative_to(folder.resolve())
        require(not inside, f"--output_dir {folder} holds the input --{name}; {todo}")


def open_run(args, parts):
    """Makes the folder, or on --resume cuts its log back and loads the parts; takes over the signals.

    parts: {name: what has a state_dict}. Returns the steps done and the metrics of the last, or 0 and {}.
    """
    folder, path = Path(args.output_dir), Path(args.output_dir, "checkpoint.pt")
    checkpoint = {"step": 0, "metrics": {}, "log_size": 0}
    if args.resume and path.exists():
        with explained(f"cannot resume from {path}", "start again with --overwrite"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            done, before = checkpoint["step"], checkpoint["args"]
            for name in [name for name in vars(args) if name not in MAY_CHANGE]:
                was, now = before.get(name), getattr(args, name)
                require(was == now, f"--{name} was {was} and is now {now}; only {MAY_CHANGE[:4]} may change")
            fits = done < args.steps or done == args.steps == before["steps"]
            require(fits, f"{folder} has done {done} of {args.steps} steps; raise --steps")
            for name, part in parts.items():
                part.load_state_dict(checkpoint["parts"][name])
    with explained(f"cannot write to {folder}", "choose another --output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        if not checkpoint["metrics"]:  # no model and no text of an old run is taken for this one's
            for file in (path, folder / "config.json", *folder.glob("samples_*.jsonl")):
                file.unlink(missing_ok=True)
        (folder / "args.json").write_text(json.dumps({"args": vars(args)}, indent=2))
        with open(folder / "metrics.jsonl", "a") as log:
            log.truncate(min(log.tell(), checkpoint["log_size"]))
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return checkpoint["step"], checkpoint["metrics"]


def on_signal(number, frame):
    """Lets the step finish and save, and says so at once; the same signal again ends at once."""
    stop_signals.append(number)
    signal.signal(number, signal.SIG_DFL)
    os.write(2, b"stopping after this step, which will be saved\n")  # print could be what was interrupted


def end_step(args, step, metrics, parts, tokenizer):
    """Logs a step; saves when due, after the last, or when a signal asks to stop, and then exits.

    parts: as in open_run; the models among them are exported to the subfolders they are named by.
    """
    folder, stop = Path(args.output_dir), list(stop_signals)  # later signals wait for the next step
    due = args.save_every and step > 0 and step % args.save_every == 0
    with explained(f"cannot save step {step}", "make room, then --resume from the last checkpoint", 1):
        with open(folder / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"step": step} | metrics) + "\n")
        if due or stop or step == args.steps:
            state = {"step": step, "metrics": metrics, "args": vars(args)}
            state["log_size"] = (folder / "metrics.jsonl").stat().st_size
            state["parts"] = {name: part.state_dict() for name, part in parts.items()}
            for name in [x for x, part in parts.items() if isinstance(part, transformers.PreTrainedModel)]:
                parts[name].save_pretrained(folder / name)
                tokenizer.save_pretrained(folder / name)
            torch.save(state, folder / "checkpoint.pt.new")
            os.replace(folder / "checkpoint.pt.new", folder / "checkpoint.pt")  # last: now the rest is whole
    if stop:
        print(f"stopped after step {step} of {args.steps} and saved; go on with --resume", file=sys.stderr)
        sys.exit(128 + stop[0])


def guard(main, args_class):
    """Command line -> main(args). What a user can mend ends the run in one line, not in a traceback."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(60)  # above CRITICAL: what it reports as errors, we raise
    with explained("cannot read the command line", "see --help"):
        parser = transformers.HfArgumentParser(args_class, allow_abbrev=False, exit_on_error=False)
        (args,) = parser.parse_args_into_dataclasses(look_for_args_file=False)
    try:
        main(args)
    except KeyboardInterrupt:
        require(False, "interrupted; what was saved is kept", 130)
    except torch.OutOfMemoryError:
        require(False, "out of memory; lower --micro_batch_size, which may change on --resume, or lengths", 1)


# ------------------------------------------------------------------------------------------------------ main
def estimate_advantages(critic, batch, score, beta, args):
    """Adds value_old_tok, advantages and returns, (N, R), to the batch. Returns statistics over its tokens.

    advantage_mean, advantage_std: before whitening. explained_variance: share that V foresaw of the variance
    of the rewards still to come, discounted.
    """
    mask, size, values = batch["response_mask"], args.micro_batch_size * args.num_responses, []
    with torch.no_grad(), autocast(args):
        for first in range(0, len(mask), size):
            values.append(read_values(critic, *(batch[x][first : first + size] for x in TOKENS)))
    value = torch.cat(values)  # (N, R)
    reward_tok = token_rewards(score, batch["logp_old_tok"], batch["logp_ref_tok"], mask, beta)
    advantages, returns = gae(reward_tok, value, mask, args.gamma, args.lam)
    still_to_come = gae(reward_tok, value, mask, args.gamma, 1.0)[1]  # unlike the returns, free of V
    variance = masked_variance(still_to_come, mask).clamp(min=1e-12)
    unexplained = masked_variance(still_to_come - value, mask) / variance
    metrics = {"advantage_mean": masked_mean(advantages, mask), "explained_variance": 1 - unexplained}
    metrics["advantage_std"] = masked_variance(advantages, mask).sqrt()
    if args.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    if args.advantage_clip:
        advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)
    batch |= {"value_old_tok": value, "advantages": advantages.float(), "returns": returns.float()}
    return {name: x.item() for name, x in metrics.items()}


def losses(policy, critic, batch, rows, resting, args):
    """Loss of the policy, loss of the critic, and stats, all means over the tokens of these rows."""
    tokens, value_clip = [batch[x][rows] for x in TOKENS], args.value_clip_range or None
    mask, old, advantages = (batch[x][rows] for x in ("response_mask", "logp_old_tok", "advantages"))
    with autocast(args):
        with torch.set_grad_enabled(not resting):
            distributions = response_distributions(policy, *tokens, args.temperature)  # (n, R, V)
        value = read_values(critic, *tokens)
    new = distributions.gather(-1, batch["response_ids"][rows].unsqueeze(-1)).squeeze(-1)
    if args.policy_loss == "clip":
        loss, stats = ppo_clip_loss(new, old, advantages, mask, args.clip_range)
    else:
        loss, stats = ppo_penalty_loss(new, old, advantages, mask, args.penalty_coef)
    if args.entropy_coef:
        entropy = -(distributions.exp() * distributions).sum(-1)
        loss = loss - args.entropy_coef * masked_mean(entropy, mask)
    critic_loss = value_loss(value, batch["value_old_tok"][rows], batch["returns"][rows], mask, value_clip)
    return loss, critic_loss, stats | {"loss": loss.item(), "value_loss": critic_loss.item()}


def backward_demonstrations(policy, examples, tokenizer, args):
    """Adds the gradient of -ptx_coef E log pi(y_t | x, y_<t) on demonstrations. Returns E, nats per token."""
    tokens, total = sum(len(e["response_ids"][0]) for e in examples), 0.0
    for first in range(0, len(examples), args.micro_batch_size):
        micro = examples[first : first + args.micro_batch_size]
        prompts = pad([e["prompt_ids"] for e in micro], "left", tokenizer, args.device)
        responses = pad([e["response_ids"][0] for e in micro], "right", tokenizer, args.device)
        with autocast(args):
            mean_logp = response_logps(policy, *prompts, *responses, args.temperature).sum() / tokens
        (-args.ptx_coef * mean_logp).backward()
        total += mean_logp.item()
    return total


def update_models(models, optimizers, batch, minibatch, demonstrations, step, tokenizer, args):
    """An optimizer step of policy and critic on a minibatch of prompts, each with its K responses.

    Micro-batches weigh as much as they have tokens, so that they add up to the gradient of the minibatch.
    """
    K, total, largest = args.num_responses, defaultdict(float), 0.0
    resting = step <= args.critic_warmup_steps  # critic pretraining: no gradient of the policy
    tokens = batch["response_mask"].unflatten(0, (-1, K))[minibatch].sum()
    for prompts in minibatch.split(args.micro_batch_size):
        rows = (prompts.unsqueeze(1) * K + torch.arange(K)).flatten()
        share = (batch["response_mask"][rows].sum() / tokens).item()
        loss, critic_loss, stats = losses(*models, batch, rows, resting, args)
        ((loss + critic_loss) * share).backward()
        largest = max(largest, stats["log_ratio_max"])
        for name, value in stats.items():
            total[name] += value * share
    total["log_ratio_max"] = largest
    if args.ptx_coef:
        examples = [demonstrations[row] for row in torch.randint(len(demonstrations), (len(minibatch),))]
        if not resting:  # the examples are drawn in any case: the random numbers behind them stay the same
            total["ptx_logp"] = backward_demonstrations(models[0], examples, tokenizer, args)
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), args.max_grad_norm).item() for m in models]
    total["grad_norm"], total["critic_grad_norm"] = norms
    finite = math.isfinite(total["loss"] + total["value_loss"] + sum(norms))  # before it reaches the weights
    todo = f"lower --learning_rate in a new run; the last checkpoint, if any, in {args.output_dir} is good"
    require(finite, f"step {step} is not finite, {dict(total)}; {todo}", 1)
    for optimizer in optimizers:  # where there is no gradient it leaves the weights alone
        optimizer.step()
        optimizer.zero_grad()
    return total


def main(args):
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    may_be_zero = "beta lam penalty_coef value_clip_range reward_clip advantage_clip entropy_coef ptx_coef "
    may_be_zero += "critic_warmup_steps reward_shift missing_eos_penalty "
    check_args(args, may_be_zero + "seed micro_batch_size eval_every save_every")
    B, K = args.prompts_per_step, args.num_responses
    args.micro_batch_size = args.micro_batch_size or args.minibatch_size
    require(B % args.minibatch_size == 0, "--minibatch_size does not divide --prompts_per_step; alter it")
    require(args.gamma <= 1 and args.lam <= 1, "--gamma or --lam is above 1; give 0 to 1")
    both = args.normalize_reward and args.scale_reward
    require(not both, "--normalize_reward already scales; leave out --scale_reward")
    tokenizer = load_tokenizer(args.model)
    prompts = read_rows(args.dataset, ["train"], [], tokenizer, args)
    held_out = read_rows(args.dataset, ["validation", "test"], [], tokenizer, args, args.eval_prompts)
    demonstrations = args.ptx_coef and read_rows(args.ptx_dataset, ["train"], ["completion"], tokenizer, args)
    policy, reference = (load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
    models = policy, reference.requires_grad_(False), load_reward(tokenizer, args)
    critic = load_critic(tokenizer, args)
    scaled = args.normalize_reward or args.scale_reward
    normalizer = RunningNormalizer(args.normalize_reward, scaled, args.reward_clip or None)
    # delta(x) of --reward_shift, in multiples of 1/256: float64 adds it without rounding a difference.
    delta = torch.randn(len(prompts), 1, generator=torch.Generator().manual_seed(0)).double()
    delta = ((args.reward_shift * delta * 256).round() / 256).to(args.device)  # (rows, 1)
    settings = {"betas": (0.9, 0.95), "eps": 1e-5, "fused": True}
    trained, rates = (policy, critic), (args.learning_rate, args.critic_learning_rate)
    optimizers = [torch.optim.Adam(m.parameters(), lr, **settings) for m, lr in zip(trained, rates)]
    parts = {"": policy, "critic": critic, "optimizer": optimizers[0], "critic_optimizer": optimizers[1]}
    parts, start = parts | {"normalizer": normalizer}, time.perf_counter()
    done, metrics = open_run(args, parts)
    if not metrics:
        metrics = evaluate(0, models, held_out, tokenizer, args)
        end_step(args, 0, metrics, parts, tokenizer)

    bar = tqdm(range(done + 1, args.steps + 1), "ppo", args.steps, initial=done, disable=None)
    for step in bar:
        torch.manual_seed(args.seed * 10**6 + step)  # every step draws afresh: no random state to save
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * (1 - (step - 1) / args.steps)
        # 1. Sample K responses to each of B prompts from pi_old.
        clock = [time.perf_counter()]
        numbers = data_order(len(prompts), B, step, args.seed)
        batch = sample_batch(policy, [prompts[number] for number in numbers], K, tokenizer, args)
        clock.append(time.perf_counter())
        # 2. Score them. Token rewards from the (normalised) scores and the KL; values; advantages, returns.
        batch = score_batch(batch, models, args.micro_batch_size * K, args)
        beta = metrics.get("beta", args.beta)  # metrics: still of the step before
        if args.kl_target and step > args.critic_warmup_steps + 1:
            beta = adaptive_beta(beta, metrics["kl_exact"], args.kl_target, args.kl_horizon, B * K)
        metrics = batch_metrics(batch, K, args.beta) | {"beta": beta}
        score = normalizer((batch["score"].view(B, K) + delta[numbers]).flatten())  # (N,)
        metrics |= estimate_advantages(critic, batch, score, beta, args)
        clock.append(time.perf_counter())
        # 3. Climb the PPO objective and fit the critic to the returns: epochs of minibatches.
        updates = []
        for _ in range(args.epochs):
            for minibatch in torch.randperm(B).split(args.minibatch_size):
                settings = batch, minibatch, demonstrations, step, tokenizer, args
                updates.append(update_models(trained, optimizers, *settings))
        clock.append(time.perf_counter())
        # 4. Log, evaluate, save; pi_old is now the policy just trained.
        metrics |= {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        metrics["log_ratio_max"] = max(u["log_ratio_max"] for u in updates)
        metrics["log_ratio_first"] = updates[0]["log_ratio_max"]  # 0 up to rounding: nothing was updated yet
        metrics |= cost_metrics(batch, clock)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", kl=f"{metrics['kl']:.2f}")
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate(step, models, held_out, tokenizer, args)
        end_step(args, step, metrics, parts, tokenizer)
    reached = f"reward {metrics['eval_reward']:.3f} at KL {metrics['eval_kl']:.2f} nats/response"
    minutes = (time.perf_counter() - start) / 60
    print(f"{args.output_dir}: {reached} on held-out prompts; {args.steps} steps, {minutes:.1f} minutes")


if __name__ == "__main__":
    guard(main, Args)
