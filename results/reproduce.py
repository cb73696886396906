"""The experiments behind results/: trains what is missing, measures it once, writes tables and pictures.

    python results/reproduce.py [EXPERIMENT ...] [--flags]     default: all of them; hours on 2 cores
    python results/reproduce.py --plots_only                   from results/logs alone; less than a minute

A run is a method, its flags and a seed. It is trained by the script of its method into out/results/NAME, one
thread to a process, continued if it was interrupted; then it answers 128 test prompts 16 times each. What is
needed of that goes to results/logs/NAME.json; a run with a log is never repeated. From the logs alone come
results/EXPERIMENT.csv, .md and .png. Learning rates were chosen on seed 0, which draws the optimum and is in
no interval; seeds 1, 2, ... are. Intervals: 95%, Student's t over seeds.

Gain: mean reward less the SFT model's on the same prompts. KL to the SFT model: nats per response, exact at
every token. Legend: P prompts, S responses to each, K responses per prompt in training.
"""

import argparse
import csv
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo
import evaluate
import frontier as theory
import p3o
import ppo
from toy import gold_reward

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("out/results")  # relative to ROOT, where everything runs
RLOO = "results/trl/rloo.py"  # where trl can be imported
SCRIPTS = {"p3o.py": p3o.Args, "ppo.py": ppo.Args, "dpo.py": dpo.Args, RLOO: p3o.Args}
METHODS = {  # name: script, its flags, color (Okabe and Ito, for every kind of eye)
    "p3o-v2": ("p3o.py", {}, "#D55E00"),
    "p3o-v1": ("p3o.py", {"clipping": "separate"}, "#E69F00"),
    "ppg": ("p3o.py", {"clipping": "none"}, "#8C6D00"),
    "ppo": ("ppo.py", {}, "#0072B2"),
    "ppo-max": ("ppo.py", {"preset": "ppo_max", "learning_rate": 1e-3}, "#56B4E9"),
    "dpo": ("dpo.py", {}, "#CC79A7"),
    "online-dpo": ("dpo.py", {"online": True}, "#009E73"),
    # variants, for one question each
    "ppo-unwhitened": ("ppo.py", {"whiten_advantages": False}, "#555555"),
    "ppo-values-unclipped": ("ppo.py", {"value_clip_range": 0.0}, "#332288"),
    "ppo-lam1": ("ppo.py", {"lam": 1.0}, "#44AA99"),
    "ppo-no-critic": ("ppo.py", {"lam": 1.0, "critic_init": "sft", "critic_learning_rate": 1e-9}, "#999933"),
    "p3o-v2-norm-unclipped": ("p3o.py", {"max_grad_norm": 1000.0}, "#882255"),
    "trl-rloo": (RLOO, {}, "#117733"),
    "p3o-weighted": ("p3o.py", {"clip_range": 1e9}, "#AA4499"),  # importance weights, no clip
}
COMPARED = list(METHODS)[:7]
TUNED = list(METHODS)[:8]
SHORT = {"reward_shift": "shift", "num_responses": "K", "epochs": "epochs", "learning_rate": "lr"}  # in names
BETA = p3o.Args().beta
PROMPTS, RESPONSES, POOLED, BATCHES = 128, 16, 32, 100  # POOLED: responses per policy that draw the optimum
MATCHED_KL = 0.5, 1.0, 2.0, 3.0
RATES = 1e-4, 3e-4, 1e-3  # the learning rates tried, the same for every method; one more where the best was
WIDER = {"dpo": 3e-5, "online-dpo": 3e-5, "ppo-max": 3e-3}  # the lowest or the highest of them
SEEDS = {"frontier": 5, "head_to_head": 5, "equivalence": 5, "critic": 5, "overoptimisation": 5}
SEEDS |= {"responses": 3, "distance": 5, "staleness": 3}  # else 1
SHIFTS = 0, 1, 4, 16  # times the spread of the reward among the responses to a prompt
SETTINGS = {  # every one samples the 7680 responses of the default
    "default": {},
    "K 4": {"num_responses": 4, "prompts_per_step": 32, "minibatch_size": 16},
    "K 8": {"num_responses": 8, "prompts_per_step": 16, "minibatch_size": 8},
    "K 8, 120 steps": {"num_responses": 8, "steps": 120, "prompts_per_step": 8, "minibatch_size": 8},
    "K 8, rate 0.0005": {
        "num_responses": 8,
        "prompts_per_step": 16,
        "minibatch_size": 8,
        "learning_rate": 5e-4,
    },
    "K 8, 4 epochs": {"num_responses": 8, "prompts_per_step": 16, "minibatch_size": 8, "epochs": 4},
    "K 16, rate 0.0005": {
        "num_responses": 16,
        "prompts_per_step": 8,
        "minibatch_size": 4,
        "learning_rate": 5e-4,
    },
    "30 steps": {"steps": 30, "prompts_per_step": 128},
    "120 steps": {"steps": 120, "prompts_per_step": 32},
    "240 steps": {"steps": 240, "prompts_per_step": 16, "minibatch_size": 16},
    "4 epochs": {"epochs": 4},
    "minibatch 16": {"minibatch_size": 16},
    "minibatch 64": {"minibatch_size": 64},
    "clip 0.1": {"clip_range": 0.1},
    "clip 0.4": {"clip_range": 0.4},
    "norm 0.3": {"max_grad_norm": 0.3},
    "rate 0.0005": {"learning_rate": 5e-4},
    "constant rate": {"optimizer": "constant"},
    "cosine": {"optimizer": "cosine"},
    "beta2 0.999": {"optimizer": "0.999"},
    "rate 0.0001": {"learning_rate": 1e-4},
    "rate 0.001": {"learning_rate": 1e-3},
}
RATES_TRIED = "rate 0.0001", "default", "rate 0.001"
TIMES = 0.25, 0.5, 1, 2, 10  # the responses sampled, over the default's
PAPER = {("p3o-v2", "ppo"): "57.0", ("p3o-v2", "sft"): "69.3", ("dpo", "p3o-v2"): "45.4"}  # GPT-4, HH, 6B
T975 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # Student's t for 1, 2, ... degrees
MEASURING = threading.Lock()  # torch has one random state per process


