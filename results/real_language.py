"""A real language model learns from human labels: P3O, PPO and online DPO side by side, on film reviews.

    python results/real_language.py [--hh PAIRS.jsonl]     trains and measures what is missing
    python results/real_language.py --plots_only --folder results/real_language     from the logs alone

SmolLM2-135M-Instruct continues the first words of a review. The reward model learnt from pairs of reviews
that people had called positive and negative; a judge, a second one from other reviews and another seed, says
whether what was gained is more than the reward model's own taste. Every training is a stage script run from
the command line; its data came through data.py. DPO's labels are drawn with the probabilities that the reward
model gives them: only so does it have the optimum of the other two.

Everything is kept under out/real_language (--folder) and continued if interrupted: data, models,
logs/NAME.json of every finished run, which is never repeated; and, from the logs alone, report.md,
curves.png and *.csv. Some four hours (an estimate) on two cores with bfloat16 matrix units, longer with
float32 (DTYPE); a process takes 6 GB at most. --hh: pairs with columns prompt, chosen, rejected: how much
of a reward is an offset of its prompt there? results/real_language has the logs and no models: nothing can
be trained in it.

Gain: mean reward less the SFT model's on the same prompts. KL to the SFT model: nats per response, exact at
every token. Legend: P prompts, S responses to each, share (M, P) the weights of the prompts in M resamples.
"""

import argparse
import csv
import json
import math
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
COMPARED = "ppo", "p3o-v2"  # with offsets, and in longer runs
STRETCH = 3  # times the steps, at that part of the rate, in a longer run
BEST_OF = 2, 4  # answers of the SFT model: what no training at all would gain
WINDOW = 20  # steps averaged for a point of the training curves
BETA, DTYPE = 1.0, "bfloat16"  # with this beta the optimum is within what sft_responses can draw
CRITIC = ppo.Args().critic_learning_rate / ppo.Args().learning_rate  # PPO's rates keep this ratio
FIRST_WORDS, PROMPT, RESPONSE, LONGER = 4, 12, 16, 32  # words, and tokens; completions with EOS
PAIR = PROMPT + LONGER  # tokens of a whole review, at most
HH_PROMPT, HH_PAIR, HH_RESPONSE = 192, 96, 48  # tokens
TRUSTED_ESS = 10  # of the samples to a prompt: the optimum is drawn as far as that
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
    tuning_steps: int = 20
    rates: tuple = (1e-5, 3e-5, 1e-4)
    seeds: tuple = (1, 2, 3)
    shifts: tuple = (4, 1)  # times the spread of the reward among the responses to a prompt
    prompts_per_step: int = 16
    measured: int = 64  # P, of the test prompts
    responses: int = 8  # S
    sft_responses: int = 160  # S of the SFT model: they draw the optimum, too
    hh_pairs: int = 10**6  # at most; of prompts and pairs within the lengths
    hh_validation: int = 200
    hh_prompts: int = 96


QUICK = Size(24, 8, 8, 8, 12, 4, 2, 1, (1e-5,), (1,), (1,), 4, 4, 2, 16, 16, 8, 4)


# ----------------------------------------------------------------------------------------------- the splits
def make_splits(reviews, tokenizer, size):
    """{data set: {split: rows}} of [{"text", "label"}, ...]: no review in two of them, no prompt of the
    validation and test splits in train."""
    texts = {review["text"].strip(): review["label"] for review in reviews}  # no text twice
    texts = {text: label for text, label in texts.items() if len(text.split()) > FIRST_WORDS}
    prompts = ["Review: " + " ".join(text.split()[:FIRST_WORDS]) for text in texts]
    completions = [" " + " ".join(text.split()[FIRST_WORDS:]) for text in texts]
    ended = [completion + tokenizer.eos_token for completion in completions]
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompts, ended)]
    lengths = [[len(x) for x in part] for part in ids]
    names = "text", "label", "prompt", "completion", "prompt_tokens", "tokens"
    rows = [dict(zip(names, row)) for row in zip(texts, texts.values(), prompts, completions, *lengths)]
    rows = [row for row in rows if row["prompt_tokens"] <= PROMPT and row["tokens"] <= LONGER]
    rng = random.Random(0)
    rng.shuffle(rows)
    wanted, begun = ["test"] * size.test + ["validation"] * size.validation, set()
    taken, rest = {"test": [], "validation": []}, []
    for row in rows:  # held-out prompts first, no two alike
        if wanted and row["tokens"] <= RESPONSE and row["prompt"] not in begun:
            taken[wanted.pop()].append(row)
            begun.add(row["prompt"])
        else:
            rest.append(row)
    short = [row for row in rest if row["tokens"] <= RESPONSE and row["prompt"] not in begun]
    short = short[: size.sft + size.sft_validation]
    enough = not wanted and len(short) == size.sft + size.sft_validation
    theory.require(enough, f"only {len(short)} short reviews are left for SFT; give a larger --reviews")
    train, used = short[: size.sft], {row["text"] for row in short}
    splits = {"sft": {"train": train, "validation": short[size.sft :], "test": taken["test"]}}
    splits["prompts"] = {"train": list({row["prompt"]: row for row in train}.values())} | taken
    for name, columns in {"sft": ("prompt", "completion"), "prompts": ("prompt",)}.items():
        splits[name] = {x: [pick(row, *columns) for row in part] for x, part in splits[name].items()}
    rest = [row for row in rest if row["text"] not in used]
    labels = [[row["text"] for row in rest if row["label"] == label] for label in (1, 0)]
    for number, name in enumerate(("pairs", "judge_pairs")):  # every other review
        splits[name] = pair_splits([part[number::2] for part in labels], rng, size)
    return splits


