"""Supervised fine-tuning: a language model learns to answer prompts as the demonstrations in a data set do.

    python toy.py    # writes the model and the data set that are the defaults here
    python sft.py    # a minute on one CPU core; its last line:
    out/sft, step 1125: perplexity 3.51 on 500 held-out rows

    minimise  -log pi(y|x), the mean over the tokens of the completions y    completion_loss

The prompt x is not in the loss. EOS is in it, because a policy that has not learned EOS never stops. In a
conversation EOS has to be the token that ends a turn. data.py finds that token. Here it becomes the EOS of
the tokenizer, of the model's config and of its generation config, and all later stages use it.

Read completion_loss first, then train_step and batch_loss.

Notation: B rows, T tokens in a row, P prompt length, R response length, V vocabulary. Prompts are padded on
the left and responses on the right. Masks are boolean and True for real tokens.
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
from transformers import AutoModelForCausalLM, AutoTokenizer


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    model: str = flag("data/toy/model", "decoder-only language model to start from")
    dataset: str = flag("data/toy/sft", "hub name or folder; columns 'prompt' and 'completion' or 'chosen'")
    output_dir: str = flag("out/sft", "folder for the trained model, the logs and the checkpoint")
    seed: int = flag(0, "seed of the data order and of the samples that are shown")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16 is autocast: weights stay in float32")
    learning_rate: float = flag(3e-3, "Adam's rate, which rises and then falls; 1e-5 to 5e-5 if pretrained")
    epochs: int = flag(2, "passes over the data set, if --steps is not given")
    steps: int | None = flag(None, "number of optimizer steps; by default as many as --epochs takes")
    minibatch_size: int = flag(32, "rows per optimizer step")
    micro_batch_size: int = flag(32, "rows per forward and backward pass; a lower number saves memory")
    temperature: float = flag(1.0, "number that divides the logits when samples are drawn")
    prompt_length: int = flag(32, "longest prompt in tokens; rows with longer ones are left out")
    response_length: int = flag(24, "longest completion in tokens, EOS included; longer ones are left out")
    max_grad_norm: float = flag(1.0, "largest norm of the gradient; a longer gradient is scaled down to it")
    eval_every: int = flag(250, "steps between evaluations; there is one at step 0 and at the end")
    eval_rows: int = flag(500, "number of held-out rows to evaluate on")
    save_every: int = flag(100, "steps between checkpoints; there is one at step 0 and at the end")
    resume: bool = flag(False, "continue from the last checkpoint; most flags must stay the same")
    overwrite: bool = flag(False, "start again in an output_dir that already holds a run")


# ------------------------------------------------------------------------------------------- the mathematics
def completion_loss(logits, tokens, completion_mask):
    """-log p(token_t | tokens before t), in nats, averaged over the tokens where completion_mask is True.

    logits (B, T, V) at t predict token t + 1. tokens and completion_mask are (B, T). The loss is a scalar.
    The mean is over the tokens of all rows together, so a long completion weighs more than a short one.
    """
    predicted = completion_mask[:, 1:]  # (B, T - 1)
    logps = torch.log_softmax(logits[:, :-1][predicted].float(), -1)  # (completion tokens, V)
    return -logps.gather(-1, tokens[:, 1:][predicted].unsqueeze(-1)).mean()


def lr_share(step, steps):
    """The factor of --learning_rate at step 1, 2, ... It rises for a tenth of the steps and then falls to 0.

    Without the rise, the SFT model of the toy hardly learns to copy what the prompt asks for.
    """
    return min(step / (0.1 * steps), (1 - (step - 1) / steps) / 0.9)


# -------------------------------------------------------------------------------------- tokens and log-probs
# The functions from here to the main section are the same text in every training script that has them.
def pad_rows(prompt_ids, response_ids, tokenizer, args):
    """Pads N prompts on the left and N responses on the right. Returns a batch, a dict of tensors."""
    prompt = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
    response = tokenizer.pad({"input_ids": response_ids}, padding_side="right", return_tensors="pt")
    batch = {"prompt_ids": prompt["input_ids"], "prompt_mask": prompt["attention_mask"].bool()}
    batch |= {"response_ids": response["input_ids"], "response_mask": response["attention_mask"].bool()}
    return {name: rows.to(args.device) for name, rows in batch.items()}


def model_inputs(prompt_ids, prompt_mask, response_ids, response_mask):
    """Joins prompts and responses. Positions count real tokens only, so that padding shifts nothing."""
    ids = torch.cat([prompt_ids, response_ids], 1)  # (N, P + R)
    mask = torch.cat([prompt_mask, response_mask], 1).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


# ------------------------------------------------------------------------------------------- data and models
def check(condition, message):
    """Ends the program with a one-line error message if the condition does not hold."""
    if not condition:
        sys.exit(f"error: {message}")


def load_tokenizer_for_dataset(args):
    """Loads the model's tokenizer. Its EOS becomes the token that ends a turn in the data set."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    eos, record = tokenizer.eos_token, Path(args.dataset, "data.json")  # data.py writes this file
    eos = json.loads(record.read_text())["eos_token"] if record.exists() else eos
    known = eos in tokenizer.get_vocab() and len(tokenizer) > 1  # length 1: the tokenizer files are missing
    check(known, f"{args.model} has no tokenizer or no token {eos!r} in it, for EOS; use another model")
    tokenizer.eos_token, tokenizer.pad_token = eos, tokenizer.pad_token or eos
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


