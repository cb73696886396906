"""P3O, Pairwise Proximal Policy Optimization (Wu et al. 2023, arXiv:2310.00212, cited as [P3O]).

P3O samples K responses to each prompt and learns only from the differences between their rewards. Preference
data determine a reward only up to an offset per prompt. In the differences that offset cancels, so P3O needs
no critic to learn it.

    python toy.py && python sft.py && python reward_model.py    # the stages before this one
    python p3o.py                                               # a minute on one CPU core; its last line:
    out/p3o, step 60: gain 2.03 over the SFT model, reward 2.104 at KL 1.26 nats/response on held-out prompts

    trajectory reward         R = r - beta log(pi_old / pi_SFT)             trajectory_reward
    pairwise policy gradient  E[(R1 - R2) grad log(pi(y1) / pi(y2))] / 2    pairwise_policy_gradient_loss
    P3O-V1                    rho_1 and rho_2 are clipped separately        p3o_loss(clipping="separate")
    P3O-V2                    the change of log(pi(y1) / pi(y2)) is clipped p3o_loss(clipping="joint")

Read "the mathematics" first, then update_policy and train_step at the end. ALGORITHM.md derives the losses.
ALGORITHM.md also explains the departures from the paper: all pairs of K > 2 responses are used, V2 clips
its d around 0, log rho is clamped, and a response that is cut off before EOS loses --missing_eos_penalty.

Notation: B prompts, K responses per prompt, N = B * K rows, P prompt length, R response length, V vocabulary.
Prompts are padded on the left and responses on the right. Masks are boolean and True for real tokens. In
tensors, `score` is the paper's r and `reward` is its R. In logs and models, "reward" means r.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    model: str = flag("out/sft", "SFT model: the policy starts from it, and the KL is measured against it")
    reward_model: str = flag("out/reward_model", "sequence-classification model with one label")
    dataset: str = flag("data/toy/prompts", "hub name or folder of .jsonl with a column prompt; see data.py")
    output_dir: str = flag("out/p3o", "folder for the trained model, the logs and the checkpoint")
    seed: int = flag(0, "seed of the data order and of sampling")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16 is autocast: weights stay in float32")
    learning_rate: float = flag(3e-4, "Adam's rate, which falls linearly; 1e-6 to 3e-5 for pretrained models")
    steps: int = flag(60, "number of training steps; if --resume raises it, the learning rate jumps up")
    prompts_per_step: int = flag(64, "B, prompts to sample responses to in each step")
    num_responses: int = flag(2, "K, responses per prompt; all K (K - 1) / 2 pairs are used")
    epochs: int = flag(2, "passes over the responses of a step, usually 1 to 4")
    minibatch_size: int = flag(32, "prompts per optimizer step, each with all its responses")
    micro_batch_size: int = flag(32, "prompts per forward and backward pass; a lower number saves memory")
    beta: float = flag(0.5, "weight of the KL to the SFT model; 0.05 for HH-RLHF in the authors' code")
    clipping: Literal["joint", "separate", "none"] = flag("joint", "P3O-V2, V1, or neither clip nor weights")
    clip_range: float = flag(0.2, "epsilon, for rho (separate) or for a difference of log rho (joint)")
    max_importance_weight: float | None = flag(None, "c, to clamp weights to [1/c, c]; the authors use 10")
    reward_shift: float = flag(0.0, "size of a random offset per prompt, which should change nothing")
    missing_eos_penalty: float = flag(1.0, "number subtracted from the score of a response without EOS")
    temperature: float = flag(1.0, "number that divides the logits, in sampling and in every log-prob")
    prompt_length: int = flag(32, "longest prompt in tokens; longer ones are left out")
    response_length: int = flag(24, "maximum number of sampled tokens, EOS included")
    max_grad_norm: float = flag(1.0, "largest norm of the gradient; a longer gradient is scaled down to it")
    eval_every: int = flag(20, "steps between evaluations; there is one at step 0 and at the end")
    eval_prompts: int = flag(256, "number of held-out prompts to evaluate on")
    save_every: int = flag(20, "steps between checkpoints; there is one at step 0 and at the end")
    resume: bool = flag(False, "continue from the last checkpoint; most flags must stay the same")
    overwrite: bool = flag(False, "start again in an output_dir that already holds a run")


# ------------------------------------------------------------------------------------------- the mathematics
def trajectory_reward(score, logp_old_seq, logp_ref_seq, beta):
    """R(x, y) = r(x, y) - beta log(pi_old(y|x) / pi_SFT(y|x)), one number per response [P3O, sec. 4].

    All arguments are (B, K), and the log-probs are in nats per response. beta is typically 0.05 to 1.
    """
    return score - beta * (logp_old_seq - logp_ref_seq)


def pairwise_policy_gradient_loss(logp_new_seq, reward):
    """-(R1 - R2) (log pi(y1|x) - log pi(y2|x)) / 2. Its gradient is minus the pairwise one [P3O, Theorem 1].

    logp_new_seq (nats per response) and reward are (B, K), K >= 2. The loss is a scalar, the mean over
    prompts and pairs. The gradient is that of RLOO. It is unbiased if the current policy gave the responses.
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
    Here rho = pi / pi_old, -i is the other response of the pair, and sg stops the gradient. The paper's d is
    log(pi(y1) / pi(y2)). Here its value under pi_old is subtracted, which keeps the gradient the same.

    logp_new_seq, logp_old_seq (nats per response) and reward are (B, K). The loss is a scalar, the mean over
    prompts and pairs of responses. max_importance_weight, c, clamps the weight rho_1 rho_2 (V1: rho_-i) to
    [1/c, c]. log rho is clamped to [-20, 20] so that float32 stays finite; beyond that, no gradient flows.
    Returns the loss and {"clip_fraction": share of terms whose gradient the clip removed, "log_ratio_max":
    max |log rho|}. Raises ValueError if K < 2, shapes differ, c < 1, or clipping is neither of the two.
    """
    if max_importance_weight is not None and max_importance_weight < 1:
        raise ValueError(f"max_importance_weight is {max_importance_weight}, not at least 1")
    shapes = [tuple(tensor.shape) for tensor in (logp_new_seq, logp_old_seq, reward)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][1] < 2:
        raise ValueError(f"expected three of (B, K), K >= 2: {shapes}")
    if clipping not in ("joint", "separate"):
        raise ValueError(f"clipping must be 'joint' or 'separate', got {clipping!r}")
    i, j = torch.triu_indices(reward.shape[1], reward.shape[1], offset=1, device=reward.device)  # pairs i < j
    difference = (reward[:, i] - reward[:, j]).detach().to(logp_new_seq.dtype)  # R_i - R_j: (B, pairs)
    log_rho = (logp_new_seq - logp_old_seq).clamp(-20, 20)  # (B, K)
    log_c = math.log(max_importance_weight or math.inf)  # None: no clamp
    if clipping == "separate":
        weight = log_rho.detach().clamp(-log_c, log_c).exp()  # (B, K)
        advantage = torch.cat([difference * weight[:, j], -difference * weight[:, i]], 1)  # A: (B, 2 pairs)
        rho = log_rho[:, torch.cat([i, j])].exp()  # no / 2: the mean is over two terms per pair
        unclipped, clipped = advantage * rho, advantage * rho.clamp(1 - clip_range, 1 + clip_range)
    else:
        weight = (log_rho[:, i] + log_rho[:, j]).detach().clamp(-log_c, log_c).exp()  # (B, pairs)
        w = difference * weight
        d = log_rho[:, i] - log_rho[:, j]
        unclipped, clipped = w * d / 2, w * d.clamp(-clip_range, clip_range) / 2
    stats = {"clip_fraction": (clipped < unclipped).float().mean().item()}
    stats["log_ratio_max"] = (logp_new_seq - logp_old_seq).detach().abs().max().item()
    return -torch.minimum(unclipped, clipped).mean(), stats


# -------------------------------------------------------------------------------------- tokens and log-probs
# The functions from here to the main section are the same text in every training script that has them.
def model_inputs(prompt_ids, prompt_mask, response_ids, response_mask):
    """Joins prompts and responses. Positions count real tokens only, so that padding shifts nothing."""
    ids = torch.cat([prompt_ids, response_ids], 1)  # (N, P + R)
    mask = torch.cat([prompt_mask, response_mask], 1).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def response_logps(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature=1.0):
    """log pi(y_t | x, y_<t) in nats: (N, R), float32, 0 where response_mask is False. Gradients flow.

    Prompts (N, P) are padded on the left and responses (N, R) on the right. Masks are boolean.
    """
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    keep = response_ids.shape[1] + 1  # the last prompt token predicts the first response token
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
    logps = torch.log_softmax(logits.float() / temperature, -1)  # (N, R, V)
    return logps.gather(-1, response_ids.unsqueeze(-1)).squeeze(-1).masked_fill(~response_mask, 0.0)


def read_score(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """r(x, y), the output of the score head at the last token of each response: (N,), float32."""
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.float()  # (N, P + R, D)
    with torch.autocast(hidden.device.type, enabled=False):  # a bfloat16 head would round scores by up to 1%
        scores = model.score(hidden[:, prompt_ids.shape[1] - 1 :]).squeeze(-1)  # (N, 1 + R)
    return scores.gather(1, response_mask.sum(1, keepdim=True)).squeeze(1)  # by count: the pad id may be EOS


def token_rows(batch, rows):
    """Selects rows of a batch and returns its token tensors as keyword arguments for the functions above."""
    names = "prompt_ids", "prompt_mask", "response_ids", "response_mask"
    return {name: batch[name][rows] for name in names}


# ------------------------------------------------------------------------------------------- data and models
def check(condition, message):
    """Ends the program with a one-line error message if the condition does not hold."""
    if not condition:
        sys.exit(f"error: {message}")


def load_tokenizer(args):
    """Loads the model's tokenizer and checks that its EOS is the token that ends a turn in the data set."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # safe: masks do not depend on it
    eos, record = tokenizer.eos_token, Path(args.dataset, "data.json")  # data.py writes this file
    end = json.loads(record.read_text())["eos_token"] if record.exists() else eos
    suitable = eos == end and eos and len(tokenizer) > 1  # without its files it has length 1
    check(suitable, f"{args.model} has EOS {eos!r}, {args.dataset} has {end!r}; run sft.py first")
    return tokenizer


