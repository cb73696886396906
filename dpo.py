"""Stage 3 baseline: DPO, Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

    python dpo.py             the embedded task, after reward_model.py; other models: README.md
    python dpo.py --online    the same loss on two fresh responses per prompt, ranked by the reward model

DPO fits preference pairs as a classifier does, with the implicit reward beta log(pi / pi_SFT) in the place of
a reward model. Its likelihood is Bradley-Terry's: like P3O, it sees rewards only up to an offset per prompt.

    L = -E log sigmoid(beta [log(pi / pi_SFT)(y_w|x) - log(pi / pi_SFT)(y_l|x)])        dpo_loss
    --online: y_w is the response with the higher score                                 rank_pairs

Offline, the reward model only evaluates. --online is not in the paper: a step samples and learns from as many
responses as one of p3o.py, of whose scores only the order counts. An order hides how close the scores are and
asks for an infinite margin: the KL keeps growing. --labels sampled draws y_w by Bradley-Terry instead, which
gives the loss the optimum of P3O at the same beta. Departures from the paper's loss: none.

Legend: B pairs, each a prompt with a chosen and a rejected response, N = 2 B rows; P prompt length, R
response length, V vocabulary. Prompts are padded on the left, responses on the right. Masks are boolean,
True counts. Log-probs and KL in nats.
"""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import datasets
import torch
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
)


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    model: str = flag("out/sft", "SFT model: where the policy starts, and the reference of the KL")
    reward_model: str = flag("out/reward_model", "sequence-classification model with one label")
    online: bool = flag(False, "learn from fresh responses, two per prompt, ranked by the reward model")
    labels: Literal["ranked", "sampled"] = flag("ranked", "online winner: higher score, or by Bradley-Terry")
    dataset: str | None = flag(None, "hub name or path; None: data/toy/preferences, online data/toy/prompts")
    eval_dataset: str | None = flag(None, "held-out prompts; None: --dataset if given, else data/toy/prompts")
    output_dir: str | None = flag(None, "folder of this run; None: out/dpo, online out/dpo_online")
    seed: int = flag(0, "of data order and sampling")
    device: str = flag("auto", "auto (cuda when there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16: autocast, over float32 weights")
    learning_rate: float = flag(1e-4, "AdamW, falls linearly to 0; 5e-7 to 5e-6 for pretrained models")
    steps: int | None = flag(None, "online: rollouts, None: 60; offline: optimizer steps, None: by --epochs")
    prompts_per_step: int = flag(64, "online: B, prompts per rollout; offline a step is one minibatch")
    epochs: int | None = flag(None, "passes over each rollout, None: 2; offline over the data, None: 1")
    minibatch_size: int = flag(32, "pairs per optimizer step")
    micro_batch_size: int = flag(0, "pairs per forward pass: same gradient, less memory; 0: the minibatch")
    beta: float = flag(0.5, "weight of the KL to the SFT model; 0.1 in the paper")
    missing_eos_penalty: float = flag(1.0, "subtracted from the score of a response cut off without EOS")
    temperature: float = flag(1.0, "divides the logits, when sampling and in every log-prob")
    prompt_length: int = flag(32, "tokens; longer prompts are dropped and counted")
    response_length: int = flag(24, "tokens sampled at most, and kept of longer responses, EOS included")
    max_grad_norm: float = flag(1.0, "global gradient-norm clip")
    eval_every: int = flag(20, "steps between evaluations on held-out rows; 0: only before and after")
    eval_prompts: int = flag(256, "held-out prompts of an evaluation, and offline held-out pairs")
    save_every: int = flag(20, "steps between checkpoints; 0: only the last")
    resume: bool = flag(False, "continue from the last checkpoint; steps, save_every, device may change")
    overwrite: bool = flag(False, "replace the run in output_dir")


# ------------------------------------------------------------------------------------------- the mathematics
def dpo_loss(logp_chosen_seq, logp_rejected_seq, ref_chosen_seq, ref_rejected_seq, beta):
    """-mean log sigmoid(beta [log(pi / pi_SFT)(y_w|x) - log(pi / pi_SFT)(y_l|x)]), nats a pair [DPO, eq. 7].

    All (B,), log-probs in nats per response; ref_: of pi_SFT, computed without gradient. Returns (loss,
    stats), stats being floats, means over the pairs: accuracy, how often the implicit reward
    beta log(pi / pi_SFT) puts the chosen response first (ties half); margin, implicit_reward_chosen less
    implicit_reward_rejected; logp_chosen and logp_rejected, which may both fall while the margin grows.
    ValueError if shapes differ.
    """
    logps = logp_chosen_seq, logp_rejected_seq, ref_chosen_seq, ref_rejected_seq
    if len({x.shape for x in logps}) > 1:
        raise ValueError(f"shapes differ: {[tuple(x.shape) for x in logps]}")
    reward_chosen = beta * (logp_chosen_seq - ref_chosen_seq)  # (B,)
    reward_rejected = beta * (logp_rejected_seq - ref_rejected_seq)
    margin = reward_chosen - reward_rejected
    stats = {"accuracy": (margin.sign() + 1) / 2, "margin": margin}
    stats |= {"implicit_reward_chosen": reward_chosen, "implicit_reward_rejected": reward_rejected}
    stats |= {"logp_chosen": logp_chosen_seq, "logp_rejected": logp_rejected_seq}
    return -logsigmoid(margin).mean(), {name: value.detach().mean().item() for name, value in stats.items()}


