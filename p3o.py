"""Stage 3: P3O, Pairwise Proximal Policy Optimization (Wu et al. 2023, arXiv:2310.00212, [P3O] below).

    python p3o.py     the embedded task, after toy.py, sft.py and reward_model.py; other models: README.md

ends, on two x86 cores, with
    out/p3o: reward 2.400 at KL 1.23 nats/response on held-out prompts; 60 steps, 0.4 minutes

P3O samples K >= 2 responses to a prompt and learns from the differences of their rewards alone. Preferences
fix a reward only up to an offset per prompt; differences do not see that offset, and no critic learns it.

    trajectory reward         R = r - beta log(pi_old / pi_SFT)               trajectory_reward
    pairwise policy gradient  E (R1 - R2) grad log(pi(y1) / pi(y2)) / 2       pairwise_policy_gradient_loss
    P3O-V1                    rho_1 and rho_2 clipped separately              p3o_loss(clipping="separate")
    P3O-V2                    log(pi(y1) / pi(y2)) clipped                    p3o_loss(clipping="joint")

Departures from [P3O]: K > 2 responses use all pairs. V2's d is centred by its value under pi_old: same
gradient. Each importance ratio is held within exp(+-20), so V2's rho_1 rho_2 within exp(+-40): float32 stays
finite. A response cut off without EOS loses --missing_eos_penalty. --max_importance_weight comes from the
first author's code and is off by default. --clipping none is the plain pairwise gradient, without importance
weight: after the first optimizer step on a batch it is not the gradient at the current policy any more.

Legend: B prompts, K responses to each, N = B * K rows; P prompt length, R response length, V vocabulary.
Prompts are padded on the left, responses on the right. Masks are boolean, True counts. Logs are in nats.
score is r, reward is R(x, y), not the size R; the logged "reward" is the mean score.
"""

import json
import math
import os
import signal
import sys
import time
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
    output_dir: str = flag("out/p3o", "folder of this run")
    seed: int = flag(0, "of data order and sampling")
    device: str = flag("auto", "auto (cuda when there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16: autocast, over float32 weights")
    learning_rate: float = flag(3e-4, "Adam, falls linearly to 0; 1e-6 to 1e-5 for pretrained models")
    steps: int = flag(60, "rollouts in all; raised on --resume, the decay stretches: the rate jumps up")
    prompts_per_step: int = flag(64, "B, prompts per rollout")
    num_responses: int = flag(2, "K, responses per prompt; all K (K - 1) / 2 pairs are used")
    epochs: int = flag(2, "passes over each rollout; 1 to 4")
    minibatch_size: int = flag(32, "prompts per optimizer step, each with all its responses")
    micro_batch_size: int = flag(0, "prompts per pass of scoring and training; 0: the minibatch")
    beta: float = flag(0.5, "weight of the KL to the SFT model; 0.05 for HH in the author's code")
    clipping: Literal["joint", "separate", "none"] = flag("joint", "P3O-V2, V1, or plain pairwise gradient")
    clip_range: float = flag(0.2, "epsilon: of rho (V1), of the difference of log rho in nats (V2)")
    max_importance_weight: float | None = flag(None, "c: weights held in [1/c, c]; author's code: 10")
    reward_shift: float = flag(0.0, "times a fixed normal offset per prompt, on scores but not in logs")
    missing_eos_penalty: float = flag(1.0, "off the score of a response cut off without EOS")
    temperature: float = flag(1.0, "divides the logits, when sampling and in every log-prob")
    prompt_length: int = flag(32, "tokens; longer prompts are left out and counted")
    response_length: int = flag(24, "tokens sampled at most, EOS included")
    max_grad_norm: float = flag(1.0, "global gradient-norm clip")
    eval_every: int = flag(20, "steps between evaluations; 0: only before and after")
    eval_prompts: int = flag(256, "held-out prompts of an evaluation")
    save_every: int = flag(20, "steps between checkpoints; 0: only the last")
    resume: bool = flag(False, "go on; steps, save_every, micro_batch_size, device may differ")
    overwrite: bool = flag(False, "replace the run in output_dir")


# ------------------------------------------------------------------------------------------- the mathematics
def trajectory_reward(score, logp_old_seq, logp_ref_seq, beta):
    """R(x, y) = r(x, y) - beta log(pi_old(y|x) / pi_SFT(y|x)), one number per response [P3O, sec. 4].

    All (B, K), log-probs in nats per response. float64 scores give float64 rewards.
    """
    return score - beta * (logp_old_seq - logp_ref_seq)


