"""Lets the SFT model and every trained policy answer the same held-out prompts, many times each.

The responses go into one file, answers.jsonl, with everything that a model has to tell about them.
frontier.py and judge.py read that file.

    python evaluate.py [RUN ...] [--flag value ...]    # without a RUN it evaluates all runs in out/
    python evaluate.py              # a minute on one CPU core, after the quick start; its last line:
    out/evaluation/answers.jsonl: 10240 responses of sft, p3o to 32 prompts

The first line of answers.jsonl holds the settings. Each other line holds one response:

    policy, prompt_id, prompt    who answered which prompt; the policy "sft" is the SFT model
    response, response_ids       the text and the tokens of the response
    length, ended                its number of tokens, EOS included, and whether it has an EOS
    reward, gold_reward          the score as in training, and the true reward if toy.py made the data set
    logp                         log pi(y|x) under each policy and the SFT model, in nats per response
    kl_exact                     the KL to the SFT model along the response, in nats; see exact_kl

Read exact_kl first, then main, answer and add_logps. One policy is in memory at a time, beside the SFT model
and the reward model.

Notation: S responses of each policy to each prompt, N rows, R response length, V vocabulary. In the functions
that are shared with training there are B prompts, and P is the prompt length.
"""

import json
import math
import os
import statistics
import sys
import tempfile
from collections import Counter
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
    dataset: str = flag("data/toy/prompts", "hub name or folder with a text column 'prompt'; see data.py")
    output_dir: str = flag("out/evaluation", "folder for answers.jsonl")
    num_prompts: int = flag(32, "number of held-out prompts, from the split 'test' if there is one")
    samples_per_prompt: int = flag(160, "S, number of responses of each policy to each prompt")
    seed: int = flag(0, "seed of sampling")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "bfloat16 is autocast: weights stay in float32")
    sample_batch_size: int = flag(128, "responses that are sampled at once; a lower number saves memory")
    micro_batch_size: int = flag(32, "responses per forward pass; a lower number saves memory")
    model: str | None = flag(None, "SFT model; by default the one that the runs started from")
    reward_model: str | None = flag(None, "model with one label; by default the one of the runs")
    temperature: float | None = flag(None, "number that divides the logits; by default as in the runs")
    prompt_length: int | None = flag(None, "longest prompt in tokens; by default as in the runs")
    response_length: int | None = flag(None, "maximum number of sampled tokens; by default as in the runs")
    missing_eos_penalty: float | None = flag(None, "number taken off without EOS; by default as in the runs")
    overwrite: bool = flag(False, "replace the answers that output_dir already holds")


SHARED = "model", "reward_model", "temperature", "prompt_length", "response_length", "missing_eos_penalty"


# ------------------------------------------------------------------------------------------- the mathematics
def exact_kl(log_policy, log_ref, response_mask):
    """sum_t KL(pi(.|x, y_<t) || pi_SFT(.|x, y_<t)) along each response: (N,), nats per response, float64.

    log_policy and log_ref (N, R, V) are the log-probs of all tokens at each position, response_mask is
    (N, R). The mean over responses of pi is KL(pi || pi_SFT). It varies less than that of log pi / pi_SFT.
    """
    kl_tok = (log_policy.exp() * (log_policy - log_ref)).sum(-1)  # (N, R)
    return kl_tok.masked_fill(~response_mask, 0.0).double().sum(1)


# -------------------------------------------------------------------------------------- tokens and log-probs
# From here to the answers, all but response_distributions is the same text as in the training scripts.
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


def response_distributions(model, prompt_ids, prompt_mask, response_ids, response_mask, temperature=1.0):
    """log pi(. | x, y_<t) of all tokens at every position of the response: (N, R, V), float32."""
    inputs = model_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
    keep = response_ids.shape[1] + 1  # the last prompt token predicts the first response token
    logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
    return torch.log_softmax(logits.float() / temperature, -1)


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


def pad_rows(prompt_ids, response_ids, tokenizer, args):
    """Pads N prompts on the left and N responses on the right. Returns a batch, a dict of tensors."""
    prompt = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
    response = tokenizer.pad({"input_ids": response_ids}, padding_side="right", return_tensors="pt")
    batch = {"prompt_ids": prompt["input_ids"], "prompt_mask": prompt["attention_mask"].bool()}
    batch |= {"response_ids": response["input_ids"], "response_mask": response["attention_mask"].bool()}
    return {name: rows.to(args.device) for name, rows in batch.items()}


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