# -------------------------------------------------------------------------------------- tokens and log-probs
def pad(sequences, side, pad_id, device):
    """Token lists -> ids (N, L), mask (N, L), padded to the longest on `side`, "left" or "right"."""
    length = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, s in enumerate(sequences):
        columns = slice(length - len(s), length) if side == "left" else slice(len(s))
        ids[row, columns], mask[row, columns] = torch.tensor(s), True
    return ids.to(device), mask.to(device)


def model_inputs(prompt_ids, prompt_mask, response_ids, response_mask):
    """Joins prompts and responses for a forward pass. Positions count real tokens: padding shifts nothing."""
    ids = torch.cat([prompt_ids, response_ids], 1)
    mask = torch.cat([prompt_mask, response_mask], 1).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def response_distributions(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature=1.0):
    """log pi(. | x, y_<t) at every response position: (B, R, V), float32 whatever the model's dtype."""
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    keep = response_ids.shape[1] + 1  # the last prompt token predicts the first response token
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
    return torch.log_softmax(logits.float() / temperature, -1)


def response_logps(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature=1.0):
    """log pi(y_t | x, y_<t) in nats: (B, R), float32, 0 where response_mask is False; gradients flow.

    Prompts (B, P) are padded on the left, responses (B, R) on the right; masks are boolean.
    """
    logps = response_distributions(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature)
    return logps.gather(-1, response_ids.unsqueeze(-1)).squeeze(-1).masked_fill(~response_mask, 0.0)