def pairwise_policy_gradient_loss(logp_new_seq, reward):
    """-(R1 - R2) (log pi(y1|x) - log pi(y2|x)) / 2: its gradient is minus the PPG [P3O, Theorem 1].

    logp_new_seq (nats per response), reward: (B, K). Mean over prompts and all pairs of responses, which must
    come from the current policy. Equals REINFORCE leave-one-out. ValueError if K < 2 or shapes differ.
    """
    if logp_new_seq.shape != reward.shape or reward.dim() != 2 or reward.shape[1] < 2:
        raise ValueError(f"expected (B, K), K >= 2: {tuple(logp_new_seq.shape)}, {tuple(reward.shape)}")
    i, j = torch.triu_indices(reward.shape[1], reward.shape[1], offset=1, device=reward.device)  # pairs i < j
    difference = (reward[:, i] - reward[:, j]).detach().to(logp_new_seq.dtype)  # (B, pairs)
    return -(difference * (logp_new_seq[:, i] - logp_new_seq[:, j]) / 2).mean()


def p3o_loss(
    logp_new_seq, logp_old_seq, reward, clip_range=0.2, clipping="joint", max_importance_weight=None
):
    """Minus the P3O objective, V1 (clipping="separate") or V2 (clipping="joint") [P3O, sec. 4].

    V1:  A_i = sg[(R_i - R_-i) rho_-i]      -sum_i min(A_i rho_i, A_i clip(rho_i, 1 - eps, 1 + eps)) / 2
    V2:  w = sg[(R_1 - R_2) rho_1 rho_2]    -min(w d, w clip(d, -eps, eps)) / 2,    d = log rho_1 - log rho_2
    The paper's d is log(pi(y1) / pi(y2)); less its value under pi_old it starts at 0, with the same gradient.

    logp_new_seq, logp_old_seq (nats per response), reward: (B, K). Mean over prompts and pairs of responses.
    max_importance_weight: c, the weight rho_1 rho_2 (V1: rho_-i) is held in [1/c, c]; None: it is not.
    Returns the loss and {"clip_fraction": share of terms whose gradient the clip removed, "log_ratio_max":
    max |log rho|}. ValueError if K < 2, shapes differ, c < 1 or clipping is neither of the two.
    """
    if max_importance_weight is not None and max_importance_weight < 1:
        raise ValueError(f"max_importance_weight is {max_importance_weight}, not at least 1")
    shapes = [tuple(x.shape) for x in (logp_new_seq, logp_old_seq, reward)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][1] < 2:
        raise ValueError(f"expected three of (B, K), K >= 2: {shapes}")
    i, j = torch.triu_indices(reward.shape[1], reward.shape[1], offset=1, device=reward.device)  # pairs i < j
    difference = (reward[:, i] - reward[:, j]).detach().to(logp_new_seq.dtype)  # R_i - R_j, (B, pairs)
    log_rho = logp_new_seq - logp_old_seq  # (B, K)
    # Only the value is held: a ratio that far out still needs its gradient, to be pulled back.
    held = log_rho + (log_rho.clamp(-20, 20) - log_rho).detach()
    bound = math.log(max_importance_weight or math.inf)
    if clipping == "separate":
        weight = held.detach().clamp(-bound, bound).exp()  # (B, K)
        a = torch.cat([difference * weight[:, j], -difference * weight[:, i]], 1)  # (B, 2 pairs)
        rho = held[:, torch.cat([i, j])].exp()
        unclipped, clipped = a * rho, a * rho.clamp(1 - clip_range, 1 + clip_range)
    elif clipping == "joint":
        weight = (held[:, i] + held[:, j]).detach().clamp(-bound, bound).exp()
        w = difference / 2 * weight  # (B, pairs)
        d = log_rho[:, i] - log_rho[:, j]
        unclipped, clipped = w * d, w * d.clamp(-clip_range, clip_range)
    else:
        raise ValueError(f"clipping must be 'joint' or 'separate', got {clipping!r}")
    stats = {"clip_fraction": (clipped < unclipped).float().mean().item()}
    stats["log_ratio_max"] = log_rho.detach().abs().max().item()
    return -torch.minimum(unclipped, clipped).mean(), stats


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