def pick(row, *names):
    return {name: row[name] for name in names}


def pair_splits(labels, rng, size):
    """{split: pairs} of [positive texts, negative texts]; every text in two pairs with other partners."""
    splits, start = {}, 0
    counts = {"validation": size.pair_validation, "test": 4, "train": size.pair_reviews}
    for name, count in counts.items():  # without a test split data.py would take one from train
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
    names = "prompt", "chosen", "rejected"
    pairs = list({row["prompt"]: row for row in read_lines(path, names)}.values())
    columns = [tokenizer([pair[x] for pair in pairs])["input_ids"] for x in names]
    lengths = zip(*([len(ids) for ids in column] for column in columns))
    fits = [a <= HH_PROMPT and max(b, c) < HH_PAIR and min(b, c) > 0 for a, b, c in lengths]
    pairs = [pair for pair, fit in zip(pairs, fits) if fit]
    random.Random(0).shuffle(pairs)
    first, last = size.hh_prompts, size.hh_prompts + size.hh_validation
    enough = len(pairs) > last + 16
    theory.require(enough, f"{path} has only {len(pairs)} pairs within the lengths; give more")
    train = pairs[last : last + size.hh_pairs]
    return {"train": train, "validation": pairs[first:last], "test": pairs[:first]}


def read_lines(path, names):
    """The named columns of a file of JSON lines."""
    with evaluate.explained(f"cannot read {path!r}", f"give JSON lines, each with {', '.join(names)}"):
        return [pick(json.loads(line), *names) for line in open(path, encoding="utf-8")]


def read_reviews(name):
    """[{"text", "label"}, ...] of a file or the hub."""
    columns = "text", "label"
    if Path(name).is_file():
        rows = read_lines(name, columns)
    else:
        with evaluate.explained(f"cannot read data set {name!r}", "give a hub name or a file of JSON lines"):
            rows = [pick(row, *columns) for row in datasets.load_dataset(name, split="train")]
    theory.require({row["label"] for row in rows} <= {0, 1}, f"{name}: a label is neither 0 nor 1; mend it")
    return rows


def write_data(name, splits, args):
    """Writes rows as JSON lines, and what data.py makes of them to FOLDER/data/NAME."""
    folder = args.folder / "rows" / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "dataset": folder,
        "model": args.model,
        "output_dir": args.folder / "data" / name,
        "overwrite": True,
    }
    theory.require(call("data.py", flags), f"data.py failed on {name}; see above", 1)


