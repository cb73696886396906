"""Stage 2: the Bradley-Terry reward model, learnt from preference pairs.

    python reward_model.py     the embedded task, after sft.py; other models: README.md

ends, on two x86 cores, with
    out/reward_model: accuracy 0.817, calibration error 0.012 on 1000 held-out pairs; 625 steps, 0.6 minutes

    P(y_w > y_l | x) = sigmoid(r(x, y_w) - r(x, y_l)),  L = -E log of it           bradley_terry_loss
    + lm_coef * E[-log pi(x, y_w)], on the chosen response [Secrets of RLHF, 2307.04964]    --lm_coef

The likelihood is the same for r(x, y) + delta(x): a reward model is only known up to an offset per prompt.
The score is read at the last response token, by position, from a head initialised N(0, 1 / sqrt(d + 1))
(standard deviation; d is the width) [N+ details, 2403.17031].

Legend: B pairs, P prompt length, R response length. Prompts are padded on the left, responses on the right.
Masks are boolean, True counts.
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
    model: str = flag("out/sft", "SFT model, the start of the reward model; a reward model keeps its head")
    dataset: str = flag("data/toy/preferences", "hub name or folder: text columns prompt, chosen, rejected")
    output_dir: str = flag("out/reward_model", "folder of this run")
    seed: int = flag(0, "of the score head and the data order")
    device: str = flag("auto", "auto (cuda when there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16: autocast, over float32 weights")
    learning_rate: float = flag(1e-3, "Adam, rises, then falls to 0; 1e-5 for pretrained models")
    epochs: int = flag(1, "passes over the data; more than one overfits")
    steps: int | None = flag(None, "optimizer steps instead of --epochs")
    minibatch_size: int = flag(32, "pairs per optimizer step")
    micro_batch_size: int = flag(0, "pairs per forward pass, to save memory; 0: the minibatch")
    margin: float = flag(0.0, "subtracted from the difference of the scores before the sigmoid")
    lm_coef: float = flag(0.0, "weight of the LM loss on chosen responses; 1 in the paper, 0 in its code")
    prompt_length: int = flag(32, "tokens; rows with longer prompts are left out and counted")
    response_length: int = flag(24, "tokens, EOS included; rows with longer responses are left out")
    max_grad_norm: float = flag(1.0, "global gradient-norm clip")
    eval_every: int = flag(125, "steps between evaluations on held-out pairs; 0: only before and after")
    eval_rows: int = flag(1000, "held-out pairs of an evaluation")
    save_every: int = flag(100, "steps between checkpoints; 0: only the last")
    resume: bool = flag(False, "go on; steps, save_every, micro_batch_size, device may differ")
    overwrite: bool = flag(False, "replace the run in output_dir")


# ------------------------------------------------------------------------------------------- the mathematics
def bradley_terry_loss(reward_chosen, reward_rejected, margin=0.0):
    """-mean log sigmoid(r(x, y_w) - r(x, y_l) - margin), nats per pair [P3O, sec. 2; Bradley and Terry 1952].

    reward_chosen, reward_rejected: (B,). Returns a scalar. The same for r + delta(x), any delta.
    """
    return -torch.nn.functional.logsigmoid(reward_chosen - reward_rejected - margin).mean()


def calibration(difference, bins=5):
    """How often the model is right when it says it is sure: ([[predicted, actual, pairs], ...], error).

    difference: (M,) scores of chosen less rejected. Pairs are binned by the probability in [0.5, 1] that the
    model gives to its favourite; predicted is its mean in the bin, actual the rate at which the favourite was
    the chosen one. error: the expected calibration error, the mean of |predicted - actual| over pairs.
    """
    confidence = difference.abs().sigmoid().double()  # (M,)
    right = (difference.sign().double() + 1) / 2  # ties half
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table, error = [], 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            predicted, actual = confidence[inside].mean().item(), right[inside].mean().item()
            table.append([predicted, actual, inside.sum().item()])
            error += inside.double().mean().item() * abs(predicted - actual)
    return table, error


def lr_share(step, steps):
    """Share of --learning_rate at step 1, 2, ...: rises over the first tenth of the steps, then falls to 0.

    Without the rise the toy's SFT model hardly learns to copy what the prompt asks for.
    """
    return min(step / (0.1 * steps), (1 - (step - 1) / steps) / 0.9)


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


def new_reward_model(tokenizer, args):
    """The SFT model with a fresh score head; with --lm_coef also a language model that shares its trunk."""
    options = {"may_miss": ["score.weight"], "num_labels": 1}
    model = load_model(AutoModelForSequenceClassification, args.model, tokenizer, args, **options)
    if "Classification" in str(model.config.architectures):
        print(f"{args.model} is a reward model: its head is trained further")
    else:
        torch.manual_seed(args.seed)
        torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    # The model's own forward, transformers', reads the token before the pads: EOS must not look like one.
    distinct = tokenizer.pad_token_id != tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id if distinct else None
    if not args.lm_coef:
        return model, None
    language_model = load_model(AutoModelForCausalLM, args.model, tokenizer, args)
    setattr(language_model, language_model.base_model_prefix, model.base_model)
    language_model.tie_weights()
    return model, language_model


# ------------------------------------------------------------------------------------------------ evaluation
def autocast(args):
    """--dtype bfloat16: forward passes in bfloat16 over float32 weights, where small updates are not lost."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def score_pairs(model, rows, tokenizer, args):
    """Scores of chosen and rejected responses, (B,) each, in one forward pass; and the chosen's tokens."""
    prompts = [row["prompt_ids"] for row in rows] * 2
    responses = [row["response_ids"][0] for row in rows] + [row["response_ids"][1] for row in rows]
    tokens = *pad(prompts, "left", tokenizer, args.device), *pad(responses, "right", tokenizer, args.device)
    with autocast(args):
        chosen, rejected = read_score(model, *tokens).chunk(2)
    return chosen, rejected, [x[: len(rows)] for x in tokens]