@torch.no_grad()
def probe_model(model, tokenizer, args):
    """Checks that hidden states do not change if padding stands before them or if other tokens follow."""
    batch = pad_rows(
        [[1, 2], [1]], [[0, tokenizer.eos_token_id], [2, 0]], tokenizer, args
    )  # both rows start with 1 2 0
    hidden = model.base_model(**model_inputs(**batch), use_cache=False).last_hidden_state  # (2, 4, D)
    unchanged = (hidden[0, :3] - hidden[1, 1:]).abs().max() <= 1e-3 * hidden.abs().max()  # false for NaN
    check(unchanged, f"{args.model} sees padding or later tokens, or is not finite; use a decoder-only model")


# ------------------------------------------------------------------------------------- losses and evaluation
def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def batch_loss(model, rows, tokenizer, args):
    """Returns the completion loss () of these rows and the number of their completion tokens."""
    prompt_ids = [row["prompt_ids"] for row in rows]
    response_ids = [row["response_ids"][0] for row in rows]
    batch = pad_rows(prompt_ids, response_ids, tokenizer, args)
    inputs = model_inputs(**batch)
    with autocast(args):
        logits = model(**inputs, use_cache=False).logits  # (B, P + R, V)
    completion_mask = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["response_mask"]], 1)
    loss = completion_loss(logits, inputs["input_ids"], completion_mask)
    return loss, batch["response_mask"].sum().item()


@torch.no_grad()
def held_out_perplexity(model, rows, tokenizer, args):
    """The mean loss, in nats per completion token with EOS, and the perplexity, which is exp of that."""
    total, tokens = 0.0, 0
    for first in range(0, len(rows), args.micro_batch_size):
        loss, count = batch_loss(model, rows[first : first + args.micro_batch_size], tokenizer, args)
        total, tokens = total + loss.item() * count, tokens + count
    return {"eval_loss": total / tokens, "eval_perplexity": math.exp(total / tokens)}


def print_samples(model, rows, tokenizer, args):
    """Prints a sampled response to each prompt. What the terminal's encoding lacks is printed as "?"."""
    torch.manual_seed(args.seed * 10**6)
    ids = {"input_ids": [row["prompt_ids"] for row in rows]}
    prompt = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(args.device)
    ids = model.generate(**prompt)[:, prompt["input_ids"].shape[1] :]
    for row, response in zip(rows, tokenizer.batch_decode(ids, skip_special_tokens=True)):
        text, encoding = f"  {row['prompt']!r} -> {response!r}", sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding))


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
def train_step(step, model, optimizer, train, tokenizer, args):
    """One optimizer step of supervised fine-tuning. Returns its metrics."""
    start, metrics = time.perf_counter(), {"loss": 0.0}
    optimizer.param_groups[0]["lr"] = args.learning_rate * lr_share(step, args.steps)
    # 1. Take the next minibatch of demonstrations.
    rows = [train[number] for number in data_order(len(train), args.minibatch_size, step, args.seed)]
    tokens = sum(len(row["response_ids"][0]) for row in rows)
    # 2. Compute the gradient of the mean loss over its completion tokens, in micro-batches.
    for first in range(0, len(rows), args.micro_batch_size):
        loss, count = batch_loss(model, rows[first : first + args.micro_batch_size], tokenizer, args)
        (loss * count / tokens).backward()
        metrics["loss"] += loss.item() * count / tokens
    # 3. Descend.
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
    finite = math.isfinite(metrics["loss"] + metrics["grad_norm"])
    check(finite, "the loss or its gradient is not finite; start again with a lower --learning_rate")
    optimizer.step()
    optimizer.zero_grad()
    return metrics | {"seconds": time.perf_counter() - start}


def main(args):
    check_args(args, may_be_zero=["seed"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # several times as fast, and precise enough
    torch.backends.cuda.enable_cudnn_sdp(False)  # its attention has given NaN gradients for padded rows
    try:
        tokenizer = load_tokenizer_for_dataset(args)
        train = read_rows(args.dataset, ["train"], ["completion"], tokenizer, args)
        held_out = read_rows(args.dataset, ["validation", "test"], ["completion"], tokenizer, args)
        held_out = held_out[: args.eval_rows]
        model = load_model(AutoModelForCausalLM, args.model, tokenizer, args)
    except (OSError, ValueError) as error:
        names = f"{args.model} or {args.dataset}"
        sys.exit(f"error: cannot load {names} ({str(error).splitlines()[0]}); run toy.py or data.py first")
    probe_model(model, tokenizer, args)
    args.steps = args.steps or math.ceil(args.epochs * len(train) / args.minibatch_size)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    sampling |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = transformers.GenerationConfig(**sampling, max_new_tokens=args.response_length)
    model.config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    first_step = open_run(model, optimizer, args)["step"] + 1
    bar = tqdm(range(first_step, args.steps + 1), "sft", args.steps + 1, initial=first_step, disable=None)
    for step in bar:  # step 0 only evaluates and saves the model as it is
        metrics = train_step(step, model, optimizer, train, tokenizer, args) if step > 0 else {}
        if step % args.eval_every == 0 or step == args.steps:
            metrics |= held_out_perplexity(model, held_out, tokenizer, args)
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss",) if name in metrics})
        with open(Path(args.output_dir, "metrics.jsonl"), "a") as log:
            log.write(json.dumps({"step": step, **metrics}) + "\n")
        if step % args.save_every == 0 or step == args.steps:
            save(step, model, optimizer, tokenizer, args)
        if step == args.steps:
            print_samples(model, held_out[:3], tokenizer, args)
        if "eval_perplexity" in metrics:
            reached = f"perplexity {metrics['eval_perplexity']:.2f} on {len(held_out)} held-out rows"
            tqdm.write(f"{args.output_dir}, step {step}: {reached}")


if __name__ == "__main__":
    parser = transformers.HfArgumentParser(Args, usage="python sft.py [--flag value ...]", allow_abbrev=False)
    main(Args(**vars(parser.parse_args())))
