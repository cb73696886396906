"""Stage 3 baseline: DPO, Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

    python dpo.py             the embedded task, after reward_model.py; other models: README.md
    python dpo.py --online    the same loss on two fresh responses per prompt, ranked by the reward model

The first ends, on two x86 cores, with
    out/dpo: reward 2.359 at KL 1.36 nats/response on held-out prompts; 625 steps, 1.9 minutes

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
    online: bool = flag(False, "learn from fresh responses, two per prompt, ranked by the reward model")
    labels: Literal["ranked", "sampled"] = flag("ranked", "online winner: higher score, or by Bradley-Terry")
    dataset: str | None = flag(None, "None: data/toy/preferences, online data/toy/prompts; see data.py")
    output_dir: str | None = flag(None, "folder of this run; None: out/dpo, online out/dpo_online")
    seed: int = flag(0, "of data order and sampling")
    device: str = flag("auto", "auto (cuda when there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16: autocast, over float32 weights")
    learning_rate: float = flag(1e-4, "Adam, falls linearly to 0; 5e-7 to 5e-6 for pretrained models")
    steps: int | None = flag(None, "online: rollouts, None: 60; offline: optimizer steps, None: by --epochs")
    prompts_per_step: int = flag(64, "online: B, prompts per rollout; offline a step is one minibatch")
    epochs: int | None = flag(None, "passes over each rollout, None: 2; offline over the data, None: 1")
    minibatch_size: int = flag(32, "pairs per optimizer step")
    micro_batch_size: int = flag(0, "pairs per forward pass, to save memory; 0: the minibatch")
    beta: float = flag(0.5, "weight of the KL to the SFT model; 0.1 in the paper")
    missing_eos_penalty: float = flag(1.0, "subtracted from the score of a response cut off without EOS")
    temperature: float = flag(1.0, "divides the logits, when sampling and in every log-prob")
    prompt_length: int = flag(32, "tokens; rows with longer prompts are left out and counted")
    response_length: int = flag(24, "tokens sampled at most, EOS included; longer responses are left out")
    max_grad_norm: float = flag(1.0, "global gradient-norm clip")
    eval_every: int = flag(20, "steps between evaluations on held-out rows; 0: only before and after")
    eval_prompts: int = flag(256, "held-out prompts of an evaluation, and offline held-out pairs")
    save_every: int = flag(20, "steps between checkpoints; 0: only the last")
    resume: bool = flag(False, "go on; steps, save_every, micro_batch_size, device may differ")
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
    loss = -torch.nn.functional.logsigmoid(margin).mean()
    return loss, {name: value.detach().mean().item() for name, value in stats.items()}


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
def rank_pairs(batch, labels="ranked"):
    """A batch of 2 responses per prompt, N rows, as pairs: its tensors with each chosen response first.

    labels: "ranked", the higher score is chosen; "sampled", Gumbel noise on the scores makes it a draw by
    Bradley-Terry, P(y_1 chosen) = sigmoid(r_1 - r_2). Ties keep the order of sampling, a fair coin too;
    identical responses give no gradient.
    """
    score = batch["score"].view(-1, 2)
    if labels == "sampled":
        score = score - torch.empty_like(score).exponential_().log()
    order = score.argsort(dim=1, descending=True, stable=True)  # (B, 2)
    rows = (2 * torch.arange(len(order), device=order.device).unsqueeze(1) + order).flatten()
    return {name: batch[name][rows] for name in (*TOKENS, "logp_ref_tok")}


@torch.no_grad()
def read_pairs(reference, rows, tokenizer, args):
    """Pairs of the data in the form of rank_pairs: tensors of N rows, each chosen response first."""
    prompts = [row["prompt_ids"] for row in rows for _ in range(2)]
    responses = [ids for row in rows for ids in row["response_ids"]]
    tokens = *pad(prompts, "left", tokenizer, args.device), *pad(responses, "right", tokenizer, args.device)
    logps, size = [], 2 * args.micro_batch_size
    for first in range(0, len(responses), size):
        part = [x[first : first + size] for x in tokens]
        with autocast(args):
            logps.append(response_logps(reference, *part, args.temperature))
    return dict(zip(TOKENS, tokens)) | {"logp_ref_tok": torch.cat(logps)}


def pairs_loss(policy, batch, pairs, args):
    """dpo_loss on some of the B pairs of a batch that has each chosen response first, and metrics."""
    rows = (2 * pairs.unsqueeze(1) + torch.arange(2)).flatten()
    with autocast(args):
        logp_tok = response_logps(policy, *(batch[x][rows] for x in TOKENS), args.temperature)
    logp_chosen_seq, logp_rejected_seq = logp_tok.sum(1).view(-1, 2).unbind(1)
    ref_chosen_seq, ref_rejected_seq = batch["logp_ref_tok"][rows].sum(1).view(-1, 2).unbind(1)
    loss, stats = dpo_loss(logp_chosen_seq, logp_rejected_seq, ref_chosen_seq, ref_rejected_seq, args.beta)
    return loss, {"loss": loss.item()} | stats


def update_on_pairs(policy, optimizer, batch, minibatch, step, args):
    """An optimizer step on a minibatch of pairs; micro-batches add up to its gradient. Returns metrics."""
    total = defaultdict(float)
    for pairs in minibatch.split(args.micro_batch_size):
        loss, metrics = pairs_loss(policy, batch, pairs, args)
        share = len(pairs) / len(minibatch)
        (loss * share).backward()
        for name, value in metrics.items():
            total[name] += value * share
    total["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).item()
    finite = math.isfinite(total["loss"] + total["grad_norm"])  # before it reaches the weights
    todo = f"lower --learning_rate in a new run; the last checkpoint, if any, in {args.output_dir} is good"
    require(finite, f"step {step} is not finite, {dict(total)}; {todo}", 1)
    optimizer.step()
    optimizer.zero_grad()
    return total


@torch.no_grad()
def evaluate_pairs(models, rows, tokenizer, args):
    """eval_loss, eval_accuracy and the other stats of dpo_loss on held-out preference pairs, if any."""
    total, size = defaultdict(float), args.micro_batch_size
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        batch = read_pairs(models[1], part, tokenizer, args)
        for name, value in pairs_loss(models[0], batch, torch.arange(len(part)), args)[1].items():
            total[f"eval_{name}"] += value * len(part) / len(rows)
    return total


def set_mode(args):
    """Fills in the defaults that --online decides. Offline a step is one minibatch of pairs of the data."""
    if args.online:
        defaults = {"dataset": "data/toy/prompts", "output_dir": "out/dpo_online", "epochs": 2, "steps": 60}
    else:
        defaults = {"dataset": "data/toy/preferences", "output_dir": "out/dpo", "epochs": 1}
        args.prompts_per_step = args.minibatch_size
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def main(args):
    set_mode(args)
    check_args(args, "seed micro_batch_size missing_eos_penalty eval_every save_every")
    args.micro_batch_size = args.micro_batch_size or args.minibatch_size
    B = args.prompts_per_step
    require(B % args.minibatch_size == 0, "--minibatch_size does not divide --prompts_per_step; alter it")
    tokenizer, columns = load_tokenizer(args.model), [] if args.online else ["chosen", "rejected"]
    train = read_rows(args.dataset, ["train"], columns, tokenizer, args)
    held_out = read_rows(args.dataset, ["validation", "test"], columns, tokenizer, args, args.eval_prompts)
    pairs = [] if args.online else held_out
    args.steps = args.steps or math.ceil(args.epochs * len(train) / args.minibatch_size)
    policy, reference = (load_model(AutoModelForCausalLM, args.model, tokenizer, args) for _ in range(2))
    models = policy, reference.requires_grad_(False), load_reward(tokenizer, args)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.95), eps=1e-5, fused=True)
    parts, start = {"": policy, "optimizer": optimizer}, time.perf_counter()
    done, metrics = open_run(args, parts)
    if not metrics:
        metrics = evaluate(0, models, held_out, tokenizer, args)
        metrics |= evaluate_pairs(models, pairs, tokenizer, args)
        end_step(args, 0, metrics, parts, tokenizer)

    bar = tqdm(range(done + 1, args.steps + 1), "dpo", args.steps, initial=done, disable=None)
    for step in bar:
        torch.manual_seed(args.seed * 10**6 + step)  # every step draws afresh: no random state to save
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (step - 1) / args.steps)
        order, clock = data_order(len(train), B, step, args.seed), [time.perf_counter()]
        rows, metrics = [train[row] for row in order], {}
        # 1. Preference pairs with their reference log-probs: sampled from pi and ranked, or of the data.
        if args.online:
            batch = sample_batch(policy, rows, 2, tokenizer, args)
            clock.append(time.perf_counter())
            batch = score_batch(batch, models, 2 * args.micro_batch_size, args)
            batch, metrics = rank_pairs(batch, args.labels), batch_metrics(batch, 2, args.beta)
        else:
            clock.append(time.perf_counter())
            batch = read_pairs(reference, rows, tokenizer, args)
        clock.append(time.perf_counter())
        # 2. Descend the loss: online, epochs of minibatches; offline, the minibatch.
        updates = []
        for _ in range(args.epochs if args.online else 1):
            for minibatch in torch.randperm(B).split(args.minibatch_size):
                updates.append(update_on_pairs(policy, optimizer, batch, minibatch, step, args))
        clock.append(time.perf_counter())
        # 3. Log, evaluate, save.
        metrics |= {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        metrics |= cost_metrics(batch, clock)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{metrics['accuracy']:.2f}")
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate(step, models, held_out, tokenizer, args)
            metrics |= evaluate_pairs(models, pairs, tokenizer, args)
        end_step(args, step, metrics, parts, tokenizer)
    reached = f"reward {metrics['eval_reward']:.3f} at KL {metrics['eval_kl']:.2f} nats/response"
    minutes = (time.perf_counter() - start) / 60
    print(f"{args.output_dir}: {reached} on held-out prompts; {args.steps} steps, {minutes:.1f} minutes")


if __name__ == "__main__":
    guard(main, Args)