# -------------------------------------------------------------------------------------------------- sampling
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


# ----------------------------------------------------------------------------------------------- the answers
@torch.no_grad()
def measure(batch, policy, reference, reward, args):
    """Returns the score and the exact KL of each response: two lists of N floats."""
    scores, kls = [], []
    for first in range(0, len(batch["prompt"]), args.micro_batch_size):
        part = {name: values[first : first + args.micro_batch_size] for name, values in batch.items()}
        tokens = token_rows(part, slice(None))
        with autocast(args):
            log_policy = response_distributions(policy, **tokens, temperature=args.temperature)  # (n, R, V)
            log_ref = response_distributions(reference, **tokens, temperature=args.temperature)
            scores += compute_scores(reward, part)
        kls += exact_kl(log_policy, log_ref, part["response_mask"]).tolist()
    penalty = [0.0 if ended else args.missing_eos_penalty for ended in batch["ended"].tolist()]
    return [score - less for score, less in zip(scores, penalty)], kls


def answer(name, folder, reference, reward, prompts, gold, tokenizer, args):
    """Samples S responses of the policy in a folder to each prompt. Returns them as rows."""
    policy = load_model(AutoModelForCausalLM, folder, tokenizer, args)  # its memory is free after the return
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    sampling |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    policy.generation_config = transformers.GenerationConfig(**sampling, max_new_tokens=args.response_length)
    torch.manual_seed(args.seed * 10**6)  # all policies draw from the same random numbers
    numbers, size, rows = range(len(prompts) * args.samples_per_prompt), args.sample_batch_size, []
    for first in tqdm(numbers[::size], f"{name} answers", leave=False, disable=None):
        prompt_ids = [number // args.samples_per_prompt for number in numbers[first : first + size]]
        batch = sample_batch(policy, [prompts[i] for i in prompt_ids], 1, tokenizer, args)
        scores, kls = measure(batch, policy, reference, reward, args)
        for n, i in enumerate(prompt_ids):
            ids, response = batch["response_ids"][n][batch["response_mask"][n]].tolist(), batch["response"][n]
            row = {"policy": name, "prompt_id": i, "prompt": batch["prompt"][n], "response": response}
            row |= {"response_ids": ids, "reward": scores[n], "kl_exact": kls[n], "logp": {}}
            row |= {"length": len(ids), "ended": batch["ended"][n].item()}
            rows.append(row | ({"gold_reward": gold(row["prompt"], response)} if gold else {}))
    return rows


@torch.no_grad()
def add_logps(name, folder, prompts, rows, tokenizer, args):
    """Adds log pi(y|x) under the policy in a folder to all rows, whichever policy answered."""
    policy, size = load_model(AutoModelForCausalLM, folder, tokenizer, args), args.micro_batch_size
    for first in tqdm(range(0, len(rows), size), f"{name} reads", leave=False, disable=None):
        part = rows[first : first + size]
        prompt_ids = [prompts[row["prompt_id"]]["prompt_ids"] for row in part]
        batch = pad_rows(prompt_ids, [row["response_ids"] for row in part], tokenizer, args)
        with autocast(args):
            logps = response_logps(policy, **batch, temperature=args.temperature)  # (n, R)
        for row, logp in zip(part, logps.double().sum(1).tolist()):
            row["logp"][name] = logp


def load_gold(dataset):
    """The true reward, a function of prompt and response, if toy.py made the data set. Otherwise None."""
    record = Path(dataset).parent / "args.json"
    if not record.exists() or json.loads(record.read_text()).get("script") != "toy.py":
        return None
    from toy import gold_reward

    return gold_reward


# --------------------------------------------------------------------------- the runs and the output folder
def find_runs(runs):
    """Returns {name: folder} and {folder: arguments} of these runs, or of all runs in out/."""
    folders = [os.path.normpath(run) for run in runs]
    folders = folders or [str(path.parent) for path in sorted(Path("out").glob("*/args.json"))]
    found = {}
    for folder in dict.fromkeys(folders):
        record = Path(folder, "args.json")
        arguments = json.loads(record.read_text()).get("args", {}) if record.exists() else {}
        is_policy = "beta" in arguments and any(Path(folder).glob("*.safetensors"))  # stage 3 has a beta
        check(is_policy or not runs, f"{folder} holds no policy; name folders of p3o.py, ppo.py or dpo.py")
        found |= {folder: arguments} if is_policy else {}
    check(found, "there is no trained policy in out/; run p3o.py first, or name the folders of runs")
    names = {folder: Path(folder).absolute().name for folder in found}
    count = Counter(["sft", *names.values()])
    return {name if count[name] == 1 else folder: folder for folder, name in names.items()}, found


def take_settings(recorded, args):
    """Fills in the settings that args leaves open from the arguments of the runs, which must agree."""
    for name in SHARED:
        values = [arguments[name] for arguments in recorded if arguments.get(name) is not None]
        if getattr(args, name) is None:
            agree = len({os.path.realpath(str(value)) for value in values}) == 1  # out/sft is ./out/sft
            check(agree, f"the runs must have one {name}, but have {values}; give --{name}, or other runs")
            setattr(args, name, values[0])


def check_answers_file(args):
    """Checks that answers.jsonl may be written, before any work is done."""
    folder = Path(args.output_dir)
    check(folder.is_dir() or not os.path.lexists(folder), f"{folder} is no folder; give another --output_dir")
    files = {path.name for path in folder.glob("*")} - {"answers.jsonl.new"}  # a kill may leave this one
    is_evaluation = "answers.jsonl" in files and "args.json" not in files
    check(is_evaluation or not files, f"{folder} holds files of something else; give another --output_dir")
    check(args.overwrite or not files, f"{folder} holds answers; --overwrite them, or change --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        sys.exit(f"error: cannot write into {folder} ({error.strerror}); give another --output_dir")


def write_answers(header, rows, folder):
    """Writes answers.jsonl and returns its path. At every moment the old file or the new one is complete."""
    path = Path(folder, "answers.jsonl")
    with open(f"{path}.new", "w") as file:
        for line in [header, *rows]:
            file.write(json.dumps(line) + "\n")
    os.replace(f"{path}.new", path)
    return path


# ------------------------------------------------------------------------------------------------------ main
def main(runs, args):
    check(os.environ.get("WORLD_SIZE", "1") == "1", "this script is one process; start it without torchrun")
    for name, value in vars(args).items():
        may_be_zero = name in ("seed", "missing_eos_penalty")
        in_range = type(value) not in (int, float) or value > 0 or (value == 0 and may_be_zero)
        check(in_range, f"--{name} {value} is out of range; give a larger number")
    folders, recorded = find_runs(runs)
    take_settings(recorded.values(), args)
    check_answers_file(args)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # several times as fast, and precise enough
    torch.backends.cuda.enable_cudnn_sdp(False)  # its attention has given NaN gradients for padded rows
    try:
        tokenizer = load_tokenizer(args)
        prompts = read_prompts(["test", "validation"], tokenizer, args)[: args.num_prompts]
        reference = load_model(AutoModelForCausalLM, args.model, tokenizer, args)
        reward = load_reward(tokenizer, args)
    except (OSError, ValueError) as error:
        names = f"{args.model}, {args.reward_model} or {args.dataset}"
        sys.exit(f"error: cannot load {names} ({str(error).splitlines()[0]}); run the stages before this one")
    gold, policies, rows = load_gold(args.dataset), {"sft": args.model, **folders}, {}
    # 1. Each policy answers the same prompts.
    for name, folder in policies.items():
        rows[name] = answer(name, folder, reference, reward, prompts, gold, tokenizer, args)
        score, start = (statistics.fmean(row["reward"] for row in rows[key]) for key in (name, "sft"))
        print(f"{name}: gain {score - start:.2f} over the SFT model, reward {score:.3f}", flush=True)
    # 2. Each policy reads all the responses.
    rows = [row for name in policies for row in rows[name]]
    for name, folder in policies.items():
        add_logps(name, folder, prompts, rows, tokenizer, args)
    header = {"settings": vars(args), "policies": folders, "num_prompts": len(prompts)}
    repeated = "model", "reward_model", "dataset", "samples_per_prompt", "temperature"
    header |= {name: getattr(args, name) for name in repeated}
    path = write_answers(header, rows, args.output_dir)
    print(f"{path}: {len(rows)} responses of {', '.join(policies)} to {len(prompts)} prompts")


if __name__ == "__main__":
    usage = "python evaluate.py [RUN ...] [--flag value ...]"
    parser = transformers.HfArgumentParser(Args, usage=usage, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="folders of runs; by default all that are under out/")
    options = vars(parser.parse_intermixed_args())
    main(options.pop("runs"), Args(**options))