# ------------------------------------------------------------------------------------------------- the runs
def make_run(part, method, rate, seed, steps, args, times=0, shift=0.0):
    """Name, script and flags of a run; paths are no part of its flags."""
    script, flags, _ = reproduce.METHODS[method]
    flags = flags | METHODS[method] | {"learning_rate": rate, "seed": seed, "steps": steps, "beta": BETA}
    flags |= {"dtype": DTYPE, "prompt_length": PROMPT, "response_length": RESPONSE, "epochs": 2}
    B = args.size.prompts_per_step
    flags |= {"prompts_per_step": B, "minibatch_size": B}
    flags |= {"eval_prompts": 64, "eval_every": 0 if part == "tuning" else steps // 6, "save_every": 20}
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
        for m in [m for m in COMPARED if m in known]:
            runs.append(make_run("shifted", m, known[m], size.seeds[0], size.steps, args, times, shift))
    for m in [m for m in COMPARED if m in known]:
        rate = float(f"{known[m] / STRETCH:.2g}")
        runs.append(make_run("longer", m, rate, size.seeds[0], STRETCH * size.steps, args))
    return runs, unknown


def best_rate(method, runs, args):
    """The rate with the highest objective in tuning; None while a run of it is missing."""
    own = [run for run in runs if run["method"] == method]
    logs = [read_log(args, run["name"], run["flags"]) for run in own]
    if not all(logs):
        return None
    objectives = [late_mean(log, "objective") for log in logs]
    return own[objectives.index(max(objectives))]["rate"]


def late_mean(log, name):
    return statistics.fmean(late(log, name))


def late(log, name):
    """Values of the second half of the steps, in which no prompt of the first half comes again."""
    values = log["steps"][name]
    return values[len(values) // 2 :]


def spread_of(sft):
    """Standard deviation of the reward among the responses to a prompt, two digits."""
    return float(f"{math.sqrt(variance_split(tensor(sft, 'reward'))['within']):.2g}") if sft else None


def setting_of(args):
    """What the folder is for. One of another setting, or not ours, is refused: it would be mixed up."""
    named = {x: getattr(args, x) for x in ("model", "reviews")}  # of the hub, or a path, of which the end
    named = {x: Path(name).name if Path(name).is_absolute() else name for x, name in named.items()}
    setting = json.loads(json.dumps(named | {"size": asdict(args.size)}))
    ours = read_log(args, "setting") == setting or not args.folder.exists() or not any(args.folder.iterdir())
    wrong = f"{args.folder} was not begun with this model, these reviews and these sizes"
    theory.require(ours, f"{wrong}; give another --folder")
    return setting


def call(script, flags):
    """Runs a script in one thread and shows its last line; whether it succeeded.

    glibc keeps freed memory: to fetch the large tensors of every step anew takes long.
    """
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
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
    weights = [] if keep else [folder / "model.safetensors"]
    for file in (folder / "checkpoint.pt", folder / "critic" / "model.safetensors", *weights):
        file.unlink(missing_ok=True)


def stage(name, script, flags, model, data, args):
    """A stage before RL: its weights and its log, if it lacks one of them."""
    folder = args.folder / name
    if read_log(args, name):
        kept = (folder / "model.safetensors").exists()
        theory.require(kept, f"{folder} has lost its model.safetensors; begin again in another --folder")
        return
    paths = {"model": model, "dataset": args.folder / "data" / data}
    flags = STAGE | {"dtype": DTYPE} | flags
    theory.require(train(script, flags | paths, folder), f"{name} failed; see above", 1)
    use_eager_attention(folder)
    write_log(args, name, reproduce.origin() | {"flags": flags} | read_curve(folder))
    tidy(folder, keep=True)


def use_eager_attention(folder):
    """Whoever loads this model gets it: on a CPU in bfloat16 the default is slow backwards."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "eager"}, indent=2))


def run_job(run, args):
    """Trains, measures and logs a run of an RL method."""
    if read_log(args, run["name"], run["flags"]):
        return
    paths = {"model": args.folder / "sft_model", "reward_model": args.folder / "reward_model"}
    folder = args.folder / run["name"]
    if not train(run["script"], run["flags"] | paths | {"dataset": args.folder / "data" / "prompts"}, folder):
        return
    if run["part"] == "tuning":
        write_log(args, run["name"], reproduce.origin() | {"flags": run["flags"]} | read_curve(folder))
    elif not measure_job(run["name"], args):
        return
    tidy(folder, keep=run["part"] == "main" and run["seed"] == args.size.seeds[0])


def measure_job(name, args):
    """Answers and their scores, in a process of its own: torch has one random state per process."""
    flags = {"measure": name, "model": args.model, "folder": args.folder}
    return call(f"results/real_language.py{' --quick' if args.quick else ''}", flags)


def hh_job(splits, args):
    """The reward model of other people's pairs, and the plain model's answers to their prompts."""
    write_data("hh", splits, args)
    flags = {"prompt_length": HH_PROMPT, "response_length": HH_PAIR, "micro_batch_size": 4}  # 16: 18 GB
    stage("hh_reward_model", "reward_model.py", flags, args.model, "hh", args)
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
    setting, tokenizer = setting_of(args), evaluate.load_tokenizer(args.model)
    wants_hh = args.hh and not read_log(args, "hh")
    hh = make_hh_splits(args.hh, tokenizer, args.size) if wants_hh else None  # before hours of training
    if not read_log(args, "splits"):
        splits = make_splits(read_reviews(args.reviews), tokenizer, args.size)
        write_log(args, "setting", setting)
        for name, parts in splits.items():
            write_data(name, parts, args)
        rows = {name: {split: len(part) for split, part in parts.items()} for name, parts in splits.items()}
        write_log(args, "splits", pick(setting, "model", "reviews") | {"rows": rows})
    stage("sft_model", "sft.py", {"epochs": 1, "response_length": RESPONSE}, args.model, "sft", args)
    scorers, sft = {"reward_model": ("pairs", 0), "judge": ("judge_pairs", 1)}, args.folder / "sft_model"
    jobs = []
    for name, (data, seed) in scorers.items():
        flags = {"seed": seed, "response_length": PAIR, "minibatch_size": 32}
        jobs.append((stage, name, "reward_model.py", flags, sft, data, args))
    at_once(jobs, args)
    jobs = [] if read_log(args, "sft") else [(measure_job, "sft", args)]
    jobs += [(run_job, run, args) for run in plan(args)[0] if run["part"] == "tuning"]
    at_once(jobs, args)
    runs = plan(args)[0]
    jobs = [(run_job, run, args) for run in runs if run["part"] == "main"]
    jobs += [(hh_job, hh, args)] if hh else []
    jobs += [(run_job, run, args) for run in runs if run["part"] in ("shifted", "longer")]
    at_once(jobs, args)


# ---------------------------------------------------------------------------------------------- measurement
def read_curve(folder):
    """What a log keeps of metrics.jsonl: some metrics of every step, all evaluations, minutes."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    steps = {x: [round(row[x], 5) for row in rows[1:]] for x in STEPWISE if x in rows[-1]}
    points = []
    for row in [row for row in rows if any(x.startswith("eval_") for x in row)]:
        numbers = {x: round(y, 5) for x, y in row.items() if x.startswith("eval_") and isinstance(y, float)}
        points.append({"step": row["step"]} | numbers)
    minutes = sum(value for row in rows for x, value in row.items() if x.startswith("seconds_")) / 60
    return {"steps": steps, "evaluations": points, "minutes": round(minutes, 2)}


def measure(name, args):
    """logs/NAME.json of a run, of "sft" or of "hh": answers to held-out prompts, and what they are worth."""
    size, hh = args.size, name == "hh"
    model = args.model if hh else str(args.folder / "sft_model")
    data = args.folder / "data" / ("hh" if hh else "prompts")
    setting = evaluate.Args(dataset=str(data), seed=12345, dtype=DTYPE)
    setting.reward_model = str(args.folder / ("hh_reward_model" if hh else "reward_model"))
    setting.model, setting.device, setting.temperature = model, "cpu", 1.0
    setting.prompt_length, setting.response_length = (HH_PROMPT, HH_RESPONSE) if hh else (PROMPT, RESPONSE)
    setting.missing_eos_penalty = 0.0 if hh else 1.0  # few of hh end within the limit: no noise of that
    setting.samples_per_prompt = size.sft_responses if name == "sft" else size.responses
    setting.micro_batch_size, setting.sample_batch_size = 32, 256
    tokenizer = evaluate.load_tokenizer(model)
    reference = evaluate.load_model(AutoModelForCausalLM, model, tokenizer, setting)
    P = size.hh_prompts if hh else size.measured
    prompts = evaluate.read_prompts(setting.dataset, ["test"], tokenizer, setting, P)
    policy, reward = reference, evaluate.load_reward(tokenizer, setting)
    log = reproduce.origin()
    if name not in ("sft", "hh"):
        policy = evaluate.load_model(AutoModelForCausalLM, str(args.folder / name), tokenizer, setting)
        (run,) = [run for run in plan(args)[0] if run["name"] == name]
        log |= {"flags": run["flags"]} | read_curve(args.folder / name)
    rows = evaluate.answer(name, (policy, reference, reward), prompts, None, tokenizer, setting)
    log["reward"] = by_prompt([row["reward"] for row in rows], len(prompts))
    for x, of in {"kl": "kl_exact", "length": "length", "ended": "ended"}.items():
        values = by_prompt([float(row[of]) for row in rows], len(prompts), digits=9)
        log[x] = [round(statistics.fmean(own), 4) for own in values]
    if not hh:  # its texts may hurt, and it has no judge
        setting.reward_model = str(args.folder / "judge")
        scores = read_scores(evaluate.load_reward(tokenizer, setting), rows, prompts, tokenizer, setting)
        log["judge"] = by_prompt(scores, len(prompts))
        first = rows[:: setting.samples_per_prompt][:8]
        log["samples"] = [pick(row, "prompt", "response", "reward") for row in first]
    write_log(args, name, log)
    reached = statistics.fmean(row["reward"] for row in rows)
    print(f"{name}: reward {reached:.3f} on {len(prompts)} test prompts")


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
        prompt = evaluate.pad(ids, "left", tokenizer, "cpu")
        response = evaluate.pad([row["response_ids"] for row in part], "right", tokenizer, "cpu")
        with evaluate.autocast(setting):
            scores += score(dict(zip(evaluate.TOKENS, (*prompt, *response)))).tolist()
    return scores


# -------------------------------------------------------------------------------------------- the statistics
def tensor(log, name):
    return torch.tensor(log[name], dtype=torch.float64)


def variance_split(reward):
    """The variance of rewards (P, S) between prompts and within them; share = between / (between + within).

    raw: the variance of the prompts' means, to which S answers that differ by chance give within / S alone;
    between is raw without that, and may be negative. share_low, share_high: bootstrap over prompts.
    """
    (P, S), mean, own = reward.shape, reward.mean(1), reward.var(1)

    def parts(weight):  # (M, P) -> (M,) each
        raw = (weight @ mean**2 - (weight @ mean) ** 2) * P / (P - 1)
        return raw, weight @ own

    def share(weight):
        raw, within = parts(weight)
        return (raw - within / S) / (raw - within / S + within)

    raw, within = (x.item() for x in parts(torch.full((P,), 1 / P, dtype=torch.float64)))
    found = {"prompts": P, "responses": S, "between": raw - within / S, "within": within, "raw": raw}
    found |= {"chance": within / S}
    return found | dict(zip(("share", "share_low", "share_high"), theory.bootstrap(share, P)))


ON_CURVE = "kl", "reward", "ess"


def draw_optimum(reward, judge):
    """The Gibbs curve from N answers of the SFT model, as far as it can be trusted: its rows, and by prompt.

    reward, judge (P, N). Rows: of gibbs_frontier; gold_reward is what the judge makes of that optimum.
    By prompt: {"kl", "gain", "ess"}, (P, G).
    """
    scale = reward.std(1).mean().item() or 1.0
    betas = [scale * 10 ** (3 - g / 20) for g in range(101)]
    rows = theory.gibbs_frontier(reward, betas, gold=judge)
    rows = list(takewhile(lambda row: row["ess"] >= TRUSTED_ESS, rows))
    alone = [theory.gibbs_frontier(own, betas[: len(rows)]) for own in reward.split(1)]
    kl, best, ess = (
        torch.tensor([[row[x] for row in own] for own in alone], dtype=torch.float64) for x in ON_CURVE
    )
    return rows, {"kl": kl, "gain": best - reward.mean(1, keepdim=True), "ess": ess}


def by_seed(run, log, sft, optimum):
    """The numbers of a run, for a table; its values by prompt under "prompts". optimum: curves by prompt."""
    values = {"gain": tensor(log, "reward").mean(1) - tensor(sft, "reward").mean(1), "kl": tensor(log, "kl")}
    values["objective"] = values["gain"] - BETA * values["kl"]
    values["judge's gain"] = tensor(log, "judge").mean(1) - tensor(sft, "judge").mean(1)
    values |= {x: tensor(log, x) for x in ("length", "ended")}
    point = pick(run, "part", "method", "rate", "seed", "times", "shift") | {"steps": run["flags"]["steps"]}
    point |= {x: own.mean().item() for x, own in values.items()}
    point |= {"minutes": typical_minutes(log), "prompts": values, "log": log}
    return point | {"efficiency": interval_of("", efficiency([point], optimum), len(tensor(sft, "kl")))[""]}


def efficiency(points, optimum):
    """Statistic of share: the gain of runs as a part of the optimum's at their KL, their mean."""

    def statistic(share):
        parts = []
        for values in [point["prompts"] for point in points]:
            best = theory.optimal_reward(share @ values["kl"], share @ optimum["kl"], share @ optimum["gain"])
            parts.append(share @ values["gain"] / best)
        return torch.stack(parts).mean(0)

    return statistic


def interval_of(name, statistic, num_prompts):
    """Columns name, name_low, name_high: a statistic of share, 95% bootstrap over prompts."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), theory.bootstrap(statistic, num_prompts)))


def mean_of(name, values):
    """The same of the mean of a value of every prompt, (P,)."""
    return interval_of(name, lambda share: share @ values, len(values))


# -------------------------------------------------------------------------------------------------- tables
VALUES = "gain", "kl", "objective", "judge's gain"


def of_seeds(points, optimum):
    """Columns of the mean over runs that differ in their seed."""
    row = {}
    for name in VALUES:
        row |= mean_of(name, torch.stack([x["prompts"][name] for x in points]).mean(0))
    row |= interval_of("efficiency", efficiency(points, optimum), len(points[0]["prompts"]["kl"]))
    return row | {x: statistics.fmean(point[x] for point in points) for x in ("length", "ended")}


def methods_table(points, optimum):
    """A line for each method, means over seeds, and for each of the longer runs."""
    table = []
    for part in ("main", "longer"):
        for method in dict.fromkeys(x["method"] for x in points if x["part"] == part):
            own = [x for x in points if x["part"] == part and x["method"] == method]
            row = {"method": method, "rate": f"{own[0]['rate']:g}", "steps": own[0]["steps"]}
            table.append(row | {"seeds": ", ".join(str(x["seed"]) for x in own)} | of_seeds(own, optimum))
    return table


def untrained_table(sft):
    """What the SFT model's answers say of policies that nobody trained: best of n, the optimum at beta."""
    reward, judge = tensor(sft, "reward"), tensor(sft, "judge")
    alone, table = list(zip(reward.split(1), judge.split(1))), []
    policies = {"sft": [{"kl": 0.0, "reward": r.mean(), "gold_reward": j.mean()} for r, j in alone]}
    for n in BEST_OF:
        best = [[theory.best_of_n(r, n, x) for x in (r, j)] for r, j in alone]
        kl = theory.best_of_n_kl(n)
        policies[f"best of {n} (KL: at most)"] = [{"kl": kl, "reward": r, "gold_reward": j} for r, j in best]
    policies["optimum"] = [theory.gibbs_frontier(r, [BETA], gold=j)[0] for r, j in alone]
    for name, rows in policies.items():
        names = "kl", "reward", "gold_reward"
        values = {x: torch.tensor([row[x] for row in rows], dtype=torch.float64) for x in names}
        gain, row = values["reward"] - reward.mean(1), {"policy": name}
        row |= mean_of("gain", gain) | mean_of("kl", values["kl"])
        row |= mean_of("objective", gain - BETA * values["kl"])
        row |= mean_of("judge's gain", values["gold_reward"] - judge.mean(1))
        table.append(row | {"ess": statistics.fmean(x["ess"] for x in rows) if "ess" in rows[0] else None})
    table[0] |= {x: tensor(sft, x).mean().item() for x in ("length", "ended")}
    return [row | {x: row.get(x) for x in ("length", "ended")} for row in table]


def differences(points, optimum):
    """P3O minus another method on the same prompts, mean over the seeds that both have."""
    table = []
    for part, other in [(part, m) for part in ("main", "longer") for m in METHODS if m != "p3o-v2"]:
        own = [x for x in points if x["part"] == part]
        ours, theirs = ({x["seed"]: x for x in own if x["method"] == m} for m in ("p3o-v2", other))
        both = [seed for seed in ours if seed in theirs]
        if not both:
            continue
        ours, theirs = ([x[seed] for seed in both] for x in (ours, theirs))
        row = {"p3o-v2 minus": other, "steps": ours[0]["steps"], "seeds": len(both)}
        for name in VALUES:
            apart = [a["prompts"][name] - b["prompts"][name] for a, b in zip(ours, theirs)]
            row |= mean_of(name, torch.stack(apart).mean(0))
        parts = [efficiency(x, optimum) for x in (ours, theirs)]
        P = len(ours[0]["prompts"]["kl"])
        table.append(row | interval_of("efficiency", lambda x: parts[0](x) - parts[1](x), P))
    return table


def win_rates(main, sft):
    """Over all pairs of answers to a prompt, of all seeds; ties half."""
    answers, table = {}, []
    for by in ("reward", "judge"):
        answers = {"sft": tensor(sft, by)}
        for method in dict.fromkeys(x["method"] for x in main):
            own = [tensor(x["log"], by) for x in main if x["method"] == method]
            answers[method] = torch.cat(own, 1)  # (P, seeds * S)
        matches = [(m, "sft") for m in answers if m != "sft"]
        matches += [("p3o-v2", m) for m in answers if m not in ("sft", "p3o-v2") and "p3o-v2" in answers]
        for a, b in matches:
            wins, ties = theory.cross_wins(answers[a], answers[b])
            row = {"by": "reward model" if by == "reward" else by, "method": a, "against": b}
            table.append(row | mean_of("wins", wins) | {"ties": ties.mean().item()})
    return table


def tuning_table(runs, logs):
    """Means over the second half of every tuning run, +- their standard error over steps."""
    table = []
    for run in [run for run in runs if run["part"] == "tuning" and logs[run["name"]]]:
        row = {"method": run["method"], "rate": f"{run['rate']:g}"}
        for name in ("objective", "reward", "kl"):
            values = late(logs[run["name"]], name)
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
            row[{"objective": "reward - beta kl"}.get(name, name)] = (
                f"{statistics.fmean(values):.3f} +- {error:.3f}"
            )
        table.append(row | {"objective": late_mean(logs[run["name"]], "objective")})
    best = {x["method"]: max(y["objective"] for y in table if y["method"] == x["method"]) for x in table}
    return [x | {"chosen": "yes" if x.pop("objective") == best[x["method"]] else ""} for x in table]


def shifted_table(points, size):
    """Runs with offsets and the same run without; change: of the objective, on the same prompts."""
    own = [x for x in points if x["method"] in COMPARED and x["seed"] == size.seeds[0]]
    own = [x for x in own if x["part"] in ("main", "shifted")]
    base, table = {x["method"]: x["prompts"]["objective"] for x in own if x["part"] == "main"}, []
    for x in sorted(own, key=lambda x: (COMPARED.index(x["method"]), x["times"])):
        row = {"method": x["method"], "offsets, times the spread": str(x["times"])}
        row |= pick(x, "shift", "gain", "kl", "objective")
        if x["method"] in base:
            row |= mean_of("change", x["prompts"]["objective"] - base[x["method"]])
        table.append({"change": None} | row if x["method"] not in base else row)
    return table if any(x["part"] == "shifted" for x in own) else []


def cost_table(main):
    """Seconds of a step, tokens sampled per second, minutes of a run; means over steps and seeds."""
    table = []
    for method in dict.fromkeys(x["method"] for x in main):
        own = [x for x in main if x["method"] == method]
        steps = {x: statistics.fmean(sum((y["log"]["steps"][x] for y in own), [])) for x in STEPWISE[-4:]}
        row = {"method": method} | {x.replace("_", " "): value for x, value in steps.items()}
        table.append(row | {"minutes": statistics.fmean(x["minutes"] for x in own)})
    return table


def stages_table(args):
    """Held-out numbers of the stages before and after they were trained."""
    table = []
    for name in ("sft_model", "reward_model", "judge", "hh_reward_model"):
        log, measure = read_log(args, name), "perplexity" if name == "sft_model" else "accuracy"
        if log:
            before, after = (log["evaluations"][i][f"eval_{measure}"] for i in (0, -1))
            steps = log["evaluations"][-1]["step"]
            table.append(
                {"stage": name, "steps": steps, "held-out": measure, "before": before, "after": after}
            )
    return table


def samples_table(main, sft, size):
    """First answers to the first prompts, side by side."""
    columns = {"sft": sft} | {x["method"]: x["log"] for x in main if x["seed"] == size.seeds[0]}
    rows = [["prompt", *columns]]
    for number, sample in enumerate(sft["samples"]):
        own = [log["samples"][number] for log in columns.values()]
        rows.append([sample["prompt"], *(f"{x['response']} ({x['reward']:.2f})" for x in own)])
    return theory.markdown_table(rows)


# -------------------------------------------------------------------------------------------------- report
def write_report(args):
    """report.md, curves.png and a CSV a table, from the logs alone; returns the runs that are missing."""
    runs, missing = plan(args)
    logs = {run["name"]: read_log(args, run["name"], run["flags"]) for run in runs}
    missing += [name for name, log in logs.items() if not log]
    missing += [x for x in ("splits", "sft_model", "reward_model", "judge", "sft") if not read_log(args, x)]
    sft, points, rows, optimum, main = read_log(args, "sft"), [], [], {}, []
    if sft:
        rows, optimum = draw_optimum(tensor(sft, "reward"), tensor(sft, "judge"))
        measured = [run for run in runs if run["part"] != "tuning" and logs[run["name"]]]
        points = [by_seed(run, logs[run["name"]], sft, optimum) for run in measured]
        main = [x for x in points if x["part"] == "main"]
    answered = {x: read_log(args, x) for x in ("sft", "hh") if read_log(args, x)}
    split = [{"answers": x} | variance_split(tensor(log, "reward")) for x, log in answered.items()]
    plain = [{x: y for x, y in point.items() if x not in ("prompts", "log")} for point in points]
    tables = {  # title: name of the CSV, rows
        "Methods, means over seeds": ("methods", methods_table(points, optimum)),
        "Without training": ("untrained", untrained_table(sft) if sft else []),
        "P3O minus the others": ("differences", differences(points, optimum)),
        "Every run": ("runs", plain),
        "Win rates": ("wins", win_rates(main, sft) if sft else []),
        "Tuning": ("tuning", tuning_table(runs, logs)),
        "Is the reward's variance between prompts?": ("variance", split),
        "Offsets in the reward": ("shifted", shifted_table(points, args.size)),
        "Cost": ("cost", cost_table(main)),
        "Stages before": ("stages", stages_table(args)),
    }
    tables = {title: (name, rows) for title, (name, rows) in tables.items() if rows}
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.values():
        with open(args.folder / f"{name}.csv", "w", newline="") as file:
            columns = list(dict.fromkeys(x for row in table for x in row))
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({x: reproduce.text(value) for x, value in row.items()} for row in table)
    used = [log for log in logs.values() if log]
    parts = ["# A real language model learns from human labels"]
    parts += [explain(args, used, sft, rows, optimum)]
    parts += [f"missing: {', '.join(missing)}"] if missing else []
    parts += (
        ["![reward along training; reward and judge after it; all against KL](curves.png)"] if main else []
    )
    for title, (_, table) in tables.items():
        parts += [f"## {title}", reproduce.markdown(table)]
    if main:
        parts += ["## First answers to the first test prompts (rewards), unselected"]
        parts += [samples_table(main, sft, args.size)]
        draw(points, rows, sft).savefig(args.folder / "curves.png", dpi=150)
    (args.folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"{len(used)} runs; {f'missing: {len(missing)}, see report.md' if missing else 'nothing missing'}")
    return missing


EXPLAINED = """
- {model} on {reviews}{credit}; autocast to {dtype}. A prompt is the first {words} words of a review. A
missing EOS costs 1 in the reward, nothing in the judge's score. Reward model and judge learnt from
different reviews.
- gain: over the SFT model on the same test prompts; objective: gain less beta KL, beta {beta}; kl: nats per
response. online-dpo: its labels are drawn with the reward model's probabilities, where dpo.py's default
takes the higher reward; only so has it the optimum of the others. PPO's critic learns at {critic:.2f} times
the policy's rate, as in ppo.py's defaults.
- In square brackets: 95%, bootstrap over prompts, for these very trainings; how much a method varies from
one to the next is seen in "Every run". Only the last stage has seeds.
- {optimum} Best of n: the mean over all subsets of the SFT model's answers; its KL is at most log n - (n -
1) / n.
- Tuning: seed 0, second half of {tuning} steps, +- the standard error over steps; raw rewards, no gains.
- Left in the picture: the training samples, means of {window} steps, each with a standard error of about
{error:.2f}; the optimum is that of the test prompts. Solid, dashed, dotted: seeds. Hollow: longer runs.
- Offsets: a normal number for every row of the prompts, times 1 or 4 times the spread of the reward among
the responses to a prompt, {spread}: the square root of its variance within prompts in the SFT model's
answers, to two digits. Nothing in a prompt tells its number: a critic cannot foresee it.
- Variance. between: that of the prompts' means (raw) less chance, within / responses; share: of between +
within. The reward model of "sft" learnt from different reviews behind one prompt, so that its levels are
learnt, too, and no free offsets. That of "hh" learnt from pairs of answers to one prompt; answers of the
plain model of at most {hh} tokens, scored without a penalty.
- {count} RL runs, {minutes:.0f} minutes of training, had all steps taken what the median one does (the
machine was not always its own); {hardware}. Commit {commits}."""
OPTIMUM = """
The optimum is estimated from {samples} SFT answers a prompt, up to KL {kl:.2f}, where the effective sample
size is {ess:.0f}, {worst:.1f} at the worst prompt; its bias is of the order of 1 / that size. efficiency:
part of the optimum's gain at the same KL; where that is not known, none."""
PANG = " (Pang and Lee, ACL 2005; CC BY 4.0)"
CREDIT = {"rt_polarity_train.jsonl": f", sentence_polarity of nltk_data{PANG}"}
CREDIT["cornell-movie-review-data/rotten_tomatoes"] = PANG


def explain(args, used, sft, rows, optimum):
    """What was done, and how to read it: a list."""
    about, found = read_log(args, "splits") or {}, f"No optimum: too few answers for an ess of {TRUSTED_ESS}."
    if rows:
        numbers = pick(rows[-1], "kl", "ess") | {"worst": optimum["ess"][:, -1].min().item()}
        found = OPTIMUM.strip().format(samples=len(sft["reward"][0]), **numbers)
    numbers = {"words": FIRST_WORDS, "dtype": DTYPE, "beta": BETA, "critic": CRITIC, "hh": HH_RESPONSE}
    numbers |= {x: about.get(x, "not known") for x in ("model", "reviews")} | {"spread": spread_of(sft)}
    numbers |= {"credit": CREDIT.get(about.get("reviews"), ""), "tuning": args.size.tuning_steps}
    numbers |= {"window": WINDOW, "error": math.nan}
    if sft:
        split = variance_split(tensor(sft, "reward"))
        answers = WINDOW * args.size.prompts_per_step * 2
        numbers["error"] = math.sqrt((split["between"] + split["within"]) / answers)
    numbers |= {"optimum": found, "count": len(used), "minutes": sum(map(typical_minutes, used))}
    numbers |= {"hardware": "; ".join(sorted({log["hardware"] for log in used}))}
    numbers |= {"commits": ", ".join(sorted({(log["git_commit"] or "unknown")[:7] for log in used}))}
    items = EXPLAINED.format(**numbers).strip().split("\n- ")
    return "\n".join("- " + " ".join(item.removeprefix("- ").split()) for item in items)


def typical_minutes(log):
    """Of a run, had all its steps taken as long as the median one: pauses do not count."""
    seconds = [log["steps"][x] for x in STEPWISE[-3:]]
    return sum(statistics.median(values) * len(values) for values in seconds) / 60


def draw(points, optimum, sft):
    """Reward along training; the reward model's and the judge's gain on the test prompts; all against KL."""
    figure, axes = reproduce.panels(3, 4.6, 4.2)
    base = {x: tensor(sft, x).mean().item() for x in ("reward", "judge")}
    reached = draw_training(axes[0], [x for x in points if x["part"] == "main"])
    draw_optimum_line(axes[0], optimum, "reward", 0.0, reached, "reward of training samples")
    axes[0].set_ylabel("reward")
    for axis, gain, of, by in zip(
        axes[1:], ("gain", "judge's gain"), ("reward", "gold_reward"), ("reward", "judge")
    ):
        reached = draw_gains(axis, points, untrained_table(sft), gain)
        title = f"gain, {'judge' if by == 'judge' else 'reward model'}, test prompts"
        draw_optimum_line(axis, optimum, of, base[by], reached, title)
    return figure


def draw_training(axis, main):
    """A curve a run, of means of WINDOW steps; returns the largest KL."""
    styles = {seed: style for seed, style in zip(dict.fromkeys(x["seed"] for x in main), ("-", "--", ":"))}
    largest = 0.0
    for x in main:
        columns = []
        for values in (x["log"]["steps"][name] for name in ("kl", "reward")):
            columns.append([statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values), WINDOW)])
        kls = [max(0.0, kl) for kl in columns[0]]  # an estimate, which noise can take below 0
        look = {"color": reproduce.color(x["method"]), "marker": ".", "lw": 1.3, "ls": styles[x["seed"]]}
        if x["seed"] == main[0]["seed"]:
            look["label"] = x["method"]
        axis.plot(kls, columns[1], **look)
        largest = max(largest, *kls)
    return largest


