"""Stage 4: every policy and the SFT model answer the same held-out prompts; frontier.py and judge.py go on.

    python evaluate.py [RUN ...] [--flags]     default: every run found under out/

ends, after the quick start, on two x86 cores, with
    out/evaluation: answers.jsonl, 10240 responses of sft, p3o to 32 prompts; 0.3 minutes

answers.jsonl, a line a response: policy, prompt_id, prompt, response, response_ids, reward, gold_reward (if
toy.py made the data), logp (nats, under every policy and the SFT model), kl_exact (of the next-token
distributions to the SFT model's, summed along the response), length (tokens, EOS included), ended.
meta.json: the settings. One policy is in memory at a time, beside SFT and reward model. What was answered
under the same settings is not answered again: a killed evaluation goes on, a new run joins the others. The
answers of a run that is not named any more are left out.

Legend: P prompts, S responses of a policy to each. In the helpers shared with training: B prompts,
K responses to each, N = B * K rows, P prompt length, R response length, V vocabulary.
"""

import json
import os
import sys
import time
from collections import Counter
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
    runs: list[str] = field(
        default_factory=list, metadata={"help": "folders; no flag needed if first; default: all in out/"}
    )
    dataset: str = flag("data/toy/prompts", "hub name or folder with a text column prompt; its test split")
    output_dir: str = flag("out/evaluation", "folder of answers.jsonl and meta.json")
    num_prompts: int = flag(32, "P, held-out prompts")
    samples_per_prompt: int = flag(160, "S, responses of every policy to each prompt")
    seed: int = flag(0, "of sampling")
    device: str = flag("auto", "auto (cuda when there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16: autocast, over float32 weights")
    micro_batch_size: int = flag(64, "responses per forward pass")
    sample_batch_size: int = flag(1024, "responses sampled at a time")
    reward_model: str | None = flag(None, "with one label; default: the runs' own")
    temperature: float | None = flag(None, "divides the logits; default: the runs' own")
    prompt_length: int | None = flag(None, "tokens; longer ones are left out; default: the runs' own")
    response_length: int | None = flag(None, "tokens sampled at most, EOS included; default: the runs' own")
    missing_eos_penalty: float | None = flag(None, "off the score without EOS; default: the runs' own")
    overwrite: bool = flag(False, "replace answers that were made with other settings")


SHARED = "reward_model", "temperature", "prompt_length", "response_length", "missing_eos_penalty"


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


# --------------------------------------------------------------------------------------------------- rollout
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


# -------------------------------------------------------------------------------------------------- failures
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


# ------------------------------------------------------------------------------------------------------ runs
def read_json(path):
    """The content of a JSON file, {} where there is none."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}


def find_runs(args):
    """{name: folder} of the policies to compare and {name: their recorded arguments}.

    By default all stage-3 policies in out/: their arguments have a beta. A name is the folder's own, or its
    path where that is not unique.
    """
    folders = args.runs or [str(path.parent) for path in sorted(Path("out").glob("*/args.json"))]
    recorded = {folder: read_json(Path(folder, "args.json")).get("args", {}) for folder in folders}
    found = []
    for folder in folders:
        policy = "beta" in recorded[folder] and Path(folder, "config.json").exists()
        todo = "name output folders of p3o.py, ppo.py or dpo.py"
        require(policy or not args.runs, f"{folder!r} holds no trained policy; {todo}")
        if policy:
            found.append(folder)
    require(found, "there is no trained policy in out/; run p3o.py first, or name run folders")
    count = Counter([Path(folder).name for folder in found] + ["sft"])
    names = {folder: Path(folder).name if count[Path(folder).name] == 1 else folder for folder in found}
    return {names[folder]: folder for folder in found}, {names[f]: recorded[f] for f in found}


def take_settings(recorded, args):
    """Fills in from the runs, which must agree, what args leaves open, and args.model, the SFT model."""
    args.model = None
    for name in ("model", *SHARED):
        values = {run: record.get(name) for run, record in recorded.items()}
        if getattr(args, name) is None:
            one = len(set(values.values())) == 1 and None not in values.values()
            todo = "compare runs of one SFT model" if name == "model" else f"give --{name}"
            require(one, f"the runs differ in their {name} ({values}); {todo}")
            setattr(args, name, next(iter(values.values())))


def load_gold(dataset):
    """The gold reward, a function of prompt and response, of a data set that toy.py wrote; else None."""
    if read_json(Path(dataset).parent / "args.json").get("script") != "toy.py":
        return None
    from toy import gold_reward

    return gold_reward


# --------------------------------------------------------------------------------------------------- answers
def answer(name, models, prompts, gold, tokenizer, args):
    """S responses of a policy to each of P prompts, as rows of answers.jsonl; the same seed for all."""
    torch.manual_seed(args.seed * 10**6)
    wanted = [i for i in range(len(prompts)) for _ in range(args.samples_per_prompt)]
    rows, size = [], args.sample_batch_size
    for first in tqdm(range(0, len(wanted), size), f"{name} answers", leave=False, disable=None):
        ids = wanted[first : first + size]
        batch = sample_batch(models[0], [prompts[i] for i in ids], 1, tokenizer, args)
        batch = score_batch(batch, models, args.micro_batch_size, args)
        sums = {x: batch[x].double().sum(1).tolist() for x in ("logp_old_tok", "logp_ref_tok", "kl_tok")}
        for n, i in enumerate(ids):
            tokens = batch["response_ids"][n][batch["response_mask"][n]].tolist()
            row = {
                "policy": name,
                "prompt_id": i,
                "prompt": batch["prompt"][n],
                "response": batch["response"][n],
            }
            row |= {"response_ids": tokens, "reward": batch["score"][n].item(), "kl_exact": sums["kl_tok"][n]}
            row["logp"] = {"sft": sums["logp_ref_tok"][n], name: sums["logp_old_tok"][n]}
            row |= {"length": len(tokens), "ended": batch["ended"][n].item()}
            rows.append(row | ({"gold_reward": gold(row["prompt"], row["response"])} if gold else {}))
    return rows


@torch.no_grad()
def add_logps(name, policy, prompts, rows, tokenizer, args):
    """Writes log pi(y|x) of a policy into the rows that lack it."""
    lacking, size = [row for row in rows if name not in row["logp"]], args.micro_batch_size
    for first in tqdm(range(0, len(lacking), size), f"{name} reads", leave=False, disable=None):
        part = lacking[first : first + size]
        prompt_ids = [prompts[row["prompt_id"]]["prompt_ids"] for row in part]
        prompt = pad(prompt_ids, "left", tokenizer, args.device)
        response = pad([row["response_ids"] for row in part], "right", tokenizer, args.device)
        with autocast(args):
            logps = response_logps(policy, *prompt, *response, args.temperature).double().sum(1).tolist()
        for row, logp in zip(part, logps):
            row["logp"][name] = logp


def fingerprint(folder):
    """Names, sizes and times of a model's weights: other ones are another policy."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime] for file in files]