def read_prompts(splits, tokenizer, args):
    """Reads {"prompt": text, "prompt_ids": tokens} of the first of these splits that the data set has."""
    if Path(args.dataset).is_dir():  # load_dataset would cache local files and might return an older version
        files = {file.stem: file.open(encoding="utf-8") for file in Path(args.dataset).glob("*.jsonl")}
        data = {split: [json.loads(line) for line in file] for split, file in files.items()}
    else:
        data = datasets.load_dataset(args.dataset)
    split = next((split for split in splits if split in data), None)
    readable = split and data[split] and "prompt" in data[split][0]
    check(readable, f"{args.dataset} has no column 'prompt' in a split {splits}; make it with data.py")
    texts = [row["prompt"] for row in data[split]]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [{"prompt": t, "prompt_ids": x} for t, x in zip(texts, ids) if 0 < len(x) <= args.prompt_length]
    print(f"{args.dataset} ({split}): {len(rows)} of {len(texts)} prompts fit --prompt_length", flush=True)
    check(rows, f"no prompt is as short as --prompt_length {args.prompt_length}; raise it")
    return rows


def data_order(num_rows, size, step, seed):
    """The row numbers of one step, from 1 on. Passes are shuffled by seeds, so there is no state to save."""
    first, last = (step - 1) * size // num_rows, (step * size - 1) // num_rows  # the passes it touches
    generators = [torch.Generator().manual_seed(seed * 10**6 + i) for i in range(first, last + 1)]
    order = torch.cat([torch.randperm(num_rows, generator=generator) for generator in generators])
    return order[(step - 1) * size - first * num_rows :][:size].tolist()


