"""The Bradley-Terry reward model: from pairs of responses it learns to score the preferred one higher.

    python sft.py             # the stage before, whose model is the start of the reward model
    python reward_model.py    # a minute on one CPU core; its last line:
    out/reward_model, step 625: accuracy 0.828, calibration error 0.024 on 1000 held-out pairs

    P(y_w > y_l | x) = sigmoid(r(x, y_w) - r(x, y_l)),    L = -E log P    bradley_terry_loss
    L + lm_coef * E[-log pi(y_w|x)], an option [Secrets]                  train_step

L does not change if a number delta(x) is added to all rewards of a prompt x, so preference data determine a
reward only up to an offset per prompt. The score is read at the last token of a response. A new score head
has random weights of standard deviation 1 / sqrt(d + 1), where d is the width of the hidden states [N+].

Read bradley_terry_loss first, then train_step and make_reward_model.

[Secrets] is "Secrets of RLHF", arXiv:2307.04964; [N+] is "The N+ Implementation Details", arXiv:2403.17031.
Notation: B pairs, P prompt length, R response length, y_w the chosen and y_l the rejected response. Prompts
are padded on the left and responses on the right. Masks are boolean and True for real tokens.
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    model: str = flag("out/sft", "SFT model to start from; if it is a reward model, it keeps its head")
    dataset: str = flag("data/toy/preferences", "hub name or folder; columns 'prompt', 'chosen', 'rejected'")
    output_dir: str = flag("out/reward_model", "folder for the trained model, the logs and the checkpoint")
    seed: int = flag(0, "seed of the score head and of the data order")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16 is autocast: weights stay in float32")
    learning_rate: float = flag(1e-3, "Adam's rate, which rises and then falls; about 1e-5 if pretrained")
    epochs: int = flag(1, "passes over the data set, if --steps is not given; more than one overfits")
    steps: int | None = flag(None, "number of optimizer steps; by default as many as --epochs takes")
    minibatch_size: int = flag(32, "pairs per optimizer step")
    micro_batch_size: int = flag(32, "pairs per forward and backward pass; a lower number saves memory")
    margin: float = flag(0.0, "number subtracted from the difference of the scores in the training loss")
    lm_coef: float = flag(0.0, "weight of the language-model loss on chosen responses; 1 in [Secrets]")
    prompt_length: int = flag(32, "longest prompt in tokens; pairs with longer ones are left out")
    response_length: int = flag(24, "longest response in tokens, EOS included; longer ones are left out")
    max_grad_norm: float = flag(1.0, "largest norm of the gradient; a longer gradient is scaled down to it")
    eval_every: int = flag(125, "steps between evaluations; there is one at step 0 and at the end")
    eval_rows: int = flag(1000, "number of held-out pairs to evaluate on")
    save_every: int = flag(100, "steps between checkpoints; there is one at step 0 and at the end")
    resume: bool = flag(False, "continue from the last checkpoint; most flags must stay the same")
    overwrite: bool = flag(False, "start again in an output_dir that already holds a run")


# ------------------------------------------------------------------------------------------- the mathematics
def bradley_terry_loss(reward_chosen, reward_rejected, margin=0.0):
    """-log sigmoid(r(x, y_w) - r(x, y_l) - margin), in nats per pair [Bradley and Terry 1952; P3O, sec. 2].

    Both rewards are (B,). The loss () is a mean over pairs. It is the same for r + delta(x), for any delta.
    """
    return -torch.nn.functional.logsigmoid(reward_chosen - reward_rejected - margin).mean()


def calibration_error(difference, bins=5):
    """The expected calibration error: is the model right about 80% of the pairs of which it is 80% sure?

    difference (M,) is r(x, y_w) - r(x, y_l). Pairs are put into bins by how sure the model is of the response
    with the higher reward. Returns |mean probability - share of right pairs| of the bin, averaged over pairs.
    """
    sure = difference.abs().sigmoid().double()  # (M,)
    right = (difference.sign().double() + 1) / 2  # a tie is half right: (M,)
    number = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)  # the bin of each pair: (M,)
    return sum((sure - right)[number == i].sum().abs().item() for i in range(bins)) / len(difference)


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


@torch.no_grad()
def probe_model(model, tokenizer, args):
    """Checks that hidden states do not change if padding stands before them or if other tokens follow."""
    batch = pad_rows(
        [[1, 2], [1]], [[0, tokenizer.eos_token_id], [2, 0]], tokenizer, args
    )  # both rows start with 1 2 0
    hidden = model.base_model(**model_inputs(**batch), use_cache=False).last_hidden_state  # (2, 4, D)
    unchanged = (hidden[0, :3] - hidden[1, 1:]).abs().max() <= 1e-3 * hidden.abs().max()  # false for NaN
    check(unchanged, f"{args.model} sees padding or later tokens, or is not finite; use a decoder-only model")


def make_reward_model(tokenizer, args):
    """Loads the SFT model with a new score head, or a reward model with the head that it has.

    For --lm_coef it also returns a language model with the same layers. Its own output layer is not trained.
    """
    has_head = "Classification" in str(AutoConfig.from_pretrained(args.model).architectures)
    options = {"may_lack": [] if has_head else ["score.weight"], "num_labels": 1}
    model = load_model(AutoModelForSequenceClassification, args.model, tokenizer, args, **options)
    if not has_head:
        torch.manual_seed(args.seed)
        torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    # transformers' own forward pass reads the score before the first pad, so EOS must not look like one.
    distinct = tokenizer.pad_token_id != tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id if distinct else None
    if not args.lm_coef:
        return model, None
    language_model = load_model(AutoModelForCausalLM, args.model, tokenizer, args)
    setattr(language_model, language_model.base_model_prefix, model.base_model)
    language_model.tie_weights()
    return model, language_model


# ------------------------------------------------------------------------------------- scores and evaluation
def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def score_pairs(model, rows, tokenizer, args):
    """Scores pairs in one forward pass. Returns r(x, y_w) (B,), r(x, y_l) (B,) and their 2 B rows."""
    prompt_ids = [row["prompt_ids"] for row in rows] * 2
    response_ids = [row["response_ids"][i] for i in (0, 1) for row in rows]  # first all the chosen ones
    batch = pad_rows(prompt_ids, response_ids, tokenizer, args)
    with autocast(args):
        reward_chosen, reward_rejected = read_score(model, **batch).chunk(2)
    return reward_chosen, reward_rejected, batch


@torch.no_grad()
def held_out_accuracy(step, model, rows, tokenizer, args):
    """The loss in nats per pair, the accuracy and the calibration error on held-out pairs."""
    rewards, size = [], args.micro_batch_size
    for first in range(0, len(rows), size):
        rewards.append(torch.stack(score_pairs(model, rows[first : first + size], tokenizer, args)[:2]))
    reward_chosen, reward_rejected = torch.cat(rewards, 1)  # (M,) each
    metrics = {"eval_loss": bradley_terry_loss(reward_chosen, reward_rejected).item()}
    metrics["eval_accuracy"] = (reward_chosen > reward_rejected).float().mean().item()
    metrics["eval_calibration_error"] = calibration_error(reward_chosen - reward_rejected)
    text = "accuracy {eval_accuracy:.3f}, calibration error {eval_calibration_error:.3f}".format(**metrics)
    tqdm.write(f"{args.output_dir}, step {step}: {text} on {len(rows)} held-out pairs")
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
def train_step(step, model, language_model, optimizer, train, tokenizer, args):
    """One optimizer step of reward modelling. Returns its metrics."""
    start, metrics = time.perf_counter(), {"loss": 0.0, "accuracy": 0.0}
    optimizer.param_groups[0]["lr"] = args.learning_rate * lr_share(step, args.steps)
    # 1. Take the next minibatch of pairs.
    rows = [train[number] for number in data_order(len(train), args.minibatch_size, step, args.seed)]
    chosen_tokens = sum(len(row["response_ids"][0]) for row in rows)
    # 2. Compute the gradient of the mean loss over the pairs, in micro-batches.
    for first in range(0, len(rows), args.micro_batch_size):
        part = rows[first : first + args.micro_batch_size]
        reward_chosen, reward_rejected, batch = score_pairs(model, part, tokenizer, args)
        loss = bradley_terry_loss(reward_chosen, reward_rejected, args.margin) * len(part) / len(rows)
        if language_model:  # add the loss per token of the chosen responses
            chosen = {name: tokens[: len(part)] for name, tokens in batch.items()}
            with autocast(args):
                loss = loss - args.lm_coef * response_logps(language_model, **chosen).sum() / chosen_tokens
        loss.backward()
        metrics["loss"] += loss.item()
        metrics["accuracy"] += (reward_chosen > reward_rejected).sum().item() / len(rows)
    # 3. Descend.
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
    finite = math.isfinite(metrics["loss"] + metrics["grad_norm"])
    check(finite, "the loss or its gradient is not finite; start again with a lower --learning_rate")
    optimizer.step()
    optimizer.zero_grad()
    return metrics | {"seconds": time.perf_counter() - start}


def main(args):
    check_args(args, may_be_zero=["seed", "margin", "lm_coef"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # several times as fast, and precise enough
    torch.backends.cuda.enable_cudnn_sdp(False)  # its attention has given NaN gradients for padded rows
    try:
        tokenizer, columns = load_tokenizer(args), ["chosen", "rejected"]
        train = read_rows(args.dataset, ["train"], columns, tokenizer, args)
        held_out = read_rows(args.dataset, ["validation", "test"], columns, tokenizer, args)[: args.eval_rows]
        models = make_reward_model(tokenizer, args)
    except (OSError, ValueError) as error:
        names = f"{args.model} or {args.dataset}"
        sys.exit(f"error: cannot load {names} ({str(error).splitlines()[0]}); run the stages before this one")
    model = models[0]
    probe_model(model, tokenizer, args)
    args.steps = args.steps or math.ceil(args.epochs * len(train) / args.minibatch_size)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    first_step = open_run(model, optimizer, args)["step"] + 1
    bar = tqdm(range(first_step, args.steps + 1), "reward", args.steps + 1, initial=first_step, disable=None)
    for step in bar:  # step 0 only evaluates and saves the model with its first score head
        metrics = train_step(step, *models, optimizer, train, tokenizer, args) if step > 0 else {}
        if step % args.eval_every == 0 or step == args.steps:
            metrics |= held_out_accuracy(step, model, held_out, tokenizer, args)
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss", "accuracy") if name in metrics})
        with open(Path(args.output_dir, "metrics.jsonl"), "a") as log:
            log.write(json.dumps({"step": step, **metrics}) + "\n")
        if step % args.save_every == 0 or step == args.steps:
            save(step, model, optimizer, tokenizer, args)


if __name__ == "__main__":
    usage = "python reward_model.py [--flag value ...]"
    parser = transformers.HfArgumentParser(Args, usage=usage, allow_abbrev=False)
    main(Args(**vars(parser.parse_args())))