def read_values(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """The score head read at the last prompt token and at each response token: (B, R + 1), float32.

    Column t has seen t response tokens. By position: a pad id may be a real token elsewhere.
    """
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # (B, P + R, D)
    hidden = hidden[:, prompt_ids.shape[1] - 1 :].to(model.score.weight.dtype)
    return model.score(hidden).squeeze(-1).float()


def read_score(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """r(x, y): the score head read at the last response token, EOS when there is one. (B,), float32."""
    values = read_values(model, prompt_ids, prompt_mask, response_ids, response_mask)
    return values.gather(1, response_mask.sum(1, keepdim=True)).squeeze(1)


# ------------------------------------------------------------------------------------------------------ data
FORMATS = (  # columns, named as in TRL, and responses per row; the first that fits is taken
    (("prompt", "chosen", "rejected"), 2),
    (("chosen", "rejected"), 2),  # implicit prompt: HH-RLHF dialogues, or whole conversations
    (("prompt", "completion"), 1),
    (("messages",), 1),
    (("prompt",), 0),
    (("text",), 1),  # completion of an empty prompt
)


def open_split(name, splits):
    """Rows of the first of `splits` that a data set (hub name or local path) has, and that split's name.

    A data set without held-out split lends the last 5% of its rows, at most 500, as "test".
    """
    require(is_findable(name), f"data set {name!r} does not exist", "name another; toy.py makes data/toy")
    path = Path(name)
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            data = datasets.load_from_disk(name)
        elif path.is_file():
            data = datasets.load_dataset("parquet" if path.suffix == ".parquet" else "json", data_files=name)
        else:
            data = datasets.load_dataset(name)
        data = data if isinstance(data, dict) else {"train": data}
        for rows in data.values():
            rows.data.validate(full=True)  # text that is not UTF-8 shows here, else in the middle of a run
        if not {"validation", "test"} & set(data):
            rows = next(iter(data.values()))
            data = rows.train_test_split(test_size=min(len(rows) // 20 + 1, 500), shuffle=False)
    except Exception as error:  # each reader raises kinds of its own
        wrong = f"cannot read data set {name!r} ({first_line(error.__cause__ or error)})"
        raise RunError(wrong, "give JSON lines, parquet or a hub name") from None
    split = next((split for split in splits if split in data), None)
    require(split, f"data set {name!r} has splits {sorted(data)}", f"name one of them {splits[0]!r}")
    return data[split], split


def parse_row(row, tokenizer):
    """A row of any format -> (prompt, [responses]) as text, conversations by the chat template.

    ValueError says why a row cannot be used.
    """
    prompt, responses = row.get("prompt"), [row[column] for column in row if column != "prompt"]
    if not all(isinstance(value, str | list) for value in row.values()):
        raise ValueError("null or not text")
    if any(isinstance(value, list) for value in row.values()):
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            whole = [r if prompt is None or r[0]["role"] != "assistant" else prompt + r for r in responses]
            prompt, *others = [r[:-1] for r in whole] or [prompt]  # the last message is the response
            if any(other != prompt for other in others):
                raise ValueError("prompts of chosen and rejected differ")
            if any(r[-1]["role"] != "assistant" for r in whole):
                raise ValueError("the last message is not the assistant's")
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            return text + "", [r[-1]["content"] + "" for r in whole]
        except (KeyError, TypeError, IndexError, AttributeError, TemplateError):
            raise ValueError("not a conversation that the chat template accepts") from None
    if prompt is None and "text" not in row:  # whole dialogues: the assistant's last turn is the response
        ends = [r.rfind("\n\nAssistant:") + len("\n\nAssistant:") for r in responses]
        prompt, *others = [r[:end] for r, end in zip(responses, ends)]
        if not prompt.endswith("\n\nAssistant:") or any(other != prompt for other in others):
            raise ValueError("prompts of chosen and rejected differ")
        responses = [r[len(prompt) :] for r in responses]
    return prompt or "", responses


def end_of_turn(tokenizer):
    """Id of the token that the chat template puts behind an answer: the EOS of conversations."""
    turns = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("pong")[2]
    return (tokenizer(tail, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id])[0]


def encode_row(row, num_responses, tokenizer, chat, eos_id, args):
    """Token ids of a row; responses end in EOS or are cut at --response_length. ValueError: unusable."""
    prompt, responses = parse_row(row, tokenizer)
    if chat != any(isinstance(value, list) for value in row.values()):
        raise ValueError("text among conversations, or the reverse")
    prompt_ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"] or [eos_id]
    if len(prompt_ids) > args.prompt_length:
        raise ValueError("prompt longer than --prompt_length")
    if not all(r.strip() for r in responses[:num_responses]):
        raise ValueError("empty response")
    ids = [tokenizer(r, add_special_tokens=False)["input_ids"] + [eos_id] for r in responses[:num_responses]]
    ids = [r[: args.response_length] for r in ids]
    if num_responses == 2 and ids[0] == ids[1]:
        raise ValueError("chosen and rejected are the same")
    return {"prompt": prompt, "prompt_ids": prompt_ids, "response_ids": ids}


def read_examples(name, splits, num_responses, tokenizer, args, limit=None):
    """([{"prompt": text, "prompt_ids": [...], "response_ids": [[...], ...]}, ...], eos_id of the responses).

    num_responses: 2 for preference pairs, chosen first; 1 for demonstrations; 0 for prompts. Rows that cannot
    be used are dropped, counted and reported by reason; reading stops at `limit` examples.
    """
    rows, split = open_split(name, splits)
    usable = [c for c, n in FORMATS if n >= num_responses and (num_responses or c != ("text",))]
    columns = next((c for c in usable if set(c) <= set(rows.column_names)), None)
    expected = " or ".join("+".join(c) for c in usable)
    require(columns, f"data set {name!r} has columns {rows.column_names}", f"expected {expected}")
    rows = rows.select_columns(list(columns))
    first = next((row for row in rows if None not in row.values()), {})
    chat = any(isinstance(value, list) for value in first.values())
    todo = "use a model whose tokenizer has a chat template"
    require(not chat or tokenizer.chat_template, f"{name!r} holds conversations", todo)
    eos_id = end_of_turn(tokenizer) if chat else tokenizer.eos_token_id
    examples, dropped = [], Counter()
    for row in tqdm(rows, f"reading {name}", leave=False, disable=None):
        try:
            examples.append(encode_row(row, num_responses, tokenizer, chat, eos_id, args))
        except ValueError as reason:
            dropped[str(reason)] += 1
        if len(examples) == limit:
            break
    used = f"{len(examples)} of {len(examples) + dropped.total()} rows used"
    used += "".join(f", {n} dropped: {reason}" for reason, n in dropped.items())
    print(f"{name} [{split}], {'+'.join(columns)}{' (conversations)' * chat}: {used}", flush=True)
    require(examples, f"{name!r} [{split}]: {used}", "look at the data, or raise --prompt_length")
    return examples, eos_id


def data_order(num_rows, size, step, seed):
    """Row numbers of step 1, 2, ...: passes over the data, each shuffled by a seed: no state to save."""
    places = [divmod(place, num_rows) for place in range((step - 1) * size, step * size)]
    generators = {n: torch.Generator().manual_seed(seed * 10**6 + n) for n, _ in places}
    orders = {n: torch.randperm(num_rows, generator=generators[n]) for n in generators}
    return [orders[n][place].item() for n, place in places]


# ---------------------------------------------------------------------------------------------------- models
def load_tokenizer(name):
    """The tokenizer of a model; where it has no padding token EOS serves, as masks go by position."""
    require(is_findable(name), f"model {name!r} does not exist", "run the stage before, or name another")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # missing, broken, unknown: transformers raises many kinds
        wrong = f"cannot load a tokenizer from {name!r} ({first_line(error)})"
        raise RunError(wrong, "name a model's folder or hub id") from None
    require(tokenizer("a")["input_ids"], f"{name!r} holds no tokenizer", "add its tokenizer files")
    require(tokenizer.eos_token_id is not None, f"the tokenizer of {name!r} has no EOS", "use another model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(auto_class, name, tokenizer, args, may_miss=(), **config):
    """A decoder-only model from a folder or the hub. may_miss: weights that may be missing: a new head."""
    try:
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, info = auto_class.from_pretrained(name, **options, **config)
    except Exception as error:
        wrong = f"cannot load model {name!r} ({first_line(error)})"
        raise RunError(wrong, "name a model's folder or hub id") from None
    kind = "reward model" if "Classification" in auto_class.__name__ else "language model"
    missing, unexpected = set(info["missing_keys"]) - set(may_miss), set(info["unexpected_keys"])
    require(
        not missing and ("score.weight" not in unexpected or may_miss),
        f"{name!r} is not a {kind}",
        f"name a {kind}",
    )
    return prepare_model(model, name, tokenizer, args)


def prepare_model(model, name, tokenizer, args):
    """Checks that the model can do the work, and moves it to the device, in eval mode: no dropout, ever.

    Weights stay in float32, where small updates are not rounded away; --dtype bfloat16 is autocast.
    """
    need = args.prompt_length + args.response_length
    most = getattr(model.config, "max_position_embeddings", None) or need
    require(need <= most, f"{name!r} holds {most} tokens, not {need}", "lower --prompt_length")
    known, size = len(tokenizer), model.get_input_embeddings().num_embeddings
    require(known <= size, f"{name!r} embeds {size} of {known} tokens", "use its own tokenizer")
    with torch.no_grad():
        first = [model.eval().base_model(torch.tensor([[1, x]])).last_hidden_state[0, 0] for x in (2, 3)]
    require(first[0].isfinite().all(), f"{name!r} has weights that are not finite", "use another model")
    require(torch.equal(*first), f"{name!r} sees later tokens", "use a decoder-only model")
    if args.dtype == "bfloat16":
        autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16)
        model.forward, model.base_model.forward = autocast(model.forward), autocast(model.base_model.forward)
    return model.to(args.device)


def load_reward_model(name, tokenizer, args):
    """The frozen reward model, stored in args.dtype, and its tokenizer, None when it is the policy's."""
    own = load_tokenizer(name)
    model = load_model(AutoModelForSequenceClassification, name, own, args).requires_grad_(False)
    right = hasattr(model, "score") and model.num_labels == 1
    require(right, f"{name!r} is not a decoder with one label", "train a reward model with reward_model.py")
    return model.to(getattr(torch, args.dtype)), None if own.get_vocab() == tokenizer.get_vocab() else own


def translate(batch, tokenizer, other):
    """The same prompts and responses in the tokens of another tokenizer, EOS where there was one."""
    prompts = [tokenizer.decode(ids[mask]) for ids, mask in zip(*batch[:2])]
    responses = [ids[mask].tolist() for ids, mask in zip(*batch[2:])]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    prompts, texts = (other(x, add_special_tokens=False)["input_ids"] for x in (prompts, texts))
    eos, padding = [other.eos_token_id], (other.pad_token_id, batch[0].device)
    texts = [new + eos * (ids[-1] in tokenizer.all_special_ids) for new, ids in zip(texts, responses)]
    prompts = pad([ids or eos for ids in prompts], "left", *padding)
    return *prompts, *pad([ids or eos for ids in texts], "right", *padding)


# --------------------------------------------------------------------------------------------------- rollout
def first_eos_mask(response_ids, eos_id):
    """True up to and including the first EOS, False behind it: (N, R) -> (N, R). Pad may be EOS."""
    is_eos = response_ids == eos_id
    return is_eos.cumsum(1) - is_eos.int() == 0


@torch.no_grad()
def sample_responses(model, prompt_ids, prompt_mask, response_length, temperature, eos_id, pad_id):
    """y ~ pi(.|x) from the whole distribution: no top-k, no top-p. Returns ids (N, R) and mask (N, R)."""
    model.generation_config = GenerationConfig()  # a model's own defaults (penalties, top-k) must not leak in
    ends = {"max_new_tokens": response_length, "eos_token_id": eos_id, "pad_token_id": pad_id}
    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, remove_invalid_values=True, **ends
    )
    ids = model.generate(input_ids=prompt_ids, attention_mask=prompt_mask.long(), generation_config=config)
    response_ids = ids[:, prompt_ids.shape[1] :]
    return response_ids, first_eos_mask(response_ids, eos_id)


@torch.no_grad()
def rollout(models, examples, num_responses, eos_id, tokenizer, args):
    """K responses to each of B prompts, scored: tensors of N = B * K rows, and seconds by phase.

    models: policy, reference, reward model and its tokenizer (None: the same). score: r(x, y) less the
    missing-EOS penalty, float64 (N,). logp_old_tok, logp_ref_tok, entropy_tok and kl_tok, the exact KL of the
    next-token distributions: (N, R), nats. Log-probs come from training's forward pass, not from the sampler.
    """
    policy, reference, reward_model, reward_tokenizer = models
    pad_id, start = tokenizer.pad_token_id, time.perf_counter()
    prompts = [example["prompt_ids"] for example in examples for _ in range(num_responses)]
    prompts = pad(prompts, "left", pad_id, args.device)
    limits = args.response_length, args.temperature, eos_id, pad_id
    batch = *prompts, *sample_responses(policy, *prompts, *limits)
    sampled, parts = time.perf_counter(), []
    for part in zip(*(x.split(args.micro_batch_size * num_responses) for x in batch)):
        ids, mask = part[2:]
        old = response_distributions(policy, *part, args.temperature)  # (n, R, V)
        ref = response_distributions(reference, *part, args.temperature)
        per_token = [x.gather(-1, ids.unsqueeze(-1)).squeeze(-1) for x in (old, ref)]
        per_token += [-(old.exp() * old).sum(-1), (old.exp() * (old - ref)).sum(-1)]
        ended = ((ids == eos_id) & mask).any(1)
        scored = translate(part, tokenizer, reward_tokenizer) if reward_tokenizer else part
        score = read_score(reward_model, *scored).double() - args.missing_eos_penalty * ~ended
        parts.append([x.masked_fill(~mask, 0.0) for x in per_token] + [score, ended])
    names = "logp_old_tok", "logp_ref_tok", "entropy_tok", "kl_tok", "score", "ended"
    result = dict(zip(("prompt_ids", "prompt_mask", "response_ids", "response_mask"), batch))
    result |= {name: torch.cat(values) for name, values in zip(names, zip(*parts))}
    return result, {"seconds_rollout": sampled - start, "seconds_score": time.perf_counter() - sampled}


def rollout_metrics(batch, num_responses, beta):
    """Means of a rollout: reward, objective (reward - beta kl), kl and kl_exact (nats) per response; entropy
    (nats) and perplexity under the reference per token; response_length (tokens); eos_rate;
    frac_identical_pairs, of the pairs of responses to a prompt."""
    mask, tokens = batch["response_mask"], batch["response_mask"].sum()
    reward, kl = batch["score"].mean(), (batch["logp_old_tok"] - batch["logp_ref_tok"]).sum(1).mean()
    metrics = {"reward": reward, "objective": reward - beta * kl, "kl": kl}
    metrics["kl_exact"] = batch["kl_tok"].sum(1).mean()
    metrics["entropy"] = batch["entropy_tok"].sum() / tokens
    metrics["perplexity"] = (-batch["logp_ref_tok"].sum() / tokens).exp()
    metrics["response_length"] = tokens / len(mask)
    metrics["eos_rate"] = batch["ended"].float().mean()
    if num_responses > 1:
        ids = batch["response_ids"].masked_fill(~mask, -1).unflatten(0, (-1, num_responses))  # (B, K, R)
        i, j = torch.triu_indices(num_responses, num_responses, offset=1)
        metrics["frac_identical_pairs"] = (ids[:, i] == ids[:, j]).all(-1).float().mean()
    return {name: value.item() for name, value in metrics.items()}


def printable(text):
    """For the terminal: control characters are written out, so that no text can drive it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def cost_metrics(tokens, seconds):
    """Seconds by phase, response tokens per second of them all, peak memory (GPU, else the process)."""
    peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds | {"tokens_per_second": tokens / sum(seconds.values()), "peak_memory_gb": peak / 1e9}


def evaluate(step, models, held_out, eos_id, tokenizer, args):
    """eval_ metrics on held-out prompts, every time with the same seed; the texts go to samples.jsonl."""
    torch.manual_seed(args.seed * 10**6)
    batch, _ = rollout(models, held_out, 1, eos_id, tokenizer, args)
    kl = (batch["logp_old_tok"] - batch["logp_ref_tok"]).sum(1)
    for row, example in enumerate(held_out):
        ids = batch["response_ids"][row][batch["response_mask"][row]]
        text = {"prompt": example["prompt"], "response": tokenizer.decode(ids, skip_special_tokens=True)}
        numbers = {"reward": batch["score"][row].item(), "kl": kl[row].item()}
        append_jsonl(args, "samples.jsonl", {"step": step} | text | numbers)
    return {f"eval_{name}": value for name, value in rollout_metrics(batch, 1, args.beta).items()}


def print_result(args, seconds):
    """The last line: what the policy reached on the held-out prompts, from what, and where it is."""
    rows = [json.loads(line) for line in open(Path(args.output_dir, "metrics.jsonl"))]
    before, after, kl = rows[0]["eval_reward"], rows[-1]["eval_reward"], rows[-1]["eval_kl"]
    reached = f"reward {before:.3f} -> {after:.3f} at KL {kl:.2f} nats/response on held-out prompts"
    print(f"{args.output_dir}: {reached}; {rows[-1]['step']} steps, {seconds / 60:.1f} minutes")


# ------------------------------------------------- checkpoints and failures (the same bytes in every script)
ZERO_ALLOWED = """seed eval_every save_every micro_batch_size beta reward_shift missing_eos_penalty margin
    lm_coef ptx_coef entropy_coef lam value_clip_range critic_warmup_steps""".split()
DATA_FILES = (".json", ".jsonl", ".gz", ".parquet")
MAY_CHANGE = ["resume", "overwrite", "steps", "save_every", "device"]
INPUTS = ["model", "reward_model", "dataset", "eval_dataset", "ptx_dataset"]
received_signals = []


class RunError(Exception):
    """An expected failure in one line: what is wrong; what to do. Exit status 2: the input, 1: the run."""

    def __init__(self, wrong, todo, status=2):
        super().__init__(f"{wrong}; {todo}")
        self.status = status


def require(condition, wrong, todo, status=2):
    if not condition:
        raise RunError(wrong, todo, status)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def is_findable(name):
    """A path that exists, or a name for the hub: owner/name, not a data file nor what a stage writes."""
    on_hub = re.fullmatch(r"(?!\.|out/|data/)[\w.-]+(/[\w.-]+)?", name) and not name.endswith(DATA_FILES)
    return Path(name).exists() or bool(on_hub)


def check_args(args):
    """Numbers in range, batches that divide, a device that works, a free output folder. Writes nothing."""
    for name, value in vars(args).items():
        low = 0 if name in ZERO_ALLOWED else 1 if type(value) is int else 1e-12
        in_range = type(value) not in (int, float) or low <= value <= 1e9
        require(in_range, f"--{name} {value} is out of range", f"give a number from {low} to 1e9")
    if hasattr(args, "minibatch_size"):
        args.micro_batch_size = args.micro_batch_size or args.minibatch_size
        n, m, k = (getattr(args, x, 0) for x in ("prompts_per_step", "minibatch_size", "micro_batch_size"))
        require(n % m == 0, f"--minibatch_size {m} does not divide --prompts_per_step {n}", "give a divisor")
        require(m % k == 0, f"--micro_batch_size {k} does not divide --minibatch_size {m}", "give a divisor")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        wrong = f"cannot use --device {args.device} ({first_line(error)})"
        raise RunError(wrong, "give cpu or cuda") from None
    folder, elsewhere = Path(args.output_dir).resolve(), "choose another --output_dir"
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    require(parent.is_dir() and os.access(parent, os.W_OK), f"{parent} cannot be written", elsewhere)
    inputs = [Path(getattr(args, name, None) or "").resolve() for name in INPUTS]
    inside = any(folder in (path, *path.parents) for path in inputs)
    require(not inside, f"--output_dir {folder} holds an input", elsewhere)
    if not folder.exists() or not any(folder.iterdir()):
        return
    require((folder / "args.json").exists(), f"{folder} holds files but no run", elsewhere)
    require(args.resume or args.overwrite, f"{folder} holds a run", f"--resume, --overwrite or {elsewhere}")
    require(not (args.resume and args.overwrite), "--resume and --overwrite are opposites", "give one")
    try:
        before = json.loads((folder / "args.json").read_text())["args"] if args.resume else vars(args)
        if args.resume and (folder / "checkpoint.pt").exists():
            torch.load(folder / "checkpoint.pt", weights_only=True, mmap=True)
    except Exception as error:  # not JSON, not a checkpoint, not readable
        wrong = f"cannot read args.json and checkpoint.pt in {folder} ({first_line(error)})"
        raise RunError(wrong, elsewhere) from None
    for name in [name for name in vars(args) if name not in MAY_CHANGE]:
        was, now = before.get(name), getattr(args, name)
        todo = f"on --resume only {', '.join(MAY_CHANGE[2:])} may change"
        require(was == now, f"--{name} was {was} and is now {now}", todo)


def open_run(args):
    """Makes the output folder. Returns the last checkpoint, {"step", "models", ...}, or None.

    On --resume the logs are cut back to that checkpoint, so that they end up without gaps or repeats.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    folder = Path(args.output_dir)
    for path in folder.glob("*") if args.overwrite else ():  # args.json stays, or this would be no run
        shutil.rmtree(path) if path.is_dir() else path.name == "args.json" or path.unlink()
    path, checkpoint = folder / "checkpoint.pt", None
    if path.exists():
        try:
            checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise RunError(f"cannot read {path} ({first_line(error)})", "give --overwrite") from None
        done = checkpoint["step"]
        require(done <= args.steps, f"{folder} has done {done} steps of {args.steps}", "raise --steps")
    folder.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(Path(__file__).absolute().parent), "rev-parse", "HEAD"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {name: version(name) for name in ("torch", "transformers", "datasets")}
    record = {"args": vars(args), "versions": versions, "git_commit": commit or None}
    new = Path(f"{folder}.args.json")  # beside the folder, which is empty or holds a whole args.json
    new.write_text(json.dumps(record, indent=2))
    os.replace(new, folder / "args.json")
    for log in folder.glob("*.jsonl"):
        os.truncate(log, checkpoint["log_sizes"].get(log.name, 0) if checkpoint else 0)
    return checkpoint


def on_signal(number, frame):
    """Lets the step finish and save; the same signal again ends at once."""
    received_signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def append_jsonl(args, name, row):
    with open(Path(args.output_dir, name), "a") as file:
        file.write(json.dumps(row) + "\n")


def save_checkpoint(args, step, models, tokenizer, state):
    """Writes checkpoint.pt, all that --resume needs, beside and moves it into place; then exports the models.

    models: {subfolder: model}, "" for the main one. state: what else the script needs, tensors and values.
    """
    path, new = Path(args.output_dir, "checkpoint.pt"), Path(args.output_dir, "checkpoint.pt.new")
    finite = all(p.isfinite().all() for model in models.values() for p in model.parameters())
    if not finite:
        raise RunError(f"weights are not finite after step {step}", last_checkpoint(args), 1)
    state = state | {"step": step, "models": {name: model.state_dict() for name, model in models.items()}}
    state["log_sizes"] = {log.name: log.stat().st_size for log in path.parent.glob("*.jsonl")}
    try:
        torch.save(state, new)
        os.replace(new, path)
        export_models(args, models, tokenizer)
    except Exception as error:  # a full disk shows as OSError, RuntimeError or SafetensorError
        new.unlink(missing_ok=True)
        todo = f"make room and --resume; {last_checkpoint(args)}"
        raise RunError(f"cannot save step {step} ({first_line(error)})", todo, 1) from None


def export_models(args, models, tokenizer):
    """Ordinary save_pretrained folders, written beside and moved into place file by file."""
    new = Path(args.output_dir, "new")
    for name, model in models.items():
        model.save_pretrained(new / name)
        tokenizer.save_pretrained(new / name)
        Path(args.output_dir, name).mkdir(exist_ok=True)
    for path in [path for path in new.rglob("*") if path.is_file()]:
        os.replace(path, Path(args.output_dir, path.relative_to(new)))
    shutil.rmtree(new)


def last_checkpoint(args):
    path = Path(args.output_dir, "checkpoint.pt")
    step = torch.load(path, weights_only=True)["step"] if path.exists() else None
    return f"the last good checkpoint is step {step} in {path}" if step else "there is no checkpoint yet"


def require_finite(args, step, **values):
    """Stops the run before a bad gradient reaches the weights."""
    for name, value in values.items():
        if not math.isfinite(value):
            todo = f"lower --learning_rate in a new run; {last_checkpoint(args)}"
            raise RunError(f"{name} is {value} at step {step}", todo, 1)


def end_step(args, step, metrics, models, tokenizer, state):
    """Logs a finished step; saves when due, after the last, or when a signal asks to stop, and then exits."""
    require_finite(args, step, **{name: x for name, x in metrics.items() if isinstance(x, float)})
    append_jsonl(args, "metrics.jsonl", {"step": step} | metrics)
    stop = list(received_signals)  # once: a signal that comes after this line waits for the next step
    if stop or step == args.steps or (args.save_every and step % args.save_every == 0):
        save_checkpoint(args, step, models, tokenizer, state)
    if stop:
        print(f"stopped after step {step} of {args.steps} and saved; go on with --resume", file=sys.stderr)
        sys.exit(128 + stop[0])


def guard(main, args_class):
    """Parses the command line and runs main(args). Expected failures become one line and an exit status."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(60)  # above CRITICAL: what it reports as errors, we raise
    parser = HfArgumentParser(args_class, allow_abbrev=False)
    parser.error = lambda message: require(False, message, "see --help")
    parse = {"look_for_args_file": False, "return_remaining_strings": True}
    try:
        args, unknown = parser.parse_args_into_dataclasses(**parse)
        require(not unknown, f"unknown argument {' '.join(unknown)}", "see --help")
        return main(args)
    except RunError as error:
        message, status = error, error.status
    except torch.OutOfMemoryError:
        message, status = "out of memory; lower --micro_batch_size or lengths, or use --dtype bfloat16", 1
    except (OSError, SafetensorError) as error:
        message, status = f"{first_line(error)}; make room or mend the permissions, and go on", 1
    except KeyboardInterrupt:
        message, status = "interrupted; what was saved is kept", 130
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"error: {message}")
    print(line, file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------------------------------------ main
def rank_pairs(batch, labels="ranked"):
    """A rollout of 2 responses per prompt, (N, ...) tensors, with the chosen response of each pair first.

    labels: "ranked", the higher score is chosen; "sampled", Gumbel noise on the scores makes it a draw by
    Bradley-Terry, P(y_1 chosen) = sigmoid(r_1 - r_2). Ties keep the order of sampling, a fair coin too;
    identical responses give no gradient.
    """
    score = batch["score"].view(-1, 2)
    if labels == "sampled":
        score = score - torch.empty_like(score).exponential_().log()
    order = score.argsort(dim=1, descending=True, stable=True)  # (B, 2)
    rows = (2 * torch.arange(len(order), device=order.device).unsqueeze(1) + order).flatten()
    return {name: value[rows] for name, value in batch.items()}


@torch.no_grad()
def read_pairs(reference, examples, pad_id, args):
    """Pairs of the data in the form of a ranked rollout: tensors of N rows, and seconds by phase."""
    start, prompts = time.perf_counter(), [e["prompt_ids"] for e in examples for _ in range(2)]
    responses = [ids for e in examples for ids in e["response_ids"]]
    batch = *pad(prompts, "left", pad_id, args.device), *pad(responses, "right", pad_id, args.device)
    parts = zip(*(x.split(2 * args.micro_batch_size) for x in batch))
    result = dict(zip(("prompt_ids", "prompt_mask", "response_ids", "response_mask"), batch))
    result["logp_ref_tok"] = torch.cat([response_logps(reference, *part, args.temperature) for part in parts])
    return result, {"seconds_score": time.perf_counter() - start}


def pairs_loss(policy, batch, pairs, args):
    """dpo_loss on some of the B pairs of a batch that has each chosen response first, and metrics."""
    rows = (2 * pairs.unsqueeze(1) + torch.arange(2)).flatten()
    inputs = [batch[x][rows] for x in ("prompt_ids", "prompt_mask", "response_ids", "response_mask")]
    logp_seq = response_logps(policy, *inputs, args.temperature).sum(1).view(-1, 2)
    ref_seq = batch["logp_ref_tok"][rows].sum(1).view(-1, 2)
    loss, stats = dpo_loss(*logp_seq.unbind(1), *ref_seq.unbind(1), args.beta)
    return loss, {"loss": loss.item()} | stats


def update_on_pairs(policy, optimizer, batch, pairs, step, args):
    """An optimizer step on a minibatch of pairs; micro-batches add up to its gradient. Returns metrics."""
    total = defaultdict(float)
    for micro in pairs.split(args.micro_batch_size):
        loss, metrics = pairs_loss(policy, batch, micro, args)
        share = len(micro) / len(pairs)
        (loss * share).backward()
        for name, value in metrics.items():
            total[name] += value * share
    total["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).item()
    require_finite(args, step, loss=total["loss"], grad_norm=total["grad_norm"])
    optimizer.step()
    optimizer.zero_grad()
    return total


@torch.no_grad()
def evaluate_pairs(models, examples, pad_id, args):
    """eval_loss, eval_accuracy and the other stats of dpo_loss on held-out preference pairs, if any."""
    total, size = defaultdict(float), args.micro_batch_size
    for part in [examples[i : i + size] for i in range(0, len(examples), size)]:
        batch, _ = read_pairs(models[1], part, pad_id, args)
        for name, value in pairs_loss(models[0], batch, torch.arange(len(part)), args)[1].items():
            total[f"eval_{name}"] += value * len(part) / len(examples)
    return total


def check_mode(args):
    """Fills in the defaults that --online decides."""
    args.output_dir = args.output_dir or ("out/dpo_online" if args.online else "out/dpo")
    args.eval_dataset = args.eval_dataset or args.dataset or "data/toy/prompts"
    args.dataset = args.dataset or ("data/toy/prompts" if args.online else "data/toy/preferences")
    args.epochs = 1 + args.online if args.epochs is None else args.epochs
    args.prompts_per_step = args.prompts_per_step if args.online else args.minibatch_size
    require(args.beta > 0, f"--beta {args.beta} is out of range", "DPO learns nothing at 0: give more")


def main(args):
    check_mode(args)
    check_args(args)
    tokenizer, pairs = load_tokenizer(args.model), []
    pad_id, responses = tokenizer.pad_token_id, 0 if args.online else 2
    train, train_eos_id = read_examples(args.dataset, ["train"], responses, tokenizer, args)
    held_out_splits, limit = ["validation", "test"], args.eval_prompts
    held_out, eos_id = read_examples(args.eval_dataset, held_out_splits, 0, tokenizer, args, limit)
    if not args.online:
        pairs, _ = read_examples(args.dataset, held_out_splits, 2, tokenizer, args, limit)
        args.steps = args.steps or math.ceil(args.epochs * len(train) / args.minibatch_size)
    args.steps = args.steps or 60
    require(
        train_eos_id == eos_id, "only one of --dataset and --eval_dataset holds conversations", "match them"
    )
    policy, reference = (load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
    models = policy, reference.requires_grad_(False), *load_reward_model(args.reward_model, tokenizer, args)
    settings = {"lr": args.learning_rate, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(policy.parameters(), **settings)
    checkpoint, start = open_run(args), time.perf_counter()
    done = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        policy.load_state_dict(checkpoint["models"][""])
        optimizer.load_state_dict(checkpoint["optimizer"])
        export_models(args, {"": policy}, tokenizer)  # in case the run was killed while it did so
    else:
        metrics = evaluate(0, models, held_out, eos_id, tokenizer, args)
        metrics |= evaluate_pairs(models, pairs, pad_id, args)
        append_jsonl(args, "metrics.jsonl", {"step": 0} | metrics)

    for step in tqdm(range(done + 1, args.steps + 1), "dpo", args.steps, initial=done, disable=None):
        torch.manual_seed(args.seed * 10**6 + step)  # every step draws afresh: no random state to save
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (step - 1) / args.steps)
        rows = data_order(len(train), args.prompts_per_step, step, args.seed)
        examples, metrics = [train[row] for row in rows], {}
        # 1. Preference pairs with their reference log-probs: of the data, or sampled from pi and ranked.
        if args.online:
            batch, seconds = rollout(models, examples, 2, eos_id, tokenizer, args)
            batch, metrics = rank_pairs(batch, args.labels), rollout_metrics(batch, 2, args.beta)
        else:
            batch, seconds = read_pairs(reference, examples, pad_id, args)
        # 2. Descend the loss: online, epochs of minibatches; offline, the minibatch.
        updates, clock = [], time.perf_counter()
        for _ in range(args.epochs if args.online else 1):
            for minibatch in torch.randperm(len(rows)).split(args.minibatch_size):
                updates.append(update_on_pairs(policy, optimizer, batch, minibatch, step, args))
        # 3. Log, evaluate, save.
        seconds["seconds_update"] = time.perf_counter() - clock
        metrics |= {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        metrics |= cost_metrics(batch["response_mask"].sum().item(), seconds)
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate(step, models, held_out, eos_id, tokenizer, args)
            metrics |= evaluate_pairs(models, pairs, pad_id, args)
        end_step(args, step, metrics, {"": policy}, tokenizer, {"optimizer": optimizer.state_dict()})
    print_result(args, time.perf_counter() - start)


if __name__ == "__main__":
    guard(main, Args)