def load_model(auto_class, name, tokenizer, args, may_lack=(), **options):
    """Loads a model in float32 and in eval mode: with dropout the first importance ratio would not be 1."""
    model, info = auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    lacking = sorted(set(info["missing_keys"]) - set(may_lack))
    lacking += ["score.weight"] if "num_labels" in options and not hasattr(model, "score") else []
    check(not lacking, f"{name} lacks the weights {lacking[:3]}; give a model that has them")
    other_heads = ("lm_head.", "embed_out.") if "num_labels" in options else ()
    unread = [key for key in info["unexpected_keys"] if not key.startswith(other_heads)]
    unread += [file.name for file in Path(name).glob("adapter_config.json")]
    check(not unread, f"{name} holds {unread[:3]}, which would be ignored; give a model without them")
    rows, highest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    check(highest < rows, f"{name} has {rows} embeddings, too few for token id {highest}; resize them")
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    fitting = args.prompt_length + args.response_length <= limit
    check(fitting, f"{name} takes at most {limit} tokens; lower --prompt_length or --response_length")
    return model.eval().to(args.device)


def load_reward(tokenizer, args):
    """The reward r(x, y): a function from a batch to N scores. Replace it to use a reward of your own."""
    model = load_model(AutoModelForSequenceClassification, args.reward_model, tokenizer, args, num_labels=1)
    matches = AutoTokenizer.from_pretrained(args.reward_model).get_vocab() == tokenizer.get_vocab()
    check(matches, f"{args.reward_model} has another tokenizer; see 'Your own reward' in README.md")
    num_ids = transformers.AutoConfig.from_pretrained(args.model).vocab_size  # ids the policy can sample
    check(num_ids <= model.config.vocab_size, f"{args.reward_model} needs {num_ids} embeddings; resize them")
    model.requires_grad_(False)
    return lambda batch: read_score(model, **token_rows(batch, slice(None)))


