"""Stage 1: supervised fine-tuning, token cross-entropy on demonstrations.

    python sft.py     the embedded task, after toy.py; other models: README.md

ends, on two x86 cores, with
    out/sft: perplexity 3.51 on 500 held-out rows; 1125 steps, 0.8 minutes

    maximise  log pi(y|x)  over completion tokens, prompt masked out, EOS inside        completion_loss

Without EOS in the loss the policy would never stop. Preference data serve too: chosen responses are targets.

Legend: B rows, T tokens, P prompt length, R response length, V vocabulary. Prompts are padded on the left,
responses on the right. Masks are boolean, True counts.
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
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import datasets
import torch
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    model: str = flag("data/toy/model", "hub name or folder; one without weights is initialised at random")
    dataset: str = flag("data/toy/sft", "hub name or local path: demonstrations, texts or preferences")
    output_dir: str = flag("out/sft", "folder of this run")
    seed: int = flag(0, "of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda when there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16: autocast; weights stay in float32")
    learning_rate: float = flag(3e-3, "AdamW, rises, then falls to 0; 1e-5 to 5e-5 for pretrained models")
    epochs: int = flag(2, "passes over the data")
    steps: int | None = flag(None, "optimizer steps instead of --epochs")
    minibatch_size: int = flag(32, "rows per optimizer step")
    micro_batch_size: int = flag(0, "rows per forward pass: same gradient, less memory; 0: the minibatch")
    temperature: float = flag(1.0, "of the printed samples")
    prompt_length: int = flag(32, "tokens; longer prompts are dropped and counted")
    response_length: int = flag(24, "tokens; longer completions are cut, EOS included")
    max_grad_norm: float = flag(1.0, "global gradient-norm clip")
    eval_every: int = flag(100, "steps between evaluations on held-out rows; 0: only before and after")
    eval_rows: int = flag(500, "held-out rows of an evaluation")
    save_every: int = flag(100, "steps between checkpoints; 0: only the last")
    resume: bool = flag(False, "continue from the last checkpoint; steps, save_every, device may change")
    overwrite: bool = flag(False, "replace the run in output_dir")


# ------------------------------------------------------------------------------------------- the mathematics
def completion_loss(logits, tokens, completion_mask):
    """-mean of log p(token_t | tokens_<t) over the tokens of completion_mask, in nats per token.

    logits (B, T, V), at t for token t + 1; tokens, completion_mask (B, T). Returns a float32 scalar.
    """
    predicted = completion_mask[:, 1:]
    logps = torch.log_softmax(logits[:, :-1][predicted].float(), -1)  # (tokens, V)
    return -logps.gather(-1, tokens[:, 1:][predicted].unsqueeze(-1)).mean()


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


def load_or_create_model(tokenizer, args):
    """The model to fine-tune. A folder with a config and no weights (the toy's) is initialised at random."""
    folder = Path(args.model)
    if not folder.is_dir() or any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin*")):
        return load_model(AutoModelForCausalLM, args.model, tokenizer, args)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
    except (OSError, ValueError) as error:
        wrong = f"cannot make a model from {args.model!r} ({first_line(error)})"
        raise RunError(wrong, "give a folder with config.json") from None
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.model} holds no weights: initialised at random, {size:.2f}M parameters", flush=True)
    return prepare_model(model, args.model, tokenizer, args)


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


