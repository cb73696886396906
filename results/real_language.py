"""A real language model learns from human labels: P3O, PPO and online DPO side by side, on film reviews.

    python results/real_language.py [--processes 2] [--hh PAIRS.jsonl]     trains and measures what is missing
    python results/real_language.py --plots_only                           report from the logs alone, seconds

SmolLM2-135M-Instruct continues the first words of a review. Its reward model learnt from pairs of reviews that
people called positive and negative; a judge, a second reward model from other reviews and another seed, says
whether what was gained is more than that reward model's own taste. Every training is a run of a stage script
from the command line, its data came through data.py. About 3 hours of one core with bfloat16 matrix units,
twice that in float32 (DTYPE); a process takes up to 6 GB of memory, a run 3 GB of disk while it trains.

Trained under out/real (--home), continued if interrupted. Kept in results/real_language: logs/NAME.json, one a
finished run, which is never repeated; report.md, curves.png and *.csv, written from the logs.
--hh: pairs with columns prompt, chosen, rejected; how much of a reward is an offset of its prompt there.

Gain: mean reward less the SFT model's on the same prompts. KL to the SFT model: nats per response, exact at
every token. Legend: P prompts, S responses to each.
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
import reproduce
from reproduce import ROOT, read_log, write_log

import evaluate
import frontier as theory
import ppo

METHODS = {"p3o-v2": {}, "ppo": {}, "online-dpo": {"labels": "sampled"}}  # and the flags of reproduce.METHODS
SHIFTED = "p3o-v2", "ppo"
BETA, DTYPE = 0.3, "bfloat16"
CRITIC = (
    ppo.Args().critic_learning_rate / ppo.Args().learning_rate
)  # PPO's rates keep the ratio of its defaults
FIRST_WORDS, PROMPT, RESPONSE, LONGER = 4, 12, 20, 32  # words, and tokens; completions with EOS
PAIR = PROMPT + LONGER  # tokens of a whole review, at most
HH_PROMPT, HH_PAIR, HH_RESPONSE = 128, 64, 48  # tokens
TRUSTED_ESS = 10  # of 64 samples a prompt: the optimum is drawn as far as that
STAGE = {
    "learning_rate": 2e-5,
    "minibatch_size": 16,
    "eval_every": 0,
    "save_every": 20,
    "prompt_length": PROMPT,
}
STEPWISE = "reward kl objective loss tokens_per_second seconds_rollout seconds_score seconds_update".split()


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    sft: int = 1900  # reviews; their beginnings are the training prompts of RL
    sft_validation: int = 100
    validation: int = 64  # prompts, as is the next
    test: int = 128
    pair_reviews: int = 10**6  # of each label, at most, to train a reward model; two pairs to each
    pair_validation: int = 75  # the same, held out
    steps: int = 60
    tuning_steps: int = 10
    rates: tuple = (3e-6, 1e-5, 3e-5)
    seeds: tuple = (1, 2)
    shifts: tuple = (1, 4)  # times the spread of the reward among the responses to a prompt
    prompts_per_step: int = 16
    measured: int = 64  # P, of the test prompts
    responses: int = 8  # S
    sft_responses: int = 64  # they draw the optimum, too
    hh_pairs: int = 800
    hh_validation: int = 100
    hh_prompts: int = 48


QUICK = Size(24, 8, 8, 8, 12, 4, 2, 1, (1e-5,), (1,), (1,), 4, 4, 2, 16, 16, 8, 4)


# ----------------------------------------------------------------------------------------------- the splits
def make_splits(reviews, tokenizer, size):
    """{data set: {split: rows}} of [{"text", "label"}, ...]: no review in two of them, no prompt of the
    validation and test splits in train."""
    texts = {review["text"].strip(): review["label"] for review in reviews}  # no text twice
    texts = {text: label for text, label in texts.items() if len(text.split()) > FIRST_WORDS}
    prompts = ["Review: " + " ".join(text.split()[:FIRST_WORDS]) for text in texts]
    completions = [" " + " ".join(text.split()[FIRST_WORDS:]) for text in texts]
    lengths = [
        [len(x) for x in tokenizer(part, add_special_tokens=False)["input_ids"]]
        for part in (prompts, completions)
    ]
    rows = [
        {"text": text, "label": label, "prompt": prompt, "completion": completion, "tokens": after + 1}
        for (text, label), prompt, completion, before, after in zip(
            texts.items(), prompts, completions, *lengths
        )
        if before <= PROMPT and after + 1 <= LONGER
    ]
    rng = random.Random(0)
    rng.shuffle(rows)
    wanted, taken, rest = (
        ["test"] * size.test + ["validation"] * size.validation,
        {"test": [], "validation": []},
        [],
    )
    begun = set()
    for row in rows:  # held-out prompts first, no two alike
        if wanted and row["tokens"] <= RESPONSE and row["prompt"] not in begun:
            taken[wanted.pop()].append(row)
            begun.add(row["prompt"])
        else:
            rest.append(row)
    short = [row for row in rest if row["tokens"] <= RESPONSE and row["prompt"] not in begun]
    short = short[: size.sft + size.sft_validation]
    require = theory.require
    enough = not wanted and len(short) == size.sft + size.sft_validation
    require(enough, f"only {len(short)} short reviews are left for SFT; give a larger --reviews")
    train, used = short[: size.sft], {row["text"] for row in short}
    sft = {"train": train, "validation": short[size.sft :], "test": taken["test"]}
    splits = {
        "sft": {name: [pick(row, "prompt", "completion") for row in part] for name, part in sft.items()}
    }
    beginnings = list({row["prompt"]: pick(row, "prompt") for row in train}.values())
    splits["prompts"] = {"train": beginnings} | {
        x: [pick(row, "prompt") for row in part] for x, part in taken.items()
    }
    rest = [row for row in rest if row["text"] not in used]
    labels = [[row["text"] for row in rest if row["label"] == label] for label in (1, 0)]
    for number, name in enumerate(("pairs", "judge_pairs")):  # every other review
        splits[name] = pair_splits([part[number::2] for part in labels], rng, size)
    return splits


def pick(row, *names):
    return {name: row[name] for name in names}


def pair_splits(labels, rng, size):
    """{split: pairs} of [positive texts, negative texts]; every text in two pairs, with different partners."""
    splits, start = {}, 0
    few = size.pair_validation
    for name, count in (
        ("validation", few),
        ("test", 4),
        ("train", size.pair_reviews),
    ):  # data.py wants a test
        positive, negative = ([" " + text for text in part[start : start + count]] for part in labels)
        both = min(len(positive), len(negative))
        theory.require(both > 1, "too few reviews are left for pairs; give a larger --reviews")
        positive, negative, start = positive[:both], negative[:both], start + count
        partners = [*zip(positive, negative), *zip(positive, negative[1:] + negative[:1])]
        splits[name] = [{"prompt": "Review:", "chosen": good, "rejected": bad} for good, bad in partners]
        rng.shuffle(splits[name])
    return splits


def make_hh_splits(path, tokenizer, size):
    """{split: pairs} of the pairs within the lengths, one for a prompt."""
    pairs = list(
        {row["prompt"]: pick(row, "prompt", "chosen", "rejected") for row in read_lines(path)}.values()
    )
    columns = [tokenizer([pair[x] for pair in pairs])["input_ids"] for x in ("prompt", "chosen", "rejected")]
    lengths = zip(*([len(ids) for ids in column] for column in columns))
    fits = [a <= HH_PROMPT and max(b, c) < HH_PAIR and min(b, c) > 0 for a, b, c in lengths]
    pairs = [pair for pair, fit in zip(pairs, fits) if fit]
    random.Random(0).shuffle(pairs)
    first, last = size.hh_prompts, size.hh_prompts + size.hh_validation
    theory.require(
        len(pairs) > last + 16, f"{path} has only {len(pairs)} pairs within the lengths; give more"
    )
    return {
        "test": pairs[:first],
        "validation": pairs[first:last],
        "train": pairs[last : last + size.hh_pairs],
    }


def read_lines(path):
    with evaluate.explained(f"cannot read {path!r}", "give JSON lines, a row each"):
        return [json.loads(line) for line in open(path, encoding="utf-8")]


def read_reviews(name):
    """[{"text", "label"}, ...] of a file or the hub."""
    if Path(name).is_file():
        return read_lines(name)
    with evaluate.explained(f"cannot read data set {name!r}", "give a hub name or a file of JSON lines"):
        return list(datasets.load_dataset(name, split="train"))


def write_data(name, splits, args):
    """Writes rows as JSON lines, and what data.py makes of them to HOME/data/NAME."""
    folder = args.home / "rows" / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "dataset": folder,
        "model": args.model,
        "output_dir": args.home / "data" / name,
        "overwrite": True,
    }
    theory.require(call("data.py", flags), f"data.py failed on {name}; see above", 1)


# ------------------------------------------------------------------------------------------------- the runs
def make_run(part, method, rate, seed, steps, args, times=0, shift=0.0):
    """Name, script and flags of a run; paths are no part of its flags."""
    script, flags, _ = reproduce.METHODS[method]
    flags = flags | METHODS[method] | {"learning_rate": rate, "seed": seed, "steps": steps, "beta": BETA}
    flags |= {"dtype": DTYPE, "prompt_length": PROMPT, "response_length": RESPONSE, "epochs": 2}
    flags |= {
        "prompts_per_step": args.size.prompts_per_step,
        "minibatch_size": args.size.prompts_per_step // 2,
    }
    flags |= {"eval_prompts": 64, "eval_every": 0 if part == "tuning" else 20, "save_every": 20}
    flags |= {"critic_learning_rate": float(f"{CRITIC * rate:.3g}")} if method == "ppo" else {}
    flags |= {"reward_shift": shift} if shift else {}
    name = f"{method}_rate{rate:g}_steps{steps}{f'_shift{shift:g}' if shift else ''}_seed{seed}"
    run = {"part": part, "name": name, "method": method, "rate": rate, "seed": seed, "times": times}
    return run | {"shift": shift, "script": script, "flags": flags}


def plan(args):
    """(runs in order, what cannot be planned yet): the best rates and the spread come from the logs."""
    size, unknown = args.size, []
    runs = [make_run("tuning", m, rate, 0, size.tuning_steps, args) for m in METHODS for rate in size.rates]
    rates = {m: best_rate(m, runs, args) for m in METHODS}
    unknown += [f"main runs of {m}, whose rate is not tuned" for m in METHODS if not rates[m]]
    known = {m: rate for m, rate in rates.items() if rate}
    runs += [make_run("main", m, rate, x, size.steps, args) for x in size.seeds for m, rate in known.items()]
    spread = spread_of(read_log(args, "sft"))
    unknown += [] if spread else ["shifted runs, as the SFT model is not measured"]
    for times in size.shifts if spread else ():
        shift = float(f"{times * spread:.2g}")
        runs += [
            make_run("shifted", m, known[m], size.seeds[0], size.steps, args, times, shift)
            for m in SHIFTED
            if m in known
        ]
    return runs, unknown


def best_rate(method, runs, args):
    """The rate with the highest held-out objective after tuning; None while a run of it is missing."""
    own = [run for run in runs if run["method"] == method]
    logs = [read_log(args, run["name"], run["flags"]) for run in own]
    if not all(logs):
        return None
    objectives = [log["evaluations"][-1]["eval_objective"] for log in logs]
    return own[objectives.index(max(objectives))]["rate"]


def spread_of(sft):
    """Standard deviation of the reward among the responses to a prompt, two digits."""
    return float(f"{math.sqrt(variance_split(tensor(sft, 'reward'))['within']):.2g}") if sft else None


def call(script, flags):
    """Runs a script in one thread and shows its last line; whether it succeeded."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *script.split(), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    print(lines[-1] if lines else f"{script}: exit status {done.returncode}", flush=True)
    return done.returncode == 0


