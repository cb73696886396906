"""DPO, Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290, cited as [DPO]): a baseline.

DPO trains the policy on preference pairs in the way one trains a classifier. Its implicit reward is
beta log(pi / pi_SFT). Like P3O, it sees rewards only up to an offset per prompt.

    python toy.py && python sft.py && python reward_model.py    # the stages before this one
    python dpo.py                                               # 2 minutes on one CPU core; its last line:
    out/dpo, step 625: gain 2.02 over the SFT model, reward 2.037 at KL 1.43 nats/response on held-out prompts
    python dpo.py --online                                      # 1 minute; it ends at gain 1.97 at KL 1.63

    -E log sigmoid(beta [log(pi / pi_SFT)(y_w|x) - log(pi / pi_SFT)(y_l|x)])    dpo_loss
    online, the scores decide which of two responses is the winner y_w          rank_pairs

Read dpo_loss first, then rank_pairs and dpo_step at the end. There are no departures from the paper's loss.
Offline, a step is one minibatch of the data set, and the reward model only evaluates. --online is not in the
paper. It ranks two fresh responses to each prompt by their scores. A ranking does not say how close scores
are, so the loss asks for an ever larger margin, and the KL keeps growing. --labels sampled draws y_w from the
Bradley-Terry model. Then the optimum is that of P3O at the same beta.

Notation: B pairs are N = 2 B rows, the chosen response of each pair first. The rest is as in p3o.py.
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
    reward_model: str = flag("out/reward_model", "sequence-classification model with one label, or none")
    online: bool = flag(False, "learn from two fresh responses per prompt, ranked by the reward model")
    labels: Literal["ranked", "sampled"] = flag("ranked", "online winner: the higher score, or a random draw")
    dataset: str | None = flag(None, "name or folder; default data/toy/preferences, online data/toy/prompts")
    output_dir: str | None = flag(None, "folder of the run; by default out/dpo, online out/dpo_online")
    seed: int = flag(0, "seed of the data order and of sampling")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16 is autocast: weights stay in float32")
    learning_rate: float = flag(1e-4, "Adam's rate, which falls linearly to 0; 5e-7 to 5e-6 if pretrained")
    steps: int | None = flag(None, "number of minibatches (see --epochs) or, online, of rollouts (60)")
    prompts_per_step: int = flag(64, "B, prompts per rollout, with --online")
    epochs: int = flag(1, "passes over the data set, without --online")
    rollout_epochs: int = flag(2, "passes over each rollout, with --online")
    minibatch_size: int = flag(32, "pairs per optimizer step")
    micro_batch_size: int = flag(32, "pairs per forward and backward pass; a lower number saves memory")
    beta: float = flag(0.5, "weight of the KL to the SFT model; 0.1 in the paper")
    missing_eos_penalty: float = flag(1.0, "number subtracted from the score of a response without EOS")
    temperature: float = flag(1.0, "number that divides the logits, in sampling and in every log-prob")
    prompt_length: int = flag(32, "longest prompt in tokens; longer ones are left out")
    response_length: int = flag(24, "longest response in tokens, EOS included; longer pairs are left out")
    max_grad_norm: float = flag(1.0, "largest norm of the gradient; a longer gradient is scaled down to it")
    eval_every: int = flag(20, "steps between evaluations; there is one at step 0 and at the end")
    eval_prompts: int = flag(256, "number of held-out prompts, and offline of held-out pairs, to evaluate on")
    save_every: int = flag(20, "steps between checkpoints; there is one at step 0 and at the end")
    resume: bool = flag(False, "continue from the last checkpoint; most flags must stay the same")
    overwrite: bool = flag(False, "start again in an output_dir that already holds a run")
    num_responses = 2  # a constant and no flag, because a pair has two responses; score_batch reads it


# ------------------------------------------------------------------------------------------- the mathematics
def dpo_loss(logp_chosen_seq, logp_rejected_seq, ref_chosen_seq, ref_rejected_seq, beta):
    """-log sigmoid(beta [log(pi / pi_SFT)(y_w|x) - log(pi / pi_SFT)(y_l|x)]), a mean over pairs [DPO, eq. 7].

    All log-probs are (B,), in nats per response, and those called ref are the SFT model's. beta is typically
    0.1 to 0.5. Returns the loss () and means over the pairs: "margin", the sigmoid's argument; "accuracy",
    the share of margins above 0, where 0 counts half; "logp_chosen" and "logp_rejected", which may both fall
    while the margin grows. Raises ValueError if the shapes differ.
    """
    logps = logp_chosen_seq, logp_rejected_seq, ref_chosen_seq, ref_rejected_seq
    if len({logp.shape for logp in logps}) > 1:
        raise ValueError(f"expected four of one shape: {[tuple(logp.shape) for logp in logps]}")
    margin = beta * ((logp_chosen_seq - ref_chosen_seq) - (logp_rejected_seq - ref_rejected_seq))  # (B,)
    stats = {"accuracy": (margin.sign() + 1) / 2, "margin": margin}
    stats |= {"logp_chosen": logp_chosen_seq, "logp_rejected": logp_rejected_seq}
    loss = -torch.nn.functional.logsigmoid(margin).mean()
    return loss, {name: value.detach().mean().item() for name, value in stats.items()}


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


def pad_rows(prompt_ids, response_ids, tokenizer, args):
    """Pads N prompts on the left and N responses on the right. Returns a batch, a dict of tensors."""
    prompt = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
    response = tokenizer.pad({"input_ids": response_ids}, padding_side="right", return_tensors="pt")
    batch = {"prompt_ids": prompt["input_ids"], "prompt_mask": prompt["attention_mask"].bool()}
    batch |= {"response_ids": response["input_ids"], "response_mask": response["attention_mask"].bool()}
    return {name: rows.to(args.device) for name, rows in batch.items()}


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


def read_rows(name, splits, columns, tokenizer, args):
    """Reads the prompts, and the responses in these columns, of the first of these splits that there is.

    Returns {"prompt": text, "prompt_ids": tokens, "response_ids": [tokens for each column]} for each row
    within the length limits. EOS ends each response. Without a column "completion", "chosen" serves as it.
    """
    if Path(name).is_dir():  # load_dataset would cache local files and might return an older version
        files = {file.stem: file.open(encoding="utf-8") for file in Path(name).glob("*.jsonl")}
        data = {split: [json.loads(line) for line in file] for split, file in files.items()}
    else:
        data = datasets.load_dataset(name)
    split = next((split for split in splits if split in data), None)
    found = data[split][0].keys() if split and data[split] else ()
    message = f"{name} has no columns {['prompt', *columns]} in a split {splits}; make it with data.py"
    columns = ["chosen" if column == "completion" and column not in found else column for column in columns]
    check({"prompt", *columns} <= set(found), message)
    texts = {column: [row[column] for row in data[split]] for column in ["prompt", *columns]}
    ids = {column: tokenizer(texts[column], add_special_tokens=False)["input_ids"] for column in texts}
    rows = []
    for i, prompt_ids in enumerate(ids["prompt"]):
        response_ids = [ids[column][i] + [tokenizer.eos_token_id] for column in columns]
        longest = max(map(len, response_ids), default=0)
        if 0 < len(prompt_ids) <= args.prompt_length and longest <= args.response_length:
            rows += [{"prompt": texts["prompt"][i], "prompt_ids": prompt_ids, "response_ids": response_ids}]
    print(f"{name} ({split}): {len(rows)} of {len(texts['prompt'])} rows fit the length limits", flush=True)
    check(rows, f"no row fits --prompt_length {args.prompt_length} and --response_length; raise them")
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
def rank_pairs(batch, labels="ranked"):
    """Turns a scored batch, 2 responses per prompt, into pairs: the chosen response of each comes first.

    "ranked" chooses the higher score, and of two equal scores the first. "sampled" chooses the second with
    the probability sigmoid(r_2 - r_1), which is that of the Bradley-Terry model.
    """
    first, second = batch["score"].view(-1, 2).unbind(1)  # (B,) each
    swap = torch.bernoulli(torch.sigmoid(second - first)) if labels == "sampled" else second > first
    rows = torch.arange(2 * len(swap), device=swap.device) ^ swap.long().repeat_interleave(2)  # 2 ^ 1 is 3
    return token_rows(batch, rows) | {"logp_ref_tok": batch["logp_ref_tok"][rows]}


@torch.no_grad()
def read_pairs(reference, rows, tokenizer, args):
    """Makes B rows of the data set into a batch of pairs, in the form that rank_pairs returns."""
    prompt_ids = [row["prompt_ids"] for row in rows for _ in range(2)]
    response_ids = [ids for row in rows for ids in row["response_ids"]]
    batch, logps = pad_rows(prompt_ids, response_ids, tokenizer, args), []
    for part in torch.arange(len(prompt_ids)).split(2 * args.micro_batch_size):
        with autocast(args):
            logps.append(response_logps(reference, **token_rows(batch, part), temperature=args.temperature))
    return batch | {"logp_ref_tok": torch.cat(logps)}


def pairs_loss(policy, batch, minibatch, args):
    """Means of dpo_loss and its stats over some pairs of a batch. In training it adds up their gradients."""
    metrics = {}
    for pairs in minibatch.split(args.micro_batch_size):
        rows = (2 * pairs.unsqueeze(1) + torch.arange(2)).flatten()  # both rows of each pair
        with autocast(args):
            logp_tok = response_logps(policy, **token_rows(batch, rows), temperature=args.temperature)
        logp_seq = logp_tok.sum(1).view(-1, 2).unbind(1)  # those of the chosen and of the rejected responses
        ref_seq = batch["logp_ref_tok"][rows].sum(1).view(-1, 2).unbind(1)
        loss, stats = dpo_loss(*logp_seq, *ref_seq, args.beta)
        share = len(pairs) / len(minibatch)
        if torch.is_grad_enabled():  # an evaluation switches gradients off
            (loss * share).backward()
        for name, value in {"loss": loss.item(), **stats}.items():
            metrics[name] = metrics.get(name, 0.0) + value * share
    return metrics


def update_on_pairs(policy, optimizer, batch, minibatch, args):
    """One optimizer step on a minibatch of pairs, in micro-batches."""
    metrics = pairs_loss(policy, batch, minibatch, args)
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).item()
    finite = math.isfinite(metrics["loss"] + metrics["grad_norm"])
    check(finite, "the loss or its gradient is not finite; start again with a lower --learning_rate")
    optimizer.step()
    optimizer.zero_grad()
    return metrics


@torch.no_grad()
def evaluate_preferences(step, policy, reference, rows, tokenizer, args):
    """Metrics on held-out pairs. If no reward model is there for `evaluate`, the KL is measured here."""
    batch = read_pairs(reference, rows, tokenizer, args)
    metrics = pairs_loss(policy, batch, torch.arange(len(rows)), args)
    text = "loss {loss:.3f}, accuracy {accuracy:.3f} on held-out pairs".format(**metrics)
    if args.reward_model == "none":
        metrics["kl"] = 0.0
        torch.manual_seed(args.seed * 10**6)
        for part in (rows[first : first + 32] for first in range(0, len(rows), 32)):  # saves memory
            part = token_rows(sample_batch(policy, part, 1, tokenizer, args), slice(None))
            with autocast(args):
                logps = [response_logps(m, **part, temperature=args.temperature) for m in (policy, reference)]
            metrics["kl"] += (logps[0] - logps[1]).sum().item() / len(rows)
        text += f" and KL {metrics['kl']:.2f} nats/response"
    tqdm.write(f"{args.output_dir}, step {step}: {text}")
    return {f"eval_{name}": value for name, value in metrics.items()}


def dpo_step(step, policy, reference, reward_function, optimizer, train, tokenizer, args):
    """One step of DPO. Returns its metrics."""
    start, B = time.perf_counter(), args.prompts_per_step if args.online else args.minibatch_size
    torch.manual_seed(args.seed * 10**6 + step)  # so that a resumed run draws the same numbers
    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (step - 1) / args.steps)
    rows, metrics = [train[number] for number in data_order(len(train), B, step, args.seed)], {}
    # 1. Take preference pairs from the data set, or sample two responses to each prompt and rank them.
    if args.online:
        batch = sample_batch(policy, rows, 2, tokenizer, args)
        score_batch(batch, policy, reference, reward_function, args)
        ids = batch["response_ids"].masked_fill(~batch["response_mask"], -1)
        metrics = batch_metrics([batch])
        metrics["frac_identical_pairs"] = (ids[0::2] == ids[1::2]).all(-1).float().mean().item()
        batch = rank_pairs(batch, args.labels)
    else:
        batch = read_pairs(reference, rows, tokenizer, args)
    # 2. Minimize the loss on the minibatch or, online, for some epochs of minibatches.
    updates = []
    for _ in range(args.rollout_epochs if args.online else 1):
        for minibatch in torch.randperm(B).split(args.minibatch_size):
            updates.append(update_on_pairs(policy, optimizer, batch, minibatch, args))
    # 3. Report the means.
    metrics |= {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return metrics | {"seconds": time.perf_counter() - start}


def main(args):
    args.dataset = args.dataset or ("data/toy/prompts" if args.online else "data/toy/preferences")
    args.output_dir = args.output_dir or ("out/dpo_online" if args.online else "out/dpo")
    check_args(args, may_be_zero=["seed", "missing_eos_penalty"])
    check(args.reward_model != "none" or not args.online, "--online ranks by reward; give a --reward_model")
    divides = args.prompts_per_step % args.minibatch_size == 0 or not args.online
    check(divides, "--minibatch_size must divide --prompts_per_step")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # several times as fast, and precise enough
    torch.backends.cuda.enable_cudnn_sdp(False)  # its attention has given NaN gradients for padded rows
    pair = [] if args.online else ["chosen", "rejected"]
    try:
        tokenizer = load_tokenizer(args)
        train = read_rows(args.dataset, ["train"], pair, tokenizer, args)
        held_out = read_rows(args.dataset, ["validation", "test"], pair, tokenizer, args)[: args.eval_prompts]
        policy, reference = (load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
        reward = load_reward(tokenizer, args) if args.reward_model != "none" else None
    except (OSError, ValueError) as error:
        names = f"{args.model}, {args.reward_model} or {args.dataset}"
        sys.exit(f"error: cannot load {names} ({str(error).splitlines()[0]}); run the stages before this one")
    passes = math.ceil(args.epochs * len(train) / args.minibatch_size)  # minibatches
    args.steps = args.steps or (60 if args.online else passes)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    sampling |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    policy.generation_config = transformers.GenerationConfig(**sampling, max_new_tokens=args.response_length)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.95), eps=1e-5, fused=True)
    next_step = open_run(policy, optimizer, args)["step"] + 1
    bar = tqdm(range(next_step, args.steps + 1), "dpo", args.steps + 1, initial=next_step, disable=None)
    models = policy, reference.requires_grad_(False), reward
    for step in bar:  # step 0 only evaluates and saves the SFT model
        metrics = dpo_step(step, *models, optimizer, train, tokenizer, args) if step > 0 else {}
        if step % args.eval_every == 0 or step == args.steps:
            metrics |= (
                {} if args.online else evaluate_preferences(step, *models[:2], held_out, tokenizer, args)
            )
            metrics |= evaluate(step, *models, held_out, tokenizer, args) if reward else {}
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss", "accuracy") if name in metrics})
        with open(Path(args.output_dir, "metrics.jsonl"), "a") as log:
            log.write(json.dumps({"step": step, **metrics}) + "\n")
        if step % args.save_every == 0 or step == args.steps:
            save(step, policy, optimizer, tokenizer, args)


if __name__ == "__main__":
    parser = transformers.HfArgumentParser(Args, usage="python dpo.py [--flag value ...]", allow_abbrev=False)
    main(Args(**vars(parser.parse_args())))