# --------------------------------------------------------------------------- rollout, metrics and evaluation
def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


@torch.no_grad()
def sample_batch(policy, rows, num_responses, tokenizer, args):
    """Samples K responses to each of B prompts. Returns a batch: a dict of tensors and lists of N rows."""
    rows = [row for row in rows for _ in range(num_responses)]
    prompt_ids = {"input_ids": [row["prompt_ids"] for row in rows]}
    prompt = tokenizer.pad(prompt_ids, padding_side="left", return_tensors="pt").to(args.device)
    with autocast(args):  # main has set the temperature and the length in policy.generation_config
        ids = policy.generate(**prompt)[:, prompt["input_ids"].shape[1] :]  # (N, R)
    is_eos = ids == tokenizer.eos_token_id
    mask = is_eos.cumsum(1) - is_eos.int() == 0  # True up to and including the first EOS
    batch = {"prompt_ids": prompt["input_ids"], "prompt_mask": prompt["attention_mask"].bool()}  # (N, P)
    batch |= {"response_ids": ids, "response_mask": mask, "ended": is_eos.any(1)}  # (N, R), (N, R), (N,)
    batch["prompt"] = [row["prompt"] for row in rows]
    batch["response"] = [tokenizer.decode(y[m], skip_special_tokens=True) for y, m in zip(ids, mask)]
    return batch


def compute_scores(reward_function, batch):
    """Calls the reward function, checks that it gives N finite numbers, and returns them as a list."""
    scores = reward_function(batch)
    scores = scores.tolist() if hasattr(scores, "tolist") else scores
    complete = isinstance(scores, list) and len(scores) == len(batch["response"])
    check(complete, f"the reward is {scores!r:.50}; return a list of one number for each response")
    for score, response in zip(scores, batch["response"]):
        finite = hasattr(score, "__float__") and math.isfinite(score)
        check(finite, f"the reward of the response {response!r:.60} is {score!r}; return a finite number")
    return scores