def train(script, flags, folder):
    """A training, continued where it was interrupted."""
    paths = {"output_dir": folder} | ({"resume": True} if (folder / "args.json").exists() else {})
    return call(script, flags | {"device": "cpu"} | paths)


def tidy(folder, keep=False):
    """Frees the disk: 3 GB a run."""
    for file in folder.rglob("*.*"):
        if file.name == "checkpoint.pt" or (file.name == "model.safetensors" and not keep):
            file.unlink()
    for file in folder.glob("critic/model.safetensors"):
        file.unlink()


def stage(name, script, flags, model, data, args):
    """A stage before RL: its weights and its log, if it lacks one of them."""
    folder = args.home / name
    if (folder / "model.safetensors").exists() and read_log(args, name):
        return
    paths = {"model": model, "dataset": args.home / "data" / data}
    theory.require(
        train(script, STAGE | {"dtype": DTYPE} | flags | paths, folder), f"{name} failed; see above", 1
    )
    write_log(args, name, reproduce.origin() | {"flags": STAGE | flags} | read_curve(folder))
    tidy(folder, keep=True)


def run_job(run, args):
    """Trains, measures and logs a run of an RL method."""
    if read_log(args, run["name"], run["flags"]):
        return
    paths = {"model": args.home / "sft_model", "reward_model": args.home / "reward_model"}
    folder = args.home / run["name"]
    if not train(run["script"], run["flags"] | paths | {"dataset": args.home / "data" / "prompts"}, folder):
        return
    if run["part"] == "tuning":
        write_log(args, run["name"], reproduce.origin() | {"flags": run["flags"]} | read_curve(folder))
    elif not measure_job(run["name"], args):
        return
    tidy(folder, keep=run["part"] == "main" and run["seed"] == args.size.seeds[0])


