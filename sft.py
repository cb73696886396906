"""Stage 1: supervised fine-tuning, token cross-entropy on demonstrations.

    python sft.py     the embedded task, after toy.py; other models and data: data.py, README.md

ends, on two x86 cores, with
    out/sft: perplexity 3.52 on 500 held-out rows; 1125 steps, 0.6 minutes

    maximise  log pi(y|x)  over completion tokens, prompt masked out, EOS inside        completion_loss

Without EOS in the loss the policy would never stop. For conversations EOS is the token that ends a turn:
data.py found it, here it becomes the tokenizer's eos_token, and so that of every later stage.

Legend: B rows, T tokens, P prompt length, R response length, V vocabulary. Prompts are padded on the left,
responses on the right. Masks are boolean, True counts.
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    model: str = flag("data/toy/model", "hub name or folder; one without weights is initialised at random")
    dataset: str = flag("data/toy/sft", "hub name or folder: text columns prompt, completion; see data.py")
    output_dir: str = flag("out/sft", "folder of this run")
    seed: int = flag(0, "of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda when there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16: autocast, over float32 weights")
    learning_rate: float = flag(3e-3, "Adam, rises, then falls to 0; 1e-5 to 5e-5 for pretrained models")
    epochs: int = flag(2, "passes over the data")
    steps: int | None = flag(None, "optimizer steps instead of --epochs")
    minibatch_size: int = flag(32, "rows per optimizer step")
    micro_batch_size: int = flag(0, "rows per forward pass, to save memory; 0: the minibatch")
    temperature: float = flag(1.0, "of the printed samples")
    prompt_length: int = flag(32, "tokens; rows with longer prompts are left out and counted")
    response_length: int = flag(24, "tokens, EOS included; rows with longer completions are left out")
    max_grad_norm: float = flag(1.0, "global gradient-norm clip")
    eval_every: int = flag(250, "steps between evaluations on held-out rows; 0: only before and after")
    eval_rows: int = flag(500, "held-out rows of an evaluation")
    save_every: int = flag(100, "steps between checkpoints; 0: only the last")
    resume: bool = flag(False, "go on; steps, save_every, micro_batch_size, device may differ")
    overwrite: bool = flag(False, "replace the run in output_dir")


# ------------------------------------------------------------------------------------------- the mathematics
def completion_loss(logits, tokens, completion_mask):
    """-mean of log p(token_t | tokens_<t) over the tokens of completion_mask, in nats per token.

    logits (B, T, V), at t for token t + 1; tokens, completion_mask (B, T). Returns a float32 scalar.
    """
    predicted = completion_mask[:, 1:]
    logps = torch.log_softmax(logits[:, :-1][predicted].float(), -1)  # (tokens, V)
    return -logps.gather(-1, tokens[:, 1:][predicted].unsqueeze(-1)).mean()


def lr_share(step, steps):
    """Share of --learning_rate at step 1, 2, ...: rises over the first tenth of the steps, then falls to 0.

    Without the rise the toy's SFT model hardly learns to copy what the prompt asks for.
    """
    return min(step / (0.1 * steps), (1 - (step - 1) / steps) / 0.9)


# ---------------------------------------------------------------------------------------------------- tokens
def pad(sequences, side, tokenizer, device):
    """Token lists -> ids (N, L), mask (N, L), padded to the longest on `side`, "left" or "right"."""
    rows = tokenizer.pad({"input_ids": sequences}, padding_side=side, return_tensors="pt").to(device)
    return rows["input_ids"], rows["attention_mask"].bool()


def model_inputs(prompt_ids, prompt_mask, response_ids, response_mask):
    """Joins prompts and responses for a forward pass. Positions count real tokens: padding shifts nothing."""
    ids = torch.cat([prompt_ids, response_ids], 1)
    mask = torch.cat([prompt_mask, response_mask], 1).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


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


def load_or_create_model(tokenizer, args):
    """The model to fine-tune. A folder with a config and no weights (the toy's) is initialised at random."""
    folder = Path(args.model)
    if not folder.is_dir() or any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin*")):
        return load_model(AutoModelForCausalLM, args.model, tokenizer, args)
    torch.manual_seed(args.seed)
    with explained(f"cannot make a model from {args.model!r}", "give a folder with config.json"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().to(args.device)
    need = args.prompt_length + args.response_length
    most = getattr(model.config, "max_position_embeddings", None) or need
    require(need <= most, f"{args.model!r} holds {most} tokens, not {need}; lower --prompt_length")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.model} holds no weights: initialised at random, {size:.2f}M parameters", flush=True)
    return model.eval()


# ------------------------------------------------------------------------------------------------ evaluation
def autocast(args):
    """--dtype bfloat16: forward passes in bfloat16 over float32 weights, where small updates are not lost."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def batch_loss(model, rows, tokenizer, args):
    """completion_loss of rows, and the number of their completion tokens."""
    prompt = pad([row["prompt_ids"] for row in rows], "left", tokenizer, args.device)
    response = pad([row["response_ids"][0] for row in rows], "right", tokenizer, args.device)
    inputs = model_inputs(*prompt, *response)
    completion_mask = torch.cat([torch.zeros_like(prompt[1]), response[1]], 1)  # (B, P + R)
    with autocast(args):
        logits = model(**inputs, use_cache=False).logits
    return completion_loss(logits, inputs["input_ids"], completion_mask), response[1].sum().item()


@torch.no_grad()
def held_out_perplexity(step, model, rows, tokenizer, args):
    """eval_loss in nats per completion token, EOS included, and eval_perplexity = exp(eval_loss)."""
    total, tokens = 0.0, 0
    for first in range(0, len(rows), args.micro_batch_size):
        loss, count = batch_loss(model, rows[first : first + args.micro_batch_size], tokenizer, args)
        total, tokens = total + loss.item() * count, tokens + count
    perplexity = math.exp(min(total / tokens, 700))
    tqdm.write(f"step {step}: perplexity {perplexity:.3f} on held-out rows")
    return {"eval_loss": total / tokens, "eval_perplexity": perplexity}


def print_samples(model, rows, tokenizer, args):
    """Answers a few held-out prompts."""
    torch.manual_seed(args.seed * 10**6)
    ids, mask = pad([row["prompt_ids"] for row in rows], "left", tokenizer, args.device)
    answers = model.generate(input_ids=ids, attention_mask=mask.long())[:, ids.shape[1] :]
    for row, answer in zip(rows, tokenizer.batch_decode(answers, skip_special_tokens=True)):
        print(f"  {row['prompt']!r} -> {answer!r}")  # repr: no text may drive the terminal


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
def update_on_rows(model, optimizer, rows, step, tokenizer, args):
    """An optimizer step on a minibatch of rows; micro-batches weigh as much as they have tokens."""
    start, metrics = time.perf_counter(), {"loss": 0.0}
    total = sum(len(row["response_ids"][0]) for row in rows)
    for first in range(0, len(rows), args.micro_batch_size):
        loss, tokens = batch_loss(model, rows[first : first + args.micro_batch_size], tokenizer, args)
        (loss * tokens / total).backward()  # a mean over the tokens of the whole minibatch
        metrics["loss"] += loss.item() * tokens / total
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
    finite = math.isfinite(metrics["loss"] + metrics["grad_norm"])  # before it reaches the weights
    todo = f"lower --learning_rate in a new run; the last checkpoint, if any, in {args.output_dir} is good"
    require(finite, f"step {step} is not finite, {dict(metrics)}; {todo}", 1)
    optimizer.param_groups[0]["lr"] = args.learning_rate * lr_share(step, args.steps)
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - start
    return metrics | {"seconds_update": seconds, "tokens_per_second": total / seconds}


def main(args):
    check_args(args, "seed micro_batch_size eval_every save_every")
    args.micro_batch_size = args.micro_batch_size or args.minibatch_size
    tokenizer = load_tokenizer(args.model)
    record = Path(args.dataset, "data.json")  # of data.py
    if record.exists():
        tokenizer.eos_token = json.loads(record.read_text())["eos_token"]
    train = read_rows(args.dataset, ["train"], ["completion"], tokenizer, args)
    splits = ["validation", "test"]
    held_out = read_rows(args.dataset, splits, ["completion"], tokenizer, args, args.eval_rows)
    args.steps = args.steps or math.ceil(args.epochs * len(train) / args.minibatch_size)
    model = load_or_create_model(tokenizer, args)
    config = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    config |= {"max_new_tokens": args.response_length, "remove_invalid_values": True}
    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = transformers.GenerationConfig(**config)  # saved too: it ends as it learnt to
    model.config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)
    parts, start = {"": model, "optimizer": optimizer}, time.perf_counter()
    done, metrics = open_run(args, parts)
    if not metrics:
        metrics = held_out_perplexity(0, model, held_out, tokenizer, args)
        end_step(args, 0, metrics, parts, tokenizer)

    bar = tqdm(range(done + 1, args.steps + 1), "sft", args.steps, initial=done, disable=None)
    for step in bar:
        # 1. Descend the cross-entropy of a minibatch.
        rows = [train[row] for row in data_order(len(train), args.minibatch_size, step, args.seed)]
        metrics = update_on_rows(model, optimizer, rows, step, tokenizer, args)
        # 2. Log, evaluate, save.
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= held_out_perplexity(step, model, held_out, tokenizer, args)
        if step == args.steps:
            print_samples(model, held_out[:3], tokenizer, args)
        end_step(args, step, metrics, parts, tokenizer)
    reached = f"perplexity {metrics['eval_perplexity']:.2f} on {len(held_out)} held-out rows"
    minutes = (time.perf_counter() - start) / 60
    print(f"{args.output_dir}: {reached}; {args.steps} steps, {minutes:.1f} minutes")


if __name__ == "__main__":
    guard(main, Args)