@torch.no_grad()
def score_batch(batch, policy, reference, reward_function, args):
    """Adds score (N,), logp_old_tok and logp_ref_tok (N, R). float64 lets offsets of the score cancel."""
    scores, logp_old, logp_ref = [], [], []
    size = args.micro_batch_size * args.num_responses
    for first in range(0, len(batch["prompt"]), size):
        part = {name: values[first : first + size] for name, values in batch.items()}
        tokens = token_rows(part, slice(None))
        with autocast(args):
            logp_old.append(response_logps(policy, **tokens, temperature=args.temperature))
            logp_ref.append(response_logps(reference, **tokens, temperature=args.temperature))
            scores += compute_scores(reward_function, part)
    batch["score"] = torch.tensor(scores, dtype=torch.float64, device=args.device)
    batch["score"] -= args.missing_eos_penalty * ~batch["ended"]
    batch["logp_old_tok"], batch["logp_ref_tok"] = torch.cat(logp_old), torch.cat(logp_ref)


def batch_metrics(batches):
    """Means over scored batches. KL (nats per response) and entropy (nats per token) are sample estimates."""
    parts = []
    for batch in batches:
        old, ref = batch["logp_old_tok"].sum(1), batch["logp_ref_tok"].sum(1)
        parts.append(torch.stack([batch["score"], old, ref, batch["response_mask"].sum(1), batch["ended"]]))
    score, logp_old, logp_ref, length, ended = torch.cat(parts, 1).mean(1).tolist()  # parts: (5, N) each
    metrics = {"reward": score, "kl": logp_old - logp_ref, "entropy": -logp_old / length}
    return metrics | {"response_length": length, "eos_rate": ended}


def evaluate(step, policy, reference, reward_function, held_out, tokenizer, args):
    """Metrics on the held-out prompts, always with the same seed. Writes the texts to samples_STEP.jsonl."""
    torch.manual_seed(args.seed * 10**6)
    batches, folder = [], Path(args.output_dir)
    for rows in (held_out[first : first + 128] for first in range(0, len(held_out), 128)):
        batches.append(sample_batch(policy, rows, 1, tokenizer, args))
        score_batch(batches[-1], policy, reference, reward_function, args)
    texts = [row for b in batches for row in zip(b["prompt"], b["response"], b["score"].tolist())]
    lines = [json.dumps(dict(zip(("prompt", "response", "reward"), row))) + "\n" for row in texts]
    (folder / f"samples_{step}.jsonl").write_text("".join(lines))
    metrics = {f"eval_{name}": value for name, value in batch_metrics(batches).items()}
    log = (folder / "metrics.jsonl").read_text().splitlines()
    start = json.loads(log[0]) if log else metrics  # at step 0 the policy is the SFT model
    metrics["eval_gain"] = metrics["eval_reward"] - start["eval_reward"]
    text = "gain {eval_gain:.2f} over the SFT model, reward {eval_reward:.3f} at KL {eval_kl:.2f} nats"
    tqdm.write(f"{folder}, step {step}: {text.format(**metrics)}/response on held-out prompts")
    return metrics


# ------------------------------------------------------------------------------- the run folder and failures
def check_args(args, may_be_zero):
    """Checks that numbers are in range and that the output folder is free or holds a run to go on with."""
    check(os.environ.get("WORLD_SIZE", "1") == "1", "this script is one process; see examples/ for several")
    folder = Path(args.output_dir)
    for name, value in vars(args).items():
        in_range = type(value) not in (int, float) or value > 0 or (value == 0 and name in may_be_zero)
        check(in_range, f"--{name} {value} is out of range; give a larger number")
        names_input = name in ("model", "reward_model", "dataset") and value
        inside = names_input and Path(value).resolve().is_relative_to(folder.resolve())
        check(not inside, f"--{name} lies inside --output_dir; give another --output_dir")
    check(folder.is_dir() or not os.path.lexists(folder), f"{folder} is no folder; give another --output_dir")
    is_run = (folder / "args.json").exists() and args.resume != args.overwrite  # exactly one of the two
    free = is_run or not any(folder.glob("*"))
    check(free, f"{folder} is not empty; --resume or --overwrite its run, or give another --output_dir")