# -------------------------------------------------------------------------------------------- the statistics
def t_interval(values):
    """(mean, low, high) of independent values, 95%; low and high are None for a single one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    t = T975[len(values) - 2] if len(values) - 2 < len(T975) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def stat(name, values):
    """Columns name, name_low, name_high; all None where a value is missing: no picking of lucky seeds."""
    known = bool(values) and None not in values
    return dict(zip((name, f"{name}_low", f"{name}_high"), t_interval(values) if known else (None,) * 3))


def interpolate(points, kl):
    """Gains at the given KLs from [(kl, gain), ...], linear in sqrt(KL); None beyond the largest KL.

    The SFT model, at (0, 0), is one of the points: it is where every method goes as beta grows.
    """
    x, y = zip((0.0, 0.0), *sorted(point for point in points if point[0] > 1e-6))
    if len(x) < 2:
        return [None] * len(kl)
    curve = (torch.tensor(v, dtype=torch.float64).expand(len(kl), -1) for v in (x, y))
    gains = theory.optimal_reward(torch.tensor(kl, dtype=torch.float64), *curve).tolist()
    return [gain if math.isfinite(gain) else None for gain in gains]


def interpolate_shares(points, kl, best):
    """Gains of a method at the given KLs from [(kl, gain), ...]: its share of the optimum's gain, linear in
    sqrt(KL) between its points and constant below the first, times the optimum's; None beyond the last.

    best: the optimum's gains at a list of KLs. A chord between gains would lie below even the optimum's
    curve, and the more so the further the points are apart.
    """
    known = [
        (k, gain, top) for (k, gain), top in zip(points, best([k for k, _ in points])) if k > 1e-6 and top
    ]
    if not known:
        return [None] * len(kl)
    known.sort()
    x = torch.tensor([k for k, _, _ in known], dtype=torch.float64).sqrt()
    shares = torch.tensor([gain / top for _, gain, top in known], dtype=torch.float64)
    at = torch.tensor(kl, dtype=torch.float64).sqrt()
    right = torch.searchsorted(x, at).clamp(max=len(x) - 1)
    left = (right - 1).clamp(min=0)
    way = ((at - x[left]) / (x[right] - x[left]).clamp(min=1e-12)).clamp(0, 1)
    share = (shares[left] * (1 - way) + shares[right] * way).tolist()
    inside = (at <= x[-1] + 1e-9).tolist()
    return [s * top if ok and top is not None else None for s, top, ok in zip(share, best(kl), inside)]


def group(points, keys, values):
    """One row for each combination of the keys: the number of seeds, and a stat of every value."""
    groups = {}
    for point in points:
        groups.setdefault(tuple(point[key] for key in keys), []).append(point)
    return [
        {k: f"{v:g}" if isinstance(v, float) else v for k, v in zip(keys, key)}
        | {"seeds": len(members)}
        | {k: v for name in values for k, v in stat(name, [m[name] for m in members]).items()}
        for key, members in groups.items()
    ]


# -------------------------------------------------------------------------------------------------- the runs
def make_run(method, beta, seed, steps=None, tag=None, **extra):
    """Name, script and flags of a run. Flags at their default are left out: equal runs have equal names.

    tag: in the name in place of the flags that differ."""
    script, flags, _ = METHODS[method]
    default = vars(SCRIPTS[script]()) | flags
    extra = {name: value for name, value in extra.items() if value != default[name]}
    parts = [tag] if tag else [f"{SHORT[x]}{v:g}" for x, v in extra.items() if x in SHORT]
    name = "_".join([f"{method}_beta{beta:g}", *parts])
    flags = (
        {"beta": beta, "seed": seed, "eval_every": 0} | flags | extra | ({"steps": steps} if steps else {})
    )
    run = {"name": f"{name}_seed{seed}", "method": method, "beta": beta, "seed": seed}
    return run | {"script": script, "flags": flags}


def shift_by_place(run, shift):
    """The run with offsets by place in its reward; with offsets of 0 it is the run itself."""
    if not shift:
        return run
    name = run["name"].replace("_seed", f"_place{shift:g}_seed")
    return run | {"name": name, "script": f"results/shift_by_place.py {run['script']} {shift:g}"}


def set_up(method, setting, seed, steps=None, times=1):
    """The run of a method in one of SETTINGS, with so many times the steps; the default one is everyone's."""
    default = SCRIPTS[METHODS[method][0]]()
    flags = dict(SETTINGS[setting])
    change = flags.pop("optimizer", None)
    own = flags.pop("steps", default.steps)
    steps = round((steps or own) * times)
    tag = None if set(flags) <= set(SHORT) and not change else setting.replace(" ", "-").replace(",", "")
    run = make_run(method, BETA, seed, steps if steps != default.steps else None, tag=tag, **flags)
    if times != 1:
        run["name"] = run["name"].replace("_seed", f"_x{times:g}_seed")
    if change:
        run["script"] = f"results/with_optimizer.py {run['script']} {change}"
    return run


def best_setting(method, args):
    """The one of SETTINGS with the highest objective on seed 0, of those that have a log."""
    found = {"default": -math.inf}
    for setting in SETTINGS:
        run = set_up(method, setting, 0, args.steps)
        log = read_log(args, run["name"], run["flags"])
        if log:
            means = {name: statistics.fmean(log["prompts"][name]) for name in ("reward", "kl")}
            found[setting] = means["reward"] - run["beta"] * means["kl"]
    return max(found, key=found.get)