def measure_job(name, args):
    """Answers and their scores, in a process of its own: torch has one random state per process."""
    flags = {"measure": name, "model": args.model, "home": args.home, "folder": args.folder}
    return bool(read_log(args, name)) or call(
        f"results/real_language.py{' --quick' if args.quick else ''}", flags
    )


def hh_job(args):
    """The reward model of other people's pairs, and the plain model's answers to their prompts."""
    if read_log(args, "hh"):
        return
    write_data("hh", make_hh_splits(args.hh, evaluate.load_tokenizer(args.model), args.size), args)
    limits = {"prompt_length": HH_PROMPT, "response_length": HH_PAIR}
    stage("hh_reward_model", "reward_model.py", limits, args.model, "hh", args)
    measure_job("hh", args)


def at_once(jobs, args):
    """Runs [(function, argument, ...), ...], some processes at a time."""
    with ThreadPoolExecutor(args.processes) as pool:
        try:
            for job in [pool.submit(*job) for job in jobs]:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_all(args):
    """Everything that has no log, in the order that best rates and spread need."""
    if not read_log(args, "splits") or not (args.home / "data").exists():
        reviews, tokenizer = read_reviews(args.reviews), evaluate.load_tokenizer(args.model)
        splits = make_splits(reviews, tokenizer, args.size)
        for name, parts in splits.items():
            write_data(name, parts, args)
        rows = {name: {split: len(part) for split, part in parts.items()} for name, parts in splits.items()}
        about = {"model": Path(args.model).name, "reviews": Path(args.reviews).name, "rows": rows}
        write_log(args, "splits", about)
    stage("sft_model", "sft.py", {"epochs": 1, "response_length": RESPONSE}, args.model, "sft", args)
    scorers, sft = {"reward_model": ("pairs", 0), "judge": ("judge_pairs", 1)}, args.home / "sft_model"
    at_once(
        [
            (stage, name, "reward_model.py", {"seed": seed, "response_length": PAIR}, sft, data, args)
            for name, (data, seed) in scorers.items()
        ],
        args,
    )
    at_once(
        [(measure_job, "sft", args), *((run_job, x, args) for x in plan(args)[0] if x["part"] == "tuning")],
        args,
    )
    last = [(hh_job, args)] if args.hh else []
    at_once([*((run_job, x, args) for x in plan(args)[0] if x["part"] != "tuning"), *last], args)