def printable(text):
    """For the terminal: control characters are written out, so that no text can drive it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def cost_metrics(tokens, seconds):
    """Seconds by phase, response tokens per second of them all, peak memory (GPU, else the process)."""
    peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds | {"tokens_per_second": tokens / sum(seconds.values()), "peak_memory_gb": peak / 1e9}


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
def lr_share(step, steps):
    """Share of --learning_rate at step 1, 2, ...: rises over the first tenth of the steps, then falls to 0.

    Without the rise the toy's SFT model hardly learns to copy what the prompt asks for.
    """
    return min(step / (0.1 * steps), (1 - (step - 1) / steps) / 0.9)


def batch_loss(model, examples, pad_id, args):
    """completion_loss of a batch, and its number of completion tokens."""
    prompt = pad([e["prompt_ids"] for e in examples], "left", pad_id, args.device)
    response = pad([e["response_ids"][0] for e in examples], "right", pad_id, args.device)
    inputs = model_inputs(*prompt, *response)
    completion_mask = torch.cat([torch.zeros_like(prompt[1]), response[1]], 1)  # (B, P + R)
    loss = completion_loss(model(**inputs, use_cache=False).logits, inputs["input_ids"], completion_mask)
    return loss, response[1].sum().item()


@torch.no_grad()
def held_out_perplexity(model, examples, pad_id, args):
    """eval_loss in nats per completion token, EOS included, and eval_perplexity = exp(eval_loss)."""
    size = args.micro_batch_size
    losses = [batch_loss(model, examples[i : i + size], pad_id, args) for i in range(0, len(examples), size)]
    loss = sum(loss.item() * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}


def write_samples(step, model, examples, eos_id, tokenizer, args):
    """Answers a few held-out prompts, prints them and adds them to samples.jsonl."""
    torch.manual_seed(args.seed * 10**6)
    prompts = pad([e["prompt_ids"] for e in examples], "left", tokenizer.pad_token_id, args.device)
    limits = args.response_length, args.temperature, eos_id, tokenizer.pad_token_id
    for example, ids, mask in zip(examples, *sample_responses(model, *prompts, *limits)):
        response = tokenizer.decode(ids[mask], skip_special_tokens=True)
        append_jsonl(args, "samples.jsonl", {"step": step, "prompt": example["prompt"], "response": response})
        print(f"  {printable(example['prompt'])} -> {printable(response)}")


def main(args):
    check_args(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    train, eos_id = read_examples(args.dataset, ["train"], 1, tokenizer, args)
    held_out, _ = read_examples(args.dataset, ["validation", "test"], 1, tokenizer, args, args.eval_rows)
    args.steps = args.steps or math.ceil(args.epochs * len(train) / args.minibatch_size)
    model, pad_id = load_or_create_model(tokenizer, args), tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.0)
    checkpoint, start = open_run(args), time.perf_counter()
    done = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        model.load_state_dict(checkpoint["models"][""])
        optimizer.load_state_dict(checkpoint["optimizer"])
        export_models(args, {"": model}, tokenizer)  # in case the run was killed while it did so
    else:
        append_jsonl(args, "metrics.jsonl", {"step": 0} | held_out_perplexity(model, held_out, pad_id, args))

    for step in tqdm(range(done + 1, args.steps + 1), "sft", args.steps, initial=done, disable=None):
        clock, metrics = time.perf_counter(), {"loss": 0.0}
        rows = [train[row] for row in data_order(len(train), args.minibatch_size, step, args.seed)]
        total = sum(len(row["response_ids"][0]) for row in rows)
        for first in range(0, len(rows), args.micro_batch_size):
            loss, tokens = batch_loss(model, rows[first : first + args.micro_batch_size], pad_id, args)
            (loss * tokens / total).backward()  # a mean over the tokens of the whole minibatch
            metrics["loss"] += loss.item() * tokens / total
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
        require_finite(args, step, loss=metrics["loss"], grad_norm=metrics["grad_norm"])
        optimizer.param_groups[0]["lr"] = args.learning_rate * lr_share(step, args.steps)
        optimizer.step()
        optimizer.zero_grad()
        metrics |= cost_metrics(total, {"seconds_update": time.perf_counter() - clock})
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            metrics |= held_out_perplexity(model, held_out, pad_id, args)
        if step == args.steps:
            write_samples(step, model, held_out[:3], eos_id, tokenizer, args)
        end_step(args, step, metrics, {"": model}, tokenizer, {"optimizer": optimizer.state_dict()})
    last = json.loads(Path(args.output_dir, "metrics.jsonl").read_text().splitlines()[-1])
    reached = f"perplexity {last['eval_perplexity']:.2f} on {len(held_out)} held-out rows"
    print(
        f"{args.output_dir}: {reached}; {args.steps} steps, {(time.perf_counter() - start) / 60:.1f} minutes"
    )


if __name__ == "__main__":
    guard(main, Args)