def plan(experiment, args):
    """The runs an experiment reports, with the labels that it groups them by."""
    seeds, steps = range(1, (args.seeds or SEEDS.get(experiment, 1)) + 1), args.steps
    if experiment == "tuning":
        return [
            make_run(m, BETA, 0, steps, learning_rate=rate) | {"learning rate": f"{rate:g}"}
            for m in TUNED
            for rate in sorted({*RATES, WIDER.get(m, RATES[0])})
        ]
    many = {"frontier": COMPARED, "head_to_head": COMPARED}.get(experiment)
    if many:
        betas = sorted({*args.betas, *([BETA] if experiment == "head_to_head" else [])})
        return [make_run(m, beta, seed, steps) for seed in seeds for m in many for beta in betas]
    if experiment == "equivalence":
        spread = (read_log(args, "sft") or {}).get("reward_spread")
        shifts = [(f, float(f"{f * spread:.2g}")) for f in SHIFTS] if spread else []
        runs = [
            make_run(m, BETA, seed, steps, reward_shift=shift) | {"offsets": "noise", "times": f}
            for seed in seeds
            for m in ("p3o-v2", "ppo", "ppo-max", "ppo-unwhitened")
            for f, shift in shifts
        ]
        runs += [
            shift_by_place(make_run(m, BETA, seed, steps), shift) | {"offsets": "by place", "times": f}
            for seed in seeds
            for m in ("p3o-v2", "ppo", "ppo-values-unclipped")
            for f, shift in shifts
            if m != "p3o-v2" or f in (SHIFTS[0], SHIFTS[-1])  # it is the same run at any size
        ]
        return runs
    if experiment == "critic":
        methods = "ppo", "ppo-lam1", "p3o-v2", "p3o-v2-norm-unclipped", "ppo-no-critic"
        return [make_run(m, BETA, seed, steps) for seed in seeds for m in methods]
    if experiment == "overoptimisation":
        small, methods = float(f"{0.1 * BETA:.2g}"), ("p3o-v2", "ppo", "dpo", "online-dpo")
        return [make_run(m, small, seed, steps, eval_every=10) for seed in seeds for m in methods]
    if experiment == "responses":
        default = p3o.Args()
        runs = [make_run("ppo", BETA, seed, steps) | {"K": default.num_responses} for seed in seeds]
        for K in (2, 4, 8):  # as many responses per rollout and per optimizer step, whatever K
            batch = {x: getattr(default, x) * 2 // K for x in ("prompts_per_step", "minibatch_size")}
            runs += [
                make_run("p3o-v2", BETA, seed, steps, num_responses=K, **batch) | {"K": K} for seed in seeds
            ]
        return runs
    if experiment == "staleness":
        return [
            make_run(m, BETA, seed, steps, epochs=epochs) | {"epochs": epochs}
            for seed in seeds
            for m in ("p3o-v2", "p3o-v1", "p3o-weighted", "ppg")
            for epochs in (1, 2, 4, 8)
        ]
    if experiment == "distance":
        tried = [(m, x) for x in SETTINGS for m in ("p3o-v2", "ppo")] + [("trl-rloo", x) for x in RATES_TRIED]
        best = {m: best_setting(m, args) for m in ("p3o-v2", "ppo", "trl-rloo")}
        compared = [(m, x) for m in ("p3o-v2", "ppo") for x in dict.fromkeys(("default", best[m]))]
        runs = [(m, x, 0, 1, "tuning") for m, x in tried]
        runs += [(m, x, seed, 1, "held-out seeds") for m, x in compared for seed in seeds]
        for times in TIMES:  # long runs are few
            for m in ["p3o-v2"] if times == 10 else best:
                count = {1: 3 if m == "trl-rloo" else len(seeds)}.get(times, 1)
                runs += [(m, best[m], seed, times, "samples") for seed in list(seeds)[:count]]
        return [
            set_up(m, x, seed, steps, times) | {"part": part, "setting": x, "times": times}
            for m, x, seed, times, part in runs
        ]
    return [make_run("ppo", BETA, 1, steps)]  # variance: a policy and its critic


def call(script, flags, folder, *more):
    """Runs a script, one thread, continuing what was interrupted. Its last line, None if it failed."""
    command = [sys.executable, *script.split(), "--output_dir", str(folder), *more]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command += ["--resume"] if Path(folder, "args.json").exists() and script != "toy.py" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    print(lines[-1] if lines else f"{folder}: exit status {done.returncode}", flush=True)
    return None if done.returncode else lines[-1]


def prepare(args):
    """The stages before: data, SFT model, reward model; and the measure of the SFT model."""
    for script, folder, done in (
        ("toy.py", "data/toy", "args.json"),
        ("sft.py", "out/sft", "model.safetensors"),
        ("reward_model.py", "out/reward_model", "model.safetensors"),
    ):
        if not Path(folder, done).exists() and call(script, {}, folder) is None:
            raise SystemExit(f"{script} failed")
    if not read_log(args, "sft"):
        rows = answer("sft")
        reward = column(rows, "reward")
        spread = {"reward_spread": float(f"{reward.std(1).mean().item():.2g}")}
        spread |= {"reward_variance": reward.var(1).mean().item()}
        write_log(args, "sft", origin() | spread | measures(rows))


def train(runs, args, models=False):
    """Trains and measures the runs that have no log (models: or no weights), some processes at a time."""
    todo = {run["name"]: run for run in runs if not read_log(args, run["name"], run["flags"])}
    if models:
        todo |= {run["name"]: run for run in runs if not (RUNS / run["name"] / "model.safetensors").exists()}

    def work(run):
        if call(run["script"], run["flags"], RUNS / run["name"], "--device", "cpu", "--save_every", "0"):
            with MEASURING:
                write_log(args, run["name"], measure(run))
            (RUNS / run["name"] / "checkpoint.pt").unlink(missing_ok=True)  # most of the disk space

    with ThreadPoolExecutor(args.processes) as pool:
        try:
            for job in [pool.submit(work, run) for run in todo.values()]:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ----------------------------------------------------------------------------------------------- measurement
def read_log(args, name, flags=None):
    """A run's log; None if there is none, or one of other flags."""
    path = Path(args.folder, args.logs, f"{name}.json")
    log = json.loads(path.read_text()) if path.exists() else None
    return log if log and (flags is None or log["flags"] == flags) else None


def write_log(args, name, log):
    path = Path(args.folder, args.logs, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(log, separators=(",", ":")) + "\n")
    path.with_suffix(".new").replace(path)


def origin():
    """Commit, versions and hardware, as they are now."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    cpu = names[0] if names else platform.processor() or platform.machine()
    versions = {name: version(name) for name in ("torch", "transformers", "datasets")}
    hardware = f"{cpu}, {os.cpu_count()} cores, 1 thread a process"
    return {"git_commit": git.stdout.strip() or None, "versions": versions, "hardware": hardware}


@functools.cache
def bench(responses):
    """What every policy is measured with: evaluate.py's arguments, tokenizer, reference, reward, prompts."""
    settings = {name: getattr(p3o.Args(), name) for name in evaluate.SHARED}
    settings |= {"num_prompts": PROMPTS, "samples_per_prompt": responses, "device": "cpu", "seed": 12345}
    args = evaluate.Args(**settings)
    args.model = p3o.Args().model
    tokenizer = evaluate.load_tokenizer(args.model)
    reference = evaluate.load_model(AutoModelForCausalLM, args.model, tokenizer, args)
    prompts = evaluate.read_prompts(args.dataset, ["test"], tokenizer, args, PROMPTS)
    return args, tokenizer, reference, evaluate.load_reward(tokenizer, args), prompts


def load_run(name, tokenizer, args):
    return evaluate.load_model(AutoModelForCausalLM, str(RUNS / name), tokenizer, args)


def answer(name, responses=RESPONSES):
    """The responses of a run, or of "sft": rows of evaluate.py's answers.jsonl."""
    torch.set_num_threads(1)  # of this thread
    args, tokenizer, reference, reward, prompts = bench(responses)
    policy = reference if name == "sft" else load_run(name, tokenizer, args)
    return evaluate.answer(name, (policy, reference, reward), prompts, gold_reward, tokenizer, args)


def column(rows, name):
    """A field of the rows of a policy: (P, S), float64."""
    return torch.tensor([row[name] for row in rows], dtype=torch.float64).view(PROMPTS, -1)


def measures(rows):
    """What a log keeps of a policy's responses: means by prompt, and the gold reward of each response."""
    names = {"reward": "reward", "gold": "gold_reward", "kl": "kl_exact", "length": "length", "eos": "ended"}
    means = {name: [round(x, 4) for x in column(rows, of).mean(1).tolist()] for name, of in names.items()}
    gold = column(rows, "gold_reward").tolist()
    return {"prompts": means, "gold": [[round(x, 2) for x in row] for row in gold]}


def read_curve(folder):
    """The evaluations of a training run, the updates since the one before, and its minutes."""
    rows, curve, since = [json.loads(line) for line in open(folder / "metrics.jsonl")], [], []
    for row in rows:
        since.append(row)
        if "eval_reward" in row:
            names = "step", "eval_reward", "eval_kl_exact", "eval_response_length", "eval_eos_rate"
            point = {name: row[name] for name in names}
            texts = [json.loads(line) for line in open(folder / f"samples_{row['step']}.jsonl")]
            gold = [gold_reward(x["prompt"], x["response"]) for x in texts]
            point["eval_gold"] = statistics.fmean(gold)
            point |= {
                "eval_gold_even": statistics.fmean(gold[::2]),
                "eval_gold_odd": statistics.fmean(gold[1::2]),
            }
            for name, reduce in (("clip_fraction", statistics.fmean), ("log_ratio_max", max)):
                values = [row[name] for row in since if name in row]
                point |= {name: reduce(values)} if values else {}
            norms = [row["grad_norm"] for row in since if "grad_norm" in row]
            point |= {"grad_norm_min": min(norms), "grad_norm_max": max(norms)} if norms else {}
            curve.append({name: round(value, 5) for name, value in point.items()})
            since = []
    minutes = sum(v for row in rows for k, v in row.items() if k.startswith("seconds_")) / 60
    return curve, round(minutes, 2)


def measure(run):
    """The log of a trained run."""
    folder = RUNS / run["name"]
    curve, minutes = read_curve(folder)
    log = origin() | {"flags": run["flags"], "minutes": minutes, "curve": curve}
    log["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return log | measures(answer(run["name"]))


def estimate_optimum(args):
    """logs/optimum.json: the Gibbs curve on the test prompts, from responses of SFT model and seed-0 runs."""
    if read_log(args, "optimum"):
        return
    runs = [make_run(m, beta, 0, args.steps) for m in ("p3o-v2", "ppo") for beta in args.betas]
    train(runs, args, models=True)
    setting, tokenizer, _, _, prompts = bench(POOLED)
    names = [run["name"] for run in runs if read_log(args, run["name"])]
    rows = {name: answer(name, POOLED) for name in ("sft", *names)}
    for name in names:
        policy = load_run(name, tokenizer, setting)
        evaluate.add_logps(name, policy, prompts, sum(rows.values(), []), tokenizer, setting)
    reward, gold = (torch.cat([column(r, x) for r in rows.values()], 1) for x in ("reward", "gold_reward"))
    logps = []
    for own in rows.values():
        logp = torch.tensor([[row["logp"][name] for name in rows] for row in own], dtype=torch.float64)
        logps.append(logp.view(PROMPTS, -1, len(rows)))
    curve, _ = theory.draw_optimum(reward, torch.cat(logps, 1), gold)
    points = {name: [point[name] for point in curve] for name in ("kl", "reward", "gold_reward", "ess")}
    write_log(args, "optimum", origin() | {"policies": list(rows), "responses": POOLED} | points)


def gradients(policy, critic, batch, args):
    """{estimator: gradient of its loss, flat} at pi_old = pi, all from the same responses. args: ppo.Args.

    PPO's is a mean over tokens; times the tokens per response it is in the units of the others.
    """
    mask, K = batch["response_mask"], args.num_responses
    new = p3o.response_logps(policy, *(batch[x] for x in p3o.TOKENS), args.temperature)  # (B * K, R)
    seq, old, ref = (x.sum(1).view(-1, K) for x in (new, batch["logp_old_tok"], batch["logp_ref_tok"]))
    reward = p3o.trajectory_reward(batch["score"].view(-1, K), old, ref, args.beta)
    others = (reward.sum(1, keepdim=True) - reward) / (K - 1)
    losses = {
        "PPG": p3o.pairwise_policy_gradient_loss(seq, reward),
        "VPG": -(reward * seq).mean(),
        "VPG, batch mean": -((reward - reward.mean()) * seq).mean(),
        "leave-one-out": -((reward - others) * seq).mean(),
    }
    for name, whiten, lam in (
        ("PPO, lam = 1", False, 1.0),
        ("PPO", False, args.lam),
        ("PPO, whitened", True, args.lam),
    ):
        setting = dataclasses.replace(args, whiten_advantages=whiten, lam=lam)
        ppo.estimate_advantages(critic, batch, batch["score"], args.beta, setting)
        loss, _ = ppo.ppo_clip_loss(new, batch["logp_old_tok"], batch["advantages"], mask, args.clip_range)
        losses[name] = loss * mask.sum() / len(mask)
    weights = list(policy.parameters())
    parts = {name: torch.autograd.grad(loss, weights, retain_graph=True) for name, loss in losses.items()}
    return {name: torch.cat([x.flatten() for x in part]).double() for name, part in parts.items()}


def true_gradient(batches):
    """The mean of an unbiased estimator over many batches, and the variance of that mean (trace).

    PPO's with lam = 1: a baseline of the tokens before is no bias, and its noise is the least among the
    unbiased ones here. batches: an iterable of {estimator: gradient}.
    """
    count, total, squares = 0, 0.0, 0.0
    for found in batches:
        x = found["PPO, lam = 1"]
        count, total, squares = count + 1, total + x, squares + (x @ x).item()
    mean = total / count
    return mean, (squares / count - (mean @ mean).item()) / (count - 1)


def errors_of(batches, truth, noise):
    """{estimator: variance over batches (trace), cosine to the truth, squared error over the truth's square}.

    noise: of the truth itself, taken off the squared error and the truth's square.
    """
    count, sums = 0, {}
    square = (truth @ truth).item()
    for found in batches:
        count += 1
        for name, x in found.items():
            own = sums.setdefault(name, {"sum": 0.0, "squares": 0.0, "cosine": 0.0, "error": 0.0})
            own["sum"] = own["sum"] + x
            own["squares"] += (x @ x).item()
            own["cosine"] += (x @ truth).item() / math.sqrt((x @ x).item() * square)
            own["error"] += ((x - truth) @ (x - truth)).item()
    table = {}
    for name, own in sums.items():
        mean = own["sum"] / count
        variance = (own["squares"] / count - (mean @ mean).item()) * count / (count - 1)
        error = (own["error"] / count - noise) / max(square - noise, 1e-30)
        table[name] = {"variance": variance, "cosine": own["cosine"] / count, "error": error}
    return table


def measure_variance(args):
    """logs/variance.json: errors of the gradients over batches, at the SFT model and at a trained policy."""
    (run,) = plan("variance", args)
    if read_log(args, "variance"):
        return
    train([run], args, models=True)
    _, tokenizer, reference, reward, _ = bench(RESPONSES)
    setting = dataclasses.replace(ppo.Args(), device="cpu", beta=BETA, micro_batch_size=64)
    prompts = p3o.read_prompts(setting.dataset, ["train"], tokenizer, setting)
    table, trained = {}, RUNS / run["name"]
    for label, policy_folder, critic_folder in (
        ("SFT", setting.model, setting.reward_model),  # PPO's critic starts as the reward model
        ("after PPO", str(trained), str(trained / "critic")),  # a policy and the critic that grew up with it
    ):
        policy = p3o.load_model(AutoModelForCausalLM, policy_folder, tokenizer, setting)
        values = p3o.load_model(AutoModelForSequenceClassification, critic_folder, tokenizer, setting)

        def batches(seed, count, policy=policy, values=values):
            for step in range(1, count + 1):
                torch.manual_seed(seed * 10**6 + step)
                rows = p3o.data_order(len(prompts), setting.prompts_per_step, step, seed)
                examples, K = [prompts[row] for row in rows], setting.num_responses
                batch = p3o.sample_batch(policy, examples, K, tokenizer, setting)
                batch = p3o.score_batch(batch, (policy, reference, reward), 64 * K, setting)
                yield gradients(policy, values, batch, setting)

        truth, noise = true_gradient(batches(1001, args.batches))
        table[label] = errors_of(batches(1000, args.batches), truth, noise)
        table[label] |= {"norm of the truth": math.sqrt(max((truth @ truth).item() - noise, 0.0))}
    write_log(args, "variance", origin() | {"batches": args.batches, "policies": table})


# --------------------------------------------------------------------------------------------------- reports
class Logs:
    """What the reports are written from: .points, a dict per run that has a log; .sft; .optimum; .missing."""

    def __init__(self, experiment, args):
        self.args, self.sft, self.optimum = args, read_log(args, "sft"), read_log(args, "optimum")
        runs = plan(experiment, args)
        self.logs = {run["name"]: read_log(args, run["name"], run["flags"]) for run in runs}
        self.missing = [name for name, log in self.logs.items() if not log]
        no_optimum = "tuning", "equivalence", "critic", "head_to_head", "staleness"
        needed = ["sft"] if experiment in no_optimum else ["sft", "optimum"]
        self.missing += [name for name in needed if not getattr(self, name)]
        self.base = {name: statistics.fmean(x) for name, x in self.sft["prompts"].items()} if self.sft else {}
        self.points = [self.point(run) for run in runs if self.logs[run["name"]]] if self.sft else []

    def point(self, run):
        log = self.logs[run["name"]]
        means = {name: statistics.fmean(values) for name, values in log["prompts"].items()}
        gain, best = means["reward"] - self.base["reward"], self.best([means["kl"]])[0]
        point = run | {"gain": gain, "gold_gain": means["gold"] - self.base["gold"], "log": log}
        point |= {name: means[name] for name in ("kl", "length", "eos")}
        point["objective"] = gain - run["beta"] * means["kl"]
        point["efficiency"] = gain / best if best and means["kl"] > 1e-6 else None
        reducers = {"clip_fraction": statistics.fmean, "log_ratio_max": max}
        reducers |= {"grad_norm_min": min, "grad_norm_max": max}
        for name, reduce in reducers.items():
            values = [row[name] for row in log["curve"] if name in row]
            point[name] = reduce(values) if values else None
        return point

    def best(self, kl, of="reward"):
        """The optimum's gains at the given KLs, None beyond the curve."""
        if not self.optimum:
            return [None] * len(kl)
        base = self.base["reward" if of == "reward" else "gold"]
        return interpolate(list(zip(self.optimum["kl"], [x - base for x in self.optimum[of]])), kl)

    def seeds(self, method):
        """{seed: [(kl, gain), ...]} over the betas of a method."""
        curves = {}
        for point in self.points:
            if point["method"] == method:
                curves.setdefault(point["seed"], []).append((point["kl"], point["gain"]))
        return curves


def tuning(logs):
    """Which learning rate is best for each method? On seed 0, which is in no interval.

    The picture ends at 0; the table does not."""
    rows = group(logs.points, ("method", "learning rate"), ("objective", "gain", "kl"))
    best = {}
    for row in rows:
        best[row["method"]] = max(best.get(row["method"], row), row, key=lambda row: row["objective"])
    rows = [row | {"best": "yes" if best[row["method"]] is row else ""} for row in rows]
    titles = {"objective": "gain - beta KL", "gain": "gain"}
    return {"learning rates": rows}, draw_lines(rows, "learning rate", titles, "learning rate", bottom=0)


def frontier(logs):
    """Which method gets most reward for its KL?"""
    values = "kl", "gain", "gold_gain", "efficiency", "objective", "length", "eos"
    tables = {"every beta": group(logs.points, ("method", "beta"), values)}
    matched, paired, areas, at = [], [], [], {}
    for method in COMPARED:
        curves = logs.seeds(method)
        at[method] = {
            seed: interpolate_shares(curve, MATCHED_KL, logs.best) for seed, curve in curves.items()
        }
    for i, kl in enumerate(MATCHED_KL):
        best = logs.best([kl])[0]
        for method in at:
            gains = {seed: row[i] for seed, row in at[method].items() if row[i] is not None}
            if not gains:
                continue
            matched.append({"KL": f"{kl:g}", "method": method, "seeds": len(gains)})
            matched[-1] |= stat("gain", list(gains.values())) | {"optimum": best}
            matched[-1] |= stat("efficiency", [gain / best if best else None for gain in gains.values()])
            both = {s: at["p3o-v2"][s][i] for s in gains if s in at["p3o-v2"]} if method != "p3o-v2" else {}
            differences = [own - gains[s] for s, own in both.items() if own is not None]
            if differences:
                row = {"KL": f"{kl:g}", "p3o-v2 minus": method, "seeds": len(differences)}
                paired.append(row | stat("difference", differences))
    curves = {m: logs.seeds(m) for m in COMPARED if logs.seeds(m)}
    ends = [max(kl for kl, _ in curve) for seeds in curves.values() for curve in seeds.values()]
    if ends and logs.optimum:
        end = min([*ends, logs.optimum["kl"][-1]])
        grid = [end * i / 200 for i in range(201)]
        whole = sum(logs.best(grid))
        for method, seeds in curves.items():
            gains = [interpolate_shares(curve, grid, logs.best) for curve in seeds.values()]
            shares = [sum(c) / whole if end > 1e-6 and None not in c else None for c in gains]
            row = {"method": method, "seeds": len(shares), "up to KL": end}
            areas.append(row | stat("area over the optimum's", shares))
    tables |= {"at equal KL": matched, "p3o-v2 minus the others, seed by seed": paired, "area": areas}
    return tables, draw_frontiers(logs, tables["every beta"])


def equivalence(logs):
    """What does an equivalent reward, one offset per prompt, change?

    times: the offsets' standard deviation over that of the reward among SFT responses to a prompt.
    Objective: gain less beta KL. The last table is about the rewards as they are, unshifted."""
    first = {(p["method"], p["seed"]): p for p in logs.points if not p["times"]}
    values, keys = ("gain", "gold_gain", "kl", "objective", "length", "eos"), ("method", "offsets", "times")
    rows = group(logs.points, keys, values)
    for row in rows:
        own = [p for p in logs.points if all(str(p[key]) == str(row[key]) for key in keys)]
        pairs = [(p, first[p["method"], p["seed"]]) for p in own if (p["method"], p["seed"]) in first]
        same = [p["log"]["sha256"] == unshifted["log"]["sha256"] for p, unshifted in pairs]
        row |= stat("objective lost", [u["objective"] - p["objective"] for p, u in pairs])
        row["identical weights"] = f"{sum(same)} of {len(same)}"
    p3o_v2 = {p["seed"]: p["objective"] for p in logs.points if p["method"] == "p3o-v2" and not p["times"]}
    ahead = [
        p | {"p3o-v2 minus": p["method"], "difference": p3o_v2[p["seed"]] - p["objective"]}
        for p in logs.points
        if p["method"] != "p3o-v2" and p["seed"] in p3o_v2
    ]
    titles = {kind: f"gain - beta KL, offsets: {kind}" for kind in ("noise", "by place")}
    drawn = [
        row | {row["offsets"] + end: row[f"objective{end}"] for end in ("", "_low", "_high")} for row in rows
    ]
    drawn = [dict.fromkeys(titles) | row for row in drawn]
    tables = {
        "shifted": rows,
        "objective, seed by seed": group(ahead, ("p3o-v2 minus", "offsets", "times"), ("difference",)),
        "between prompts": offsets(logs.sft) if logs.sft else [],
    }
    return tables, draw_lines(drawn, "times", titles, "offsets over the reward's spread")


def critic(logs):
    """Without offsets PPO is ahead of P3O. Is it the critic?

    ppo-lam1: no bias for less noise. ppo-no-critic: lam = 1 too, and values that stay 0. Norm: of gradients,
    a step's mean, before the clip at 1; p3o-v2-norm-unclipped clips at 1000. Minus ppo: seed by seed."""
    ppo = {p["seed"]: p["objective"] for p in logs.points if p["method"] == "ppo"}
    points = [
        p
        | {"minus ppo": p["objective"] - ppo[p["seed"]] if p["seed"] in ppo else None}
        | {f"norm, {name}": p[f"grad_norm_{name[:3]}"] for name in ("minimum", "maximum")}
        for p in logs.points
    ]
    values = "objective", "minus ppo", "gain", "kl", "norm, minimum", "norm, maximum"
    rows = group(points, ("method",), values)
    for row in rows:
        own = [p for p in logs.points if p["method"] == row["method"] and p["grad_norm_min"]]
        row["norm, least of all"] = min((p["grad_norm_min"] for p in own), default=None)
        row["norm, most of all"] = max((p["grad_norm_max"] for p in own), default=None)
    return {"critic": rows}, draw_dots(rows, "objective", "gain - beta KL")


def offsets(log):
    """Standard deviations of each reward: within a prompt, of the prompts' means, and of those by chance."""
    means, rows = log["prompts"], []
    within = {"reward": log["reward_spread"], "gold": statistics.fmean(map(statistics.stdev, log["gold"]))}
    variance = {"reward": log["reward_variance"]}
    variance |= {"gold": statistics.fmean(map(statistics.variance, log["gold"]))}
    for name, title in (("reward", "reward model"), ("gold", "gold reward")):
        chance = math.sqrt(variance[name] / len(log["gold"][0]))
        row = {"reward": title, "spread at one prompt": within[name]}
        rows.append(row | {"spread of the means": statistics.stdev(means[name]), "of it by chance": chance})
    return rows


def overoptimisation(logs):
    """With a weak leash, where does the gold reward turn while the proxy still climbs?

    The peak is the evaluation with the highest gold reward on every other held-out prompt; what is said of it
    comes from the prompts between."""
    curves, rows = {}, []
    for method in dict.fromkeys(point["method"] for point in logs.points):
        runs = [p["log"]["curve"] for p in logs.points if p["method"] == method]
        runs = [{row["step"]: row for row in curve} for curve in runs]
        mean, names = {}, {"kl": "eval_kl_exact", "proxy": "eval_reward", "gold": "eval_gold_odd"}
        names |= {"chosen on": "eval_gold_even"}
        for step in sorted(set.intersection(*map(set, runs))):
            gains = {name: [run[step][of] - run[0][of] for run in runs] for name, of in names.items()}
            mean[step] = {name: statistics.fmean(values) for name, values in gains.items()}
        peak, last = max(mean, key=lambda step: mean[step]["chosen on"]), max(mean)
        later = [mean[step]["gold"] for step in mean if step >= peak]
        row = {"method": method, "seeds": len(runs), "KL at the gold peak": mean[peak]["kl"]}
        row |= {"gold at the peak": mean[peak]["gold"], "lowest after it": min(later)}
        row |= {"KL at the end": mean[last]["kl"]}
        row |= stat("gold at the end", [r[last]["eval_gold_odd"] - r[0]["eval_gold_odd"] for r in runs])
        row |= stat(
            "gold since the peak", [r[last]["eval_gold_odd"] - r[peak]["eval_gold_odd"] for r in runs]
        )
        row |= stat("proxy since the peak", [r[last]["eval_reward"] - r[peak]["eval_reward"] for r in runs])
        rows.append(row)
        curves[method] = [(point["kl"], point["proxy"], point["gold"]) for point in mean.values()]
    tables = {
        "training curves, means over seeds": rows,
        "after training": group(logs.points, ("method", "beta"), ("kl", "gain", "gold_gain", "length")),
    }
    return tables, draw_curves(logs, curves)


def win_and_tie_rate(gold_a, gold_b):
    """How often a beats b, ties half, and how often they tie: all cross pairs of responses at a prompt.

    gold_a, gold_b: (P, S). Policies that draw with the same random numbers give the same text in most draws;
    comparing draw with draw would push every rate towards one half."""
    a, b = (torch.tensor(gold, dtype=torch.float64) for gold in (gold_a, gold_b))
    difference = a.unsqueeze(2) - b.unsqueeze(1)  # (P, S, S)
    ties = (difference == 0).double().mean().item()
    return (difference > 0).double().mean().item() + ties / 2, ties


def head_to_head(logs):
    """Whose answers win, by the gold reward? All cross pairs of answers to a prompt; ties half.

    The paper's numbers are GPT-4's judgement of a 6B model on HH at KLs of 7 to 12 nats; ours are the true
    reward of a small world. Who is ahead can be compared, by how much cannot."""
    at_beta = [p for p in logs.points if p["beta"] == BETA]
    target = [p["kl"] for p in at_beta if p["method"] == "p3o-v2"]
    nearest = {}
    for p in logs.points if target else ():
        key, gap = (p["method"], p["seed"]), abs(p["kl"] - statistics.fmean(target))
        if key not in nearest or gap < nearest[key][0]:
            nearest[key] = gap, p
    tables, sft = {}, {"kl": 0.0, "log": logs.sft}
    for title, points in (("equal beta", at_beta), ("nearest KL", [p for _, p in nearest.values()])):
        runs = {m: {p["seed"]: p for p in points if p["method"] == m} for m in COMPARED}
        runs = {m: r for m, r in runs.items() if r} | {"sft": {p["seed"]: sft for p in points}}
        rows = tables[title] = []
        for a, b in ((a, b) for a in runs for b in runs if a != b and set(runs[a]) & set(runs[b])):
            seeds = sorted(set(runs[a]) & set(runs[b]))
            rates = [win_and_tie_rate(*(runs[m][s]["log"]["gold"] for m in (a, b))) for s in seeds]
            row = {"method": a, "against": b, "seeds": len(seeds)}
            row |= stat("wins %", [100 * wins for wins, _ in rates])
            row |= {"ties %": 100 * statistics.fmean(ties for _, ties in rates)}
            kls = (statistics.fmean(runs[m][s]["kl"] for s in seeds) for m in (a, b))
            rows.append(row | dict(zip(("KL", "its KL"), kls)) | {"paper, GPT-4, HH %": PAPER.get((a, b))})
    return tables, draw_matrices(tables)


def responses(logs):
    """At the same number of sampled responses: more prompts, or more responses to each? PPO to compare.

    Objective: gain less beta KL."""
    first = {p["seed"]: p["objective"] for p in logs.points if (p["method"], p["K"]) == ("p3o-v2", 2)}
    points = [
        p | {"more than K = 2": p["objective"] - first[p["seed"]] if p["seed"] in first else None}
        for p in logs.points
    ]
    values = "objective", "more than K = 2", "gain", "gold_gain", "kl", "efficiency"
    titles = {"objective": "gain - beta KL", "gain": "gain", "kl": "KL, nats"}
    rows = group(points, ("method", "K"), values)
    return {"responses": rows}, draw_lines(rows, "K", titles, "responses per prompt")


def staleness(logs):
    """When does clipping start to matter?

    Minus p3o-v2: seed by seed. Trained on another machine than the other experiments, from an SFT and a
    reward model of its own: to be compared within."""
    clipped = {(p["epochs"], p["seed"]): p["objective"] for p in logs.points if p["method"] == "p3o-v2"}
    for point in logs.points:
        other = clipped.get((point["epochs"], point["seed"]))
        point["minus p3o-v2"] = None if other is None else point["objective"] - other
    values = "gain", "kl", "objective", "minus p3o-v2", "clip_fraction", "log_ratio_max"
    rows = group(logs.points, ("method", "epochs"), values)
    titles = {"objective": "gain - beta KL", "kl": "KL, nats", "clip_fraction": "clip fraction"}
    titles |= {"log_ratio_max": "largest |log rho|"}
    return {"staleness": rows}, draw_lines(rows, "epochs", titles, "epochs per rollout")


def responses_to(curve, share):
    """How many responses a curve [(responses, efficiency), ...] needs to reach a share; None: it does not.

    Linear in the logarithm of their number; the first crossing counts. Of a curve that starts beyond the
    share it is only known that so many are enough: "at most"."""
    curve = sorted(curve)
    if curve and curve[0][1] >= share:
        return f"at most {curve[0][0]}"
    for (left, below), (right, above) in zip(curve, curve[1:]):
        if above >= share:
            return round(left * (right / left) ** ((share - below) / (above - below)))
    return None


def objectives_by_prompt(point):
    """Mean reward less beta KL at each prompt."""
    means = point["log"]["prompts"]
    return [reward - point["beta"] * kl for reward, kl in zip(means["reward"], means["kl"])]


def distance(logs):
    """How near to the optimum do P3O and PPO come, by which setting, and with how many responses?

    Tried on seed 0 and compared on the others; every setting samples as many responses. Efficiency: the gain
    over the optimum's at the same KL. trl-rloo: RLOOTrainer of TRL with its own optimizer settings and the
    learning rate best for it. The rate falls to 0 over each run, however many responses it samples. Over
    prompts: of differences averaged over seeds; all runs answer the same prompts with the same random
    numbers, whose error no interval over seeds has."""
    count = p3o.Args().steps * p3o.Args().prompts_per_step * p3o.Args().num_responses
    values = "objective", "efficiency", "gain", "kl"
    parts = {
        part: [p | {"responses": round(count * p["times"])} for p in logs.points if p["part"] == part]
        for part in ("tuning", "held-out seeds", "samples")
    }
    tried, compared, sampled = parts.values()
    best = {m: best_setting(m, logs.args) for m in ("p3o-v2", "ppo", "trl-rloo")}
    settings = [
        row | {"best": "yes" if best[row["method"]] == row["setting"] else ""}
        for row in group(tried, ("method", "setting"), values)
    ]
    objectives = {(p["method"], p["setting"], p["seed"]): p["objective"] for p in compared}
    for p in compared:
        default = objectives.get((p["method"], "default", p["seed"]))
        p["more than default"] = None if default is None else p["objective"] - default
    by_prompt = {(p["method"], p["setting"], p["seed"]): objectives_by_prompt(p) for p in compared}
    leads, best_pair = [], (best["p3o-v2"], best["ppo"])
    for own, its in dict.fromkeys((("default", "default"), (best["p3o-v2"], "default"), best_pair)):
        seeds = [s for m, x, s in objectives if m == "p3o-v2" and x == own and ("ppo", its, s) in objectives]
        row = {"p3o-v2": own, "minus ppo": its, "seeds": len(seeds)}
        row |= stat("difference", [objectives["p3o-v2", own, s] - objectives["ppo", its, s] for s in seeds])
        both = [zip(by_prompt["p3o-v2", own, s], by_prompt["ppo", its, s]) for s in seeds]
        differences = [[x - y for x, y in pairs] for pairs in both]  # by seed and prompt
        leads.append(row | stat("over prompts", [statistics.fmean(x) for x in zip(*differences)]))
    curves = group(sampled, ("method", "setting", "responses"), values)
    needed = []
    for method in dict.fromkeys(row["method"] for row in curves):
        curve = [(row["responses"], row["efficiency"]) for row in curves if row["method"] == method]
        known = [(x, y) for x, y in curve if y is not None]
        row = {"method": method, "to 90%": responses_to(known, 0.90), "to 95%": responses_to(known, 0.95)}
        needed.append(row)
    tables = {
        "settings on seed 0": settings,
        "default and best on the other seeds": group(
            compared, ("method", "setting"), (*values, "more than default")
        ),
        "objective, seed by seed": leads,
        "more and fewer responses": curves,
        "responses needed": needed,
    }
    titles = {"efficiency": "share of the optimum's gain", "objective": "gain - beta KL", "kl": "KL, nats"}
    return tables, draw_lines(curves, "responses", titles, "responses sampled")


def variance(logs):
    """How far are the estimators from the true gradient, on the same responses, a batch of 128 at a time?

    Truth: the mean of an unbiased estimator over as many batches again. Cosine: of a batch's gradient to it,
    whatever the scale. Squared error: over the square of the truth; whitening changes the scale and has none.
    Variance: over batches, trace of the covariance, over PPG's. With all pairs PPG and leave-one-out are the
    same estimator."""
    log, rows = read_log(logs.args, "variance"), []
    for policy, estimators in log["policies"].items() if log else ():
        base = estimators["PPG"]["variance"]
        for name, x in estimators.items():
            if name != "norm of the truth":
                row = {"policy": policy, "estimator": name, "batches": log["batches"], "cosine": x["cosine"]}
                row |= {"squared error": None if "whitened" in name else x["error"]}
                rows.append(row | {"variance over PPG's": x["variance"] / base})
    logs.logs = {"variance": log}
    logs.missing = [] if log else ["variance"]
    return {"gradients": rows}, draw_bars(rows)


EXPERIMENTS = {
    f.__name__: f
    for f in (
        *(tuning, frontier, head_to_head, critic, equivalence, overoptimisation),
        *(responses, staleness, variance, distance),
    )
}


def text(value):
    """A cell; the same in the CSV and in Markdown."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.3f}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.3g}"


def markdown(rows):
    """A table of rows that have the same columns; name_low and name_high stand in brackets behind name."""
    heads = [name for name in rows[0] if not name.endswith(("_low", "_high"))]
    lines = [heads]
    for row in rows:
        ends = {name: [text(row.get(f"{name}_{x}")) for x in ("low", "high")] for name in heads}
        lines.append([text(row[x]) + (f" [{', '.join(ends[x])}]" if all(ends[x]) else "") for x in heads])
    return theory.markdown_table(lines)


def write_report(experiment, args):
    """EXPERIMENT.csv, .md and .png from the logs."""
    logs = Logs(experiment, args)
    tables, figure = EXPERIMENTS[experiment](logs)
    tables = {title: rows for title, rows in tables.items() if rows}
    used = [log for log in logs.logs.values() if log]
    missing = f"missing: {', '.join(logs.missing)}" if logs.missing else ""
    print(f"{experiment}: {len(used)} logs; {missing or 'nothing missing'}")
    if not tables:
        return
    columns = list(dict.fromkeys(name for rows in tables.values() for row in rows for name in row))
    with open(Path(args.folder, f"{experiment}.csv"), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["table", *columns])
        for title, rows in tables.items():
            writer.writerows([title, *(text(row.get(name)) for name in columns)] for row in rows)
    seeds = sorted({point["seed"] for point in logs.points}) if experiment != "variance" else [1]
    commits = sorted({(log["git_commit"] or "unknown")[:7] for log in used})
    source = f"Commit {', '.join(commits)}; seeds {', '.join(map(str, seeds))}; {len(used)} logs, "
    source += f"{sum(log.get('minutes', 0) for log in used):.0f} minutes of training; "
    source += "; ".join(sorted({log["hardware"] for log in used})) + ". In brackets: 95% intervals over seeds"
    source += "."
    if logs.sft and experiment != "variance":
        error = logs.sft["reward_spread"] / math.sqrt(PROMPTS * RESPONSES)
        source += f" Gains are over one sample of the SFT model; the standard error of its mean, {error:.3f},"
        source += " is in all gains alike and in no difference between methods."
    note = " ".join(EXPERIMENTS[experiment].__doc__.split())
    parts = [f"# {experiment.replace('_', ' ')}", note, source, *([missing] if missing else [])]
    parts += [f"![{experiment}]({experiment}.png)"]
    parts += [part for title, rows in tables.items() for part in (f"## {title}", markdown(rows))]
    Path(args.folder, f"{experiment}.md").write_text("\n\n".join(parts) + "\n")
    figure.savefig(Path(args.folder, f"{experiment}.png"), dpi=150)


PAGES = ("results/README.md",)
BLOCK = re.compile(r"(<!-- results:(\w+) (\{.*?\}) -->\n).*?(<!-- /results -->)", re.S)


def fill_page(path, folder):
    """Writes the tables of a page, each behind a comment that says where every number of it comes from.

    {"table", "where": {column: value}, "row": column, "columns": [[title, {column: value}, value], ...]}: a
    line for each value of the column "row", or of "only"; a cell from the one row of EXPERIMENT.csv that
    fits.
    """

    def table(match):
        with open(Path(folder, f"{match[2]}.csv")) as file:
            rows, spec = list(csv.DictReader(file)), json.loads(match[3])
        rows = [row for row in rows if row["table"] == spec["table"]]
        rows = [row for row in rows if all(row[x] == y for x, y in spec.get("where", {}).items())]
        lines = [[spec.get("title", spec["row"]), *(title for title, _, _ in spec["columns"])]]
        for label in spec.get("only", dict.fromkeys(row[spec["row"]] for row in rows)):
            lines.append([label])
            for _, where, value in spec["columns"]:
                wanted = where | {spec["row"]: label}
                found = [row for row in rows if all(row[x] == y for x, y in wanted.items())]
                ends = [found[0].get(f"{value}_{end}") for end in ("low", "high")] if len(found) == 1 else []
                interval = f" [{', '.join(ends)}]" if ends and all(ends) else ""
                lines[-1].append(found[0][value] + interval if len(found) == 1 else "")
        return f"{match[1]}{theory.markdown_table(lines)}\n{match[4]}"

    page = path.read_text()
    filled = BLOCK.sub(table, page)
    if filled != page:
        path.write_text(filled)


# -------------------------------------------------------------------------------------------------- pictures
def panels(count, width=4.2, height=4.0):
    """A figure with panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure  # not pyplot's: nothing to close

    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    return figure, axes


def color(method):
    return METHODS[method][2] if method in METHODS else "black"


def bars(axis, row, x, y):
    """A point with the intervals that it has."""
    spans = {}
    for name, value in (("xerr", x), ("yerr", y)):
        if row.get(f"{value}_low") is not None:
            spans[name] = [[row[value] - row[f"{value}_low"]], [row[f"{value}_high"] - row[value]]]
    axis.errorbar(row[x], row[y], **spans, color=color(row["method"]), marker="o", ms=4.5, capsize=2, lw=1)


def draw_optimum(axis, logs, right, of):
    """The optimum's curve up to KL `right`."""
    kls = [kl for kl in (logs.optimum or {"kl": []})["kl"] if kl <= right]
    axis.plot(kls, logs.best(kls, of), color="black", lw=2.4, label="optimum")


def draw_frontiers(logs, rows):
    """Reward and gold reward against KL: each method's means over seeds, one point for a beta."""
    figure, axes = panels(2, 5.0, 4.4)
    right = 1.1 * max([row["kl_high"] or row["kl"] for row in rows], default=1.0)
    for axis, of, gain in zip(axes, ("reward", "gold_reward"), ("gain", "gold_gain")):
        draw_optimum(axis, logs, right, of)
        for method in dict.fromkeys(row["method"] for row in rows):
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["kl"])
            path = zip((0, 0), *((row["kl"], row[gain]) for row in own))
            axis.plot(*path, color=color(method), lw=1.2, label=method)
            for row in own:
                bars(axis, row, "kl", gain)
        finish(axis, right, "reward model" if of == "reward" else "gold reward")
    return figure


def draw_curves(logs, curves):
    """Proxy and gold gain against KL along training."""
    figure, axes = panels(2, 5.0, 4.4)
    right = 1.1 * max([point[0] for curve in curves.values() for point in curve], default=1.0) or 1.0
    for place, (axis, of) in enumerate(zip(axes, ("reward", "gold_reward")), 1):
        draw_optimum(axis, logs, right, of)
        for method, curve in curves.items():
            x, y = [point[0] for point in curve], [point[place] for point in curve]
            axis.plot(x, y, color=color(method), marker=".", lw=1.5, label=method)
        finish(axis, right, "reward model (proxy)" if of == "reward" else "gold reward")
    return figure


def finish(axis, right, title):
    """The KL axis on a square-root scale, on which the optimum starts out as a straight line."""
    axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    axis.set_xlim(0, right)
    axis.set_title(title, loc="left", fontsize=11.5)
    axis.set_xlabel("KL to the SFT model, nats (square-root scale)")
    axis.set_ylabel("gain over the SFT model")
    axis.legend(fontsize=9)


def draw_lines(rows, x, titles, label, bottom=-math.inf):
    """A panel for each value against x, which takes few values; a line for each method, cut off at bottom."""
    figure, axes = panels(len(titles))
    ticks = sorted({row[x] for row in rows}, key=float)
    for axis, (value, title) in zip(axes, titles.items()):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method and row[value] is not None]
            own = sorted((row | {"place": ticks.index(row[x])} for row in own), key=lambda row: row["place"])
            axis.plot([r["place"] for r in own], [r[value] for r in own], color=color(method), label=method)
            for row in own:
                bars(axis, row, "place", value)
        axis.set_ylim(bottom=bottom if bottom > -math.inf else None)
        axis.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
        axis.set_title(title, loc="left", fontsize=11.5)
        axis.set_xlabel(label)
    axes[0].legend(fontsize=9)
    return figure