def open_run(model, optimizer, args):
    """Claims the output folder. Returns the checkpoint to --resume from; its step is -1 if there is none."""
    folder, checkpoint = Path(args.output_dir), {"step": -1, "log_size": 0}
    if args.resume and (folder / "checkpoint.pt").exists():
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        may_change = "output_dir steps save_every micro_batch_size device resume overwrite".split()
        for name in vars(args).keys() - may_change:
            before, now = str(checkpoint["args"].get(name)), str(getattr(args, name))
            unchanged = os.path.realpath(before) == os.path.realpath(now)  # so that out/sft equals ./out/sft
            check(unchanged, f"--{name} was {before} and is now {now}; --resume cannot change it")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / "args.json", "w" if args.resume or args.overwrite else "x") as file:
            json.dump({"args": vars(args)}, file, indent=2)
    except FileExistsError:
        sys.exit(f"error: another run has just begun in {folder}; give another --output_dir")
    old_files = [] if checkpoint["step"] >= 0 else ["checkpoint.pt", "config.json", "samples_*.jsonl"]
    for pattern in [*old_files, "**/.tmp*"]:  # a kill while safetensors writes leaves .tmp files
        for file in folder.glob(pattern):
            file.unlink()
    with open(folder / "metrics.jsonl", "a") as log:
        log.truncate(checkpoint["log_size"])  # drops the steps after the checkpoint, which will be done again
    return checkpoint


def save(step, model, optimizer, tokenizer, args, **more):
    """Exports the model for from_pretrained, then replaces the checkpoint in one move."""
    folder = Path(args.output_dir)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint = {"step": step, "args": vars(args), "log_size": (folder / "metrics.jsonl").stat().st_size}
    checkpoint |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}
    torch.save(checkpoint, folder / "checkpoint.pt.new")
    os.replace(folder / "checkpoint.pt.new", folder / "checkpoint.pt")


# ------------------------------------------------------------------------------------------------------ main
def update_policy(policy, optimizer, batch, reward, minibatch, args):
    """One optimizer step on a minibatch of prompts, each with its K responses, in micro-batches."""
    K, metrics = args.num_responses, {"loss": 0.0, "clip_fraction": 0.0, "log_ratio_max": 0.0}
    for prompts in minibatch.split(args.micro_batch_size):
        rows = (prompts.unsqueeze(1) * K + torch.arange(K)).flatten()  # all K rows of each prompt
        with autocast(args):
            logp_new_tok = response_logps(policy, **token_rows(batch, rows), temperature=args.temperature)
        logp_new_seq = logp_new_tok.sum(1).view(-1, K)
        logp_old_seq = batch["logp_old_tok"][rows].sum(1).view(-1, K)
        if args.clipping == "none":
            loss, stats = pairwise_policy_gradient_loss(logp_new_seq, reward[prompts]), {"clip_fraction": 0.0}
        else:
            options = args.clip_range, args.clipping, args.max_importance_weight
            loss, stats = p3o_loss(logp_new_seq, logp_old_seq, reward[prompts], *options)
        share = len(prompts) / len(minibatch)
        (loss * share).backward()
        metrics["loss"] += loss.item() * share
        metrics["clip_fraction"] += stats["clip_fraction"] * share
        log_ratio_max = (logp_new_seq - logp_old_seq).abs().max().item()  # also for clipping none
        metrics["log_ratio_max"] = max(metrics["log_ratio_max"], log_ratio_max)
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).item()
    finite = math.isfinite(metrics["loss"] + metrics["grad_norm"])
    check(finite, "the loss or its gradient is not finite; start again with a lower --learning_rate")
    optimizer.step()
    optimizer.zero_grad()
    return metrics