@torch.no_grad()
def pair_metrics(step, model, rows, tokenizer, args):
    """On held-out pairs: eval_loss (nats per pair), eval_accuracy, and calibration."""
    chosen, rejected = [], []
    for first in range(0, len(rows), args.micro_batch_size):
        pair = score_pairs(model, rows[first : first + args.micro_batch_size], tokenizer, args)
        chosen.append(pair[0])
        rejected.append(pair[1])
    chosen, rejected = torch.cat(chosen), torch.cat(rejected)
    metrics = {"eval_loss": bradley_terry_loss(chosen, rejected).item()}
    metrics["eval_accuracy"] = (chosen > rejected).float().mean().item()
    table, metrics["eval_calibration_error"] = calibration(chosen - rejected)
    tqdm.write(f"step {step}: accuracy {metrics['eval_accuracy']:.3f} on held-out pairs")
    return metrics | {"eval_calibration": table}


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
def update_on_scores(model, language_model, optimizer, rows, step, tokenizer, args):
    """An optimizer step on pairs; micro-batches add up to the gradient of the whole minibatch."""
    start, metrics = time.perf_counter(), {"loss": 0.0, "accuracy": 0.0}
    chosen_tokens = sum(len(row["response_ids"][0]) for row in rows)
    for first in range(0, len(rows), args.micro_batch_size):
        micro = rows[first : first + args.micro_batch_size]
        chosen, rejected, tokens = score_pairs(model, micro, tokenizer, args)
        loss = bradley_terry_loss(chosen, rejected, args.margin) * len(micro) / len(rows)
        if language_model:
            with autocast(args):
                logps = response_logps(language_model, *tokens)  # (b, R)
            loss = loss - args.lm_coef * logps.sum() / chosen_tokens
        loss.backward()
        metrics["loss"] += loss.item()
        metrics["accuracy"] += (chosen > rejected).sum().item() / len(rows)
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
    finite = math.isfinite(metrics["loss"] + metrics["grad_norm"])  # before it reaches the weights
    todo = f"lower --learning_rate in a new run; the last checkpoint, if any, in {args.output_dir} is good"
    require(finite, f"step {step} is not finite, {dict(metrics)}; {todo}", 1)
    optimizer.param_groups[0]["lr"] = args.learning_rate * lr_share(step, args.steps)
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - start
    all_tokens = chosen_tokens + sum(len(row["response_ids"][1]) for row in rows)
    return metrics | {"seconds_update": seconds, "tokens_per_second": all_tokens / seconds}


def main(args):
    check_args(args, "seed micro_batch_size margin lm_coef eval_every save_every")
    args.micro_batch_size = args.micro_batch_size or args.minibatch_size
    tokenizer = load_tokenizer(args.model)
    columns, held_out_splits = ["chosen", "rejected"], ["validation", "test"]
    train = read_rows(args.dataset, ["train"], columns, tokenizer, args)
    held_out = read_rows(args.dataset, held_out_splits, columns, tokenizer, args, args.eval_rows)
    args.steps = args.steps or math.ceil(args.epochs * len(train) / args.minibatch_size)
    model, language_model = new_reward_model(tokenizer, args)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)
    parts, start = {"": model, "optimizer": optimizer}, time.perf_counter()
    done, metrics = open_run(args, parts)
    if not metrics:
        metrics = pair_metrics(0, model, held_out, tokenizer, args)
        end_step(args, 0, metrics, parts, tokenizer)

    bar = tqdm(range(done + 1, args.steps + 1), "reward_model", args.steps, initial=done, disable=None)
    for step in bar:
        # 1. Descend the Bradley-Terry loss of a minibatch of pairs.
        rows = [train[row] for row in data_order(len(train), args.minibatch_size, step, args.seed)]
        metrics = update_on_scores(model, language_model, optimizer, rows, step, tokenizer, args)
        # 2. Log, evaluate, save.
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{metrics['accuracy']:.2f}")
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= pair_metrics(step, model, held_out, tokenizer, args)
        end_step(args, step, metrics, parts, tokenizer)
    print("held-out pairs by the model's confidence: predicted rate, actual rate, pairs")
    for predicted, actual, pairs in metrics["eval_calibration"]:
        print(f"  {predicted:.3f}  {actual:.3f}  {pairs:5d}")
    accuracy, error = metrics["eval_accuracy"], metrics["eval_calibration_error"]
    reached = f"accuracy {accuracy:.3f}, calibration error {error:.3f} on {len(held_out)} held-out pairs"
    minutes = (time.perf_counter() - start) / 60
    print(f"{args.output_dir}: {reached}; {args.steps} steps, {minutes:.1f} minutes")


if __name__ == "__main__":
    guard(main, Args)