def draw_dots(rows, value, title):
    """A value and its interval for each method, one below the other."""
    figure, axes = panels(1, 6.4, 0.9 + 0.42 * len(rows))
    for place, row in enumerate(reversed(rows)):
        bars(axes[0], row | {"place": place}, value, "place")
    axes[0].set_yticks(range(len(rows)), [row["method"] for row in reversed(rows)])
    axes[0].set_ylim(-0.5, len(rows) - 0.5)
    axes[0].set_xlabel(title)
    return figure


def draw_matrices(tables):
    """Win rates, row against column, of every table."""
    figure, axes = panels(len(tables), 5.4, 4.8)
    for axis, (title, rows) in zip(axes, tables.items()):
        names = [name for name in (*COMPARED, "sft") if any(name == row["method"] for row in rows)]
        grid = [[math.nan] * len(names) for _ in names]
        for row in rows:
            i, j = names.index(row["method"]), names.index(row["against"])
            grid[i][j] = float(row["wins %"])
            axis.text(j, i, f"{grid[i][j]:.0f}", ha="center", va="center", fontsize=10)
        if names:
            axis.imshow(grid, cmap="PuOr_r", vmin=0, vmax=100, alpha=0.6)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"{title}: row beats column, %", loc="left", fontsize=11.5)
        axis.grid(False)
    return figure