def draw_gains(axis, points, untrained, gain):
    """A dot a run, hollow for the longer ones, and best of n; returns the largest KL."""
    shown = [x for x in points if x["part"] != "shifted"]
    first = shown[0]["seed"]
    for x in shown:
        look = {"color": reproduce.color(x["method"]), "zorder": 3, "ms": 6}
        if x["part"] == "longer":
            look |= {"mfc": "white", "label": f"{x['method']}, {x['steps']} steps"}
        elif x["seed"] == first:
            look["label"] = x["method"]
        axis.plot(x["kl"], x[gain], "o", **look)
    best = [row for row in untrained if row["policy"].startswith("best")]
    label = f"best of {', '.join(map(str, BEST_OF))}: no training"
    axis.plot([x["kl"] for x in best], [x[gain] for x in best], "kx", label=label)
    return max(x["kl"] for x in [*shown, *best])


def draw_optimum_line(axis, optimum, name, base, reached, title):
    """The optimum a little beyond the largest KL of the others."""
    right = 1.2 * max(0.01, reached)
    path = [(row["kl"], row[name] - base) for row in optimum if row["kl"] <= right]
    look = {"color": "black", "lw": 2.2, "label": "optimum for the reward model"}
    axis.plot([x for x, _ in path], [y for _, y in path], **look)
    reproduce.finish(axis, right, title)
    axis.set_ylim(top=1.6 * axis.get_ylim()[1])  # room for the legend