def read_score(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """r(x, y): the score head read at the last response token, by position: pad may be EOS. (N,), float32."""
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.float()  # (N, P + R, D)
    with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would round scores by up to 1%
        values = model.score(hidden[:, prompt_ids.shape[1] - 1 :]).squeeze(-1)  # (N, 1 + R)
    return values.gather(1, response_mask.sum(1, keepdim=True)).squeeze(1)


# ------------------------------------------------------------------------------------------- data and models
LEAST_SHARE = 0.1  # of the rows must be within the length limits


def read_prompts(name, splits, tokenizer, args, limit=None):
    """[{"prompt": text, "prompt_ids": [...]}, ...] of the first of `splits` there is; text as it stands."""
    todo = f"python data.py --dataset {name} --model {args.model} --output_dir data/NAME makes it readable"
    with explained(f"cannot read data set {name!r}", todo):
        data = datasets.load_dataset(name)
        split = next((split for split in splits if split in data), splits[0])
        texts = data[split]["prompt"][:]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [{"prompt": text, "prompt_ids": x} for text, x in zip(texts, ids)]
    rows = [row for row in rows if 0 < len(row["prompt_ids"]) <= args.prompt_length]
    used = f"{name} [{split}]: {len(rows)} of {len(texts)} prompts are within --prompt_length"
    require(len(rows) > LEAST_SHARE * len(texts), f"{used} {args.prompt_length}; raise it")
    print(used if 2 * len(rows) > len(texts) else f"warning, less than half: {used}", flush=True)
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
def update_policy(policy, optimizer, batch, reward, minibatch, step, args):
    """An optimizer step on a minibatch of prompts, each with its K responses, in micro-batches."""
    K, total = reward.shape[1], {"loss": 0.0, "clip_fraction": 0.0, "log_ratio_max": 0.0}
    for prompts in minibatch.split(args.micro_batch_size):
        rows = (prompts.unsqueeze(1) * K + torch.arange(K)).flatten()
        with autocast(args):
            logp_new_tok = response_logps(policy, *(batch[x][rows] for x in TOKENS), args.temperature)
        logp_new_seq = logp_new_tok.sum(1).view(-1, K)
        logp_old_seq = batch["logp_old_tok"][rows].sum(1).view(-1, K)
        if args.clipping == "none":
            loss, stats = pairwise_policy_gradient_loss(logp_new_seq, reward[prompts]), {"clip_fraction": 0.0}
            stats["log_ratio_max"] = (logp_new_seq - logp_old_seq).detach().abs().max().item()
        else:
            settings = args.clip_range, args.clipping, args.max_importance_weight
            loss, stats = p3o_loss(logp_new_seq, logp_old_seq, reward[prompts], *settings)
        share = len(prompts) / len(minibatch)
        (loss * share).backward()
        total["loss"] += loss.item() * share
        total["clip_fraction"] += stats["clip_fraction"] * share
        total["log_ratio_max"] = max(total["log_ratio_max"], stats["log_ratio_max"])
    total["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).item()
    finite = math.isfinite(total["loss"] + total["grad_norm"])  # before it reaches the weights
    todo = f"lower --learning_rate in a new run; the last checkpoint, if any, in {args.output_dir} is good"
    require(finite, f"step {step} is not finite, {dict(total)}; {todo}", 1)
    optimizer.step()
    optimizer.zero_grad()
    return total


def main(args):
    check_args(args, "seed micro_batch_size beta reward_shift missing_eos_penalty eval_every save_every")
    B, K, c = args.prompts_per_step, args.num_responses, args.max_importance_weight
    args.micro_batch_size = args.micro_batch_size or args.minibatch_size
    require(K >= 2, "--num_responses is 1; P3O learns from pairs of responses, give 2 or more")
    require(c is None or c >= 1, f"--max_importance_weight {c} is below 1; weights are held in [1/c, c]")
    require(B % args.minibatch_size == 0, "--minibatch_size does not divide --prompts_per_step; alter it")
    tokenizer = load_tokenizer(args.model)
    prompts = read_prompts(args.dataset, ["train"], tokenizer, args)
    held_out = read_prompts(args.dataset, ["validation", "test"], tokenizer, args, args.eval_prompts)
    policy, reference = (load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
    models = policy, reference.requires_grad_(False), load_reward(tokenizer, args)
    # delta(x) of --reward_shift, in multiples of 1/256: float64 adds it without rounding a difference.
    delta = torch.randn(len(prompts), 1, generator=torch.Generator().manual_seed(0)).double()
    delta = ((args.reward_shift * delta * 256).round() / 256).to(args.device)  # (rows, 1)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.95), eps=1e-5, fused=True)
    parts, start = {"": policy, "optimizer": optimizer}, time.perf_counter()
    done, metrics = open_run(args, parts)
    if not metrics:
        metrics = evaluate(0, models, held_out, tokenizer, args)
        end_step(args, 0, metrics, parts, tokenizer)

    bar = tqdm(range(done + 1, args.steps + 1), "p3o", args.steps, initial=done, disable=None)
    for step in bar:
        torch.manual_seed(args.seed * 10**6 + step)  # every step draws afresh: no random state to save
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (step - 1) / args.steps)
        # 1. Sample K responses to each of B prompts from pi_old.
        clock = [time.perf_counter()]
        numbers = data_order(len(prompts), B, step, args.seed)
        batch = sample_batch(policy, [prompts[number] for number in numbers], K, tokenizer, args)
        clock.append(time.perf_counter())
        # 2. Score them: trajectory rewards, in float64.
        batch = score_batch(batch, models, args.micro_batch_size * K, args)
        score = batch["score"].view(B, K) + delta[numbers]
        logp_old_seq = batch["logp_old_tok"].sum(1).view(B, K)
        logp_ref_seq = batch["logp_ref_tok"].sum(1).view(B, K)
        reward = trajectory_reward(score, logp_old_seq, logp_ref_seq, args.beta)  # (B, K)
        metrics = batch_metrics(batch, K, args.beta)
        clock.append(time.perf_counter())
        # 3. Climb the pairwise objective: epochs of minibatches, the responses to a prompt always together.
        updates = []
        for _ in range(args.epochs):
            for minibatch in torch.randperm(B).split(args.minibatch_size):
                updates.append(update_policy(policy, optimizer, batch, reward, minibatch, step, args))
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