def draw_bars(rows):
    """Cosine to the true gradient of the estimators, a panel for each policy."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure, axes = panels(max(len(policies), 1), 5.0, 3.4)
    for axis, policy in zip(axes, policies):
        own = [row for row in rows if row["policy"] == policy]
        for place, row in enumerate(reversed(own)):
            value = row["cosine"]
            axis.barh(place, value, color="#D55E00" if row["estimator"] == "PPG" else "#999999")
            axis.text(value, place, f" {row['estimator']}  {value:.2f}", va="center", fontsize=9.5)
        axis.set_xlim(0, 1.6 * max([row["cosine"] for row in own], default=1.0))
        axis.set_yticks([])
        axis.set_title(policy, loc="left", fontsize=11.5)
        axis.set_xlabel("cosine of a batch's gradient to the true one")
    return figure


# ------------------------------------------------------------------------------------------------------ main
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("experiments", nargs="*", metavar="EXPERIMENT", help=f"default: all of {', '.join(EXPERIMENTS)}")
    add("--plots_only", action="store_true", help="tables and pictures from the logs; train nothing")
    add("--seeds", type=int, help=f"seeds 1, 2, ... of every run; default: {SEEDS}, else 1")
    betas = [float(f"{factor * BETA:.2g}") for factor in (0.2, 0.5, 1.0, 2.0)]
    add("--betas", type=float, nargs="+", default=betas, help="of the frontier; default: %(default)s")
    add("--processes", type=int, default=2, help="trainings at a time, one thread each")
    add("--steps", type=int, help="of every run, for a quick look: other runs than the default's")
    add("--batches", type=int, default=BATCHES, help="of the gradients' variance")
    add("--folder", default=str(Path(__file__).resolve().parent), help="of logs/, tables and pictures")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.experiments) - set(EXPERIMENTS))
    if unknown:
        parser.error(f"unknown experiment {', '.join(unknown)}; choose from {', '.join(EXPERIMENTS)}")
    args.folder, args.logs = str(Path(args.folder).absolute()), "logs"
    return args


def main(args):
    os.chdir(ROOT)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for experiment in args.experiments or EXPERIMENTS:
        apart = f"logs_{experiment}"  # of another machine, whose SFT and reward model were rounded otherwise
        args.logs = apart if Path(args.folder, apart).exists() else "logs"
        if not args.plots_only:
            prepare(args)
        if not args.plots_only and experiment == "variance":
            measure_variance(args)
        elif not args.plots_only:
            train(plan(experiment, args), args)
            train(plan(experiment, args), args)  # the runs that depend on the best of those just trained
        if not args.plots_only and experiment == "frontier":
            estimate_optimum(args)
        write_report(experiment, args)
    for page in PAGES if Path(args.folder) == ROOT / "results" else ():
        fill_page(ROOT / page, args.folder)


if __name__ == "__main__":
    main(parse_args())