def train_step(step, policy, reference, reward_function, optimizer, prompts, offset, tokenizer, args):
    """One iteration of P3O. Returns its metrics."""
    start, B, K = time.perf_counter(), args.prompts_per_step, args.num_responses
    torch.manual_seed(args.seed * 10**6 + step)  # so that a resumed run draws the same numbers
    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (step - 1) / args.steps)
    # 1. Sample K responses to each of B prompts from pi_old, which is the present policy.
    numbers = data_order(len(prompts), B, step, args.seed)
    batch = sample_batch(policy, [prompts[number] for number in numbers], K, tokenizer, args)
    # 2. Compute the trajectory rewards.
    score_batch(batch, policy, reference, reward_function, args)
    score = batch["score"].view(B, K) + offset[numbers]  # the offset is 0 without --reward_shift
    logp_old_seq, logp_ref_seq = (batch[name].sum(1).view(B, K) for name in ("logp_old_tok", "logp_ref_tok"))
    reward = trajectory_reward(score, logp_old_seq, logp_ref_seq, args.beta)  # (B, K)
    # 3. Maximize the pairwise objective for some epochs of minibatches.
    updates = []
    for _ in range(args.epochs):
        for minibatch in torch.randperm(B).split(args.minibatch_size):
            updates.append(update_policy(policy, optimizer, batch, reward, minibatch, args))
    # Report the metrics.
    metrics = batch_metrics([batch])
    ids = batch["response_ids"].masked_fill(~batch["response_mask"], -1).view(B, K, -1)
    i, j = torch.triu_indices(K, K, offset=1)
    metrics["frac_identical_pairs"] = (ids[:, i] == ids[:, j]).all(-1).float().mean().item()
    metrics |= {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    metrics["log_ratio_max"] = max(update["log_ratio_max"] for update in updates)
    return metrics | {"seconds": time.perf_counter() - start}


def main(args):
    check_args(args, may_be_zero=["seed", "beta", "reward_shift", "missing_eos_penalty"])
    check(args.num_responses >= 2, "--num_responses must be at least 2, because P3O learns from pairs")
    check((args.max_importance_weight or 1) >= 1, "--max_importance_weight must be at least 1")
    check(args.prompts_per_step % args.minibatch_size == 0, "--minibatch_size must divide --prompts_per_step")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # several times as fast, and precise enough
    torch.backends.cuda.enable_cudnn_sdp(False)  # its attention has given NaN gradients for padded rows
    try:
        tokenizer = load_tokenizer(args)
        prompts = read_prompts(["train"], tokenizer, args)
        held_out = read_prompts(["validation", "test"], tokenizer, args)[: args.eval_prompts]
        policy, reference = (load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
        models = policy, reference.requires_grad_(False), load_reward(tokenizer, args)
    except (OSError, ValueError) as error:
        names = f"{args.model}, {args.reward_model} or {args.dataset}"
        sys.exit(f"error: cannot load {names} ({str(error).splitlines()[0]}); run the stages before this one")
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    sampling |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    policy.generation_config = transformers.GenerationConfig(**sampling, max_new_tokens=args.response_length)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.95), eps=1e-5, fused=True)
    offset = args.reward_shift * torch.randn(len(prompts), 1, generator=torch.Generator().manual_seed(0))
    offset = ((256 * offset).round() / 256).double().to(args.device)  # float64 adds such numbers exactly
    next_step = open_run(policy, optimizer, args)["step"] + 1
    bar = tqdm(range(next_step, args.steps + 1), "p3o", args.steps + 1, initial=next_step, disable=None)
    for step in bar:  # step 0 only evaluates and saves the SFT model
        metrics = train_step(step, *models, optimizer, prompts, offset, tokenizer, args) if step > 0 else {}
        if step % args.eval_every == 0 or step == args.steps:
            metrics |= evaluate(step, *models, held_out, tokenizer, args)
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "kl") if name in metrics})
        with open(Path(args.output_dir, "metrics.jsonl"), "a") as log:
            log.write(json.dumps({"step": step, **metrics}) + "\n")
        if step % args.save_every == 0 or step == args.steps:
            save(step, policy, optimizer, tokenizer, args)


if __name__ == "__main__":
    parser = transformers.HfArgumentParser(Args, usage="python p3o.py [--flag value ...]", allow_abbrev=False)
    main(Args(**vars(parser.parse_args())))