# ---------------------------------------------------------------------------------------------- measurement
def read_curve(folder):
    """What a log keeps of metrics.jsonl: some metrics of every step, all evaluations, minutes."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    steps = {x: [round(row[x], 5) for row in rows[1:]] for x in STEPWISE if x in rows[-1]}
    points = [
        {
            x: round(y, 5)
            for x, y in row.items()
            if x == "step" or (x.startswith("eval_") and isinstance(y, float))
        }
        for row in rows
    ]
    minutes = sum(value for row in rows for x, value in row.items() if x.startswith("seconds_")) / 60
    return {"steps": steps, "evaluations": [x for x in points if len(x) > 1], "minutes": round(minutes, 2)}


def measure(name, args):
    """logs/NAME.json of a run, of "sft" or of "hh": answers to held-out prompts, and what they are worth."""
    size, hh = args.size, name == "hh"
    model = args.model if hh else str(args.home / "sft_model")
    setting = evaluate.Args(
        dataset=str(args.home / "data" / ("hh" if hh else "prompts")), seed=12345, dtype=DTYPE
    )
    setting.reward_model = str(args.home / ("hh_reward_model" if hh else "reward_model"))
    setting.model, setting.device, setting.temperature = model, "cpu", 1.0
    setting.prompt_length, setting.response_length = (HH_PROMPT, HH_RESPONSE) if hh else (PROMPT, RESPONSE)
    setting.missing_eos_penalty = (
        0.0 if hh else 1.0
    )  # few answers end within the limit of hh: no noise of that
    setting.samples_per_prompt = size.sft_responses if name == "sft" else size.responses
    setting.micro_batch_size, setting.sample_batch_size = 32, 256
    tokenizer = evaluate.load_tokenizer(model)
    reference = evaluate.load_model(AutoModelForCausalLM, model, tokenizer, setting)
    prompts = evaluate.read_prompts(
        setting.dataset, ["test"], tokenizer, setting, size.hh_prompts if hh else size.measured
    )
    policy, reward = reference, evaluate.load_reward(tokenizer, setting)
    log = reproduce.origin()
    if name not in ("sft", "hh"):
        policy = evaluate.load_model(AutoModelForCausalLM, str(args.home / name), tokenizer, setting)
        (run,) = [run for run in plan(args)[0] if run["name"] == name]
        log |= {"flags": run["flags"]} | read_curve(args.home / name)
    rows = evaluate.answer(name, (policy, reference, reward), prompts, None, tokenizer, setting)
    log["reward"] = by_prompt([row["reward"] for row in rows], len(prompts))
    for x, of in {"kl": "kl_exact", "length": "length", "ended": "ended"}.items():
        values = by_prompt([float(row[of]) for row in rows], len(prompts), digits=9)
        log[x] = [round(statistics.fmean(own), 4) for own in values]
    if not hh:  # its texts may hurt, and it has no judge
        setting.reward_model = str(args.home / "judge")
        scores = read_scores(evaluate.load_reward(tokenizer, setting), rows, prompts, tokenizer, setting)
        log["judge"] = by_prompt(scores, len(prompts))
        first = rows[:: setting.samples_per_prompt][:8]
        log["samples"] = [pick(row, "prompt", "response", "reward") for row in first]
    write_log(args, name, log)
    print(
        f"{name}: reward {statistics.fmean(row['reward'] for row in rows):.3f} on {len(prompts)} test prompts"
    )


def by_prompt(values, num_prompts, digits=3):
    """(P, S), rounded."""
    size = len(values) // num_prompts
    return [[round(x, digits) for x in values[i * size : (i + 1) * size]] for i in range(num_prompts)]


@torch.no_grad()
def read_scores(score, rows, prompts, tokenizer, setting):
    """The scores of a second reward model for answers that are there; no penalty for a missing EOS."""
    scores, size = [], setting.micro_batch_size
    for part in [rows[first : first + size] for first in range(0, len(rows), size)]:
        ids = [prompts[row["prompt_id"]]["prompt_ids"] for row in part]
        tokens = *evaluate.pad(ids, "left", tokenizer, "cpu"), None, None
        tokens = *tokens[:2], *evaluate.pad([row["response_ids"] for row in part], "right", tokenizer, "cpu")
        with evaluate.autocast(setting):
            scores += score(dict(zip(evaluate.TOKENS, tokens))).tolist()
    return scores