# ------------------------------------------------------------------------------------------------------ main
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or folder")
    reviews = "cornell-movie-review-data/rotten_tomatoes"
    add("--reviews", default=reviews, help="hub name (its split train) or .jsonl; text, label (1: positive)")
    add("--hh", help=".jsonl of prompt, chosen, rejected: variance of the reward on these prompts, too")
    add("--processes", type=int, default=2, help="trainings at a time, one thread each")
    add("--plots_only", action="store_true", help="report and picture from the logs; train nothing")
    add("--quick", action="store_true", help="a few rows and steps, to see that it works")
    add("--folder", default="out/real_language", help="of data, models, logs/, report.md, curves.png")
    add("--measure", help=argparse.SUPPRESS)  # a run; what the parent process asks of another
    args = parser.parse_args(argv)
    for name in ("model", "reviews", "hh"):
        value = getattr(args, name)
        if value and Path(value).exists():
            setattr(args, name, str(Path(value).absolute()))  # we run in ROOT
    args.folder, args.logs = (ROOT / args.folder).resolve(), "logs"
    args.size = QUICK if args.quick else Size()
    theory.require(args.processes > 0, f"--processes {args.processes} is not above 0; give 1 or more")
    return args


def main(args):
    os.chdir(ROOT)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.measure:
        measure(args.measure, args)
        return
    if not args.plots_only:
        run_all(args)
    missing = write_report(args)
    todo = "see above; the same command goes on with what is missing"
    theory.require(args.plots_only or not missing, f"{len(missing)} runs did not end; {todo}", 1)


if __name__ == "__main__":
    try:
        main(parse_args())
    except OSError as error:
        theory.require(False, f"{error}; mend that, and run it again", 1)
    except KeyboardInterrupt:
        theory.require(False, "interrupted; the same command goes on with what was saved", 130)