def known_answers(meta, args):
    """{policy: rows} already answered under these settings by the weights that are there now."""
    folder = Path(args.output_dir)
    before = read_json(folder / "meta.json")
    if not (folder / "answers.jsonl").exists() or not before:
        return {}
    same = before["settings"] == meta["settings"]
    todo = "give --overwrite, or another --output_dir"
    require(same or args.overwrite, f"{folder} holds answers made with other settings; {todo}")
    changed = [name for name in before["weights"] if before["weights"][name] != meta["weights"].get(name)]
    known = {}
    for line in (folder / "answers.jsonl").read_text().splitlines() if same else []:
        row = json.loads(line)
        row["logp"] = {name: logp for name, logp in row["logp"].items() if name not in changed}
        if row["policy"] not in changed:
            known.setdefault(row["policy"], []).append(row)
    return known


def write_answers(known, meta, args):
    """answers.jsonl and meta.json, written beside and moved into place."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for rows in known.values() for row in rows]
    for name, text in (("answers.jsonl", "".join(lines)), ("meta.json", json.dumps(meta, indent=2))):
        (folder / f"{name}.new").write_text(text)
        os.replace(folder / f"{name}.new", folder / name)


# ------------------------------------------------------------------------------------------------------ main
def main(args):
    for name, value in vars(args).items():
        zero = name in ("seed", "missing_eos_penalty")
        good = type(value) not in (int, float) or 0 < value <= 1e9 or (value == 0 and zero)
        need = "at least 0" if zero else "above 0"
        require(good, f"--{name} {value} is out of range; give {need}, up to 1e9")
    start, (folders, recorded) = time.perf_counter(), find_runs(args)
    take_settings(recorded, args)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, gold = load_tokenizer(args.model), load_gold(args.dataset)
    prompts = read_prompts(args.dataset, ["test", "validation"], tokenizer, args, args.num_prompts)
    settings = {x: y for x, y in vars(args).items() if x not in ("runs", "output_dir", "device", "overwrite")}
    settings["weights"] = [fingerprint(args.model), fingerprint(args.reward_model)]
    weights = {name: fingerprint(folder) for name, folder in folders.items()}
    meta = {"model": args.model, "reward_model": args.reward_model, "dataset": args.dataset}
    meta |= {"policies": folders, "num_prompts": len(prompts), "temperature": args.temperature}
    meta |= {"samples_per_prompt": args.samples_per_prompt, "settings": settings, "weights": weights}
    known = known_answers(meta, args)
    reference = load_model(AutoModelForCausalLM, args.model, tokenizer, args).requires_grad_(False)
    reward = load_reward(tokenizer, args)
    # 1. Every policy answers the same prompts.
    for name, folder in ({"sft": args.model} | folders).items():
        if name not in known:
            policy = load_model(AutoModelForCausalLM, folder, tokenizer, args)
            known[name] = answer(name, (policy, reference, reward), prompts, gold, tokenizer, args)
            write_answers(known, meta, args)
    # 2. Every policy reads what the others answered.
    rows = [row for name in ("sft", *folders) for row in known[name]]
    for name, folder in folders.items():
        if any(name not in row["logp"] for row in rows):
            policy = load_model(AutoModelForCausalLM, folder, tokenizer, args)
            add_logps(name, policy, prompts, rows, tokenizer, args)
            write_answers(known, meta, args)
    known = {name: known[name] for name in ("sft", *folders)}
    write_answers(known, meta, args)
    said = f"answers.jsonl, {len(rows)} responses of {', '.join(known)} to {len(prompts)} prompts"
    print(f"{args.output_dir}: {said}; {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--runs")
    guard(main, Args)
