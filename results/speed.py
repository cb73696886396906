"""How fast is it, and what does growth cost? p3o.py and ppo.py phase by phase, beside TRL's trainers.

    python results/speed.py            after the quick start; run nothing beside it
    python results/speed.py --growth   seconds and memory against batch, length, model and K

Every measurement is a run of its own from the command line, the programs in turns, --repeats times: seconds
are medians over its steps but the first, memory is the largest of the process. The peers get the same model,
prompts, reward, lengths, batch and epochs: RLOOTrainer (results/trl/rloo.py, trl 1.16.0), which with K = 2 is
the pairwise gradient, and PPOTrainer (results/trl/ppo.py, trl 1.10.0, the last with one). They need different
versions of trl: --rloo_python and --ppo_python name the Python that has them; without, there is no peer.
Models: the toy's; the toy's with GPT-2's own activation, gelu_new, the same function in eight operations; a
GPT-2 of 124M with random weights and random words (32 tokens, responses of 32). Writes speed_MODEL.csv, .md.

Shares: of the rates of a float32 matrix product (1024 x 1024) and of copying 256 MB, measured just before
with as many threads. Decoding reads every weight once per token; the update multiplies by every weight of
the blocks three times (forward, and backward twice) for every token, by the output layer for those of the
response.
"""

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
EPOCHS, K = 2, 2  # passes over a rollout, responses per prompt
MODELS = {
    "toy": {},
    "toy, gelu_new": {},
    "gpt2-124M": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
}
BATCH = {"gpt2-124M": 8}  # prompts of a step, else 64; 2 responses to each
FEW = 3  # steps of the large model, and as the work grows
PEERS = {"p3o": "trl's rloo", "ppo": "trl's ppo"}


# ------------------------------------------------------------------------------------------------ what is run
def make_world(folder, vocab_size=50257, prompt_length=32, **size):
    """Random GPT-2 and reward model over words w3, w4, ..., and prompts of exactly prompt_length of them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    names = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(3, vocab_size))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    config = {
        "vocab_size": vocab_size,
        "n_positions": 1024,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(0)
    for name, kind, more in (
        ("lm", GPT2LMHeadModel, {}),
        ("rm", GPT2ForSequenceClassification, {"num_labels": 1}),
    ):
        kind(GPT2Config(**config, **size, **more)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        ids = torch.randint(3, vocab_size, (256, prompt_length)).tolist()
        rows = [json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) + "\n" for row in ids]
        (folder / "data" / f"{split}.jsonl").write_text("".join(rows))
    return {"model": folder / "lm", "reward_model": folder / "rm", "dataset": folder / "data"}


def make_old_toy(folder):
    """The toy's models with GPT-2's own activation function."""
    for name in ("sft", "reward_model"):
        shutil.copytree(ROOT / "out" / name, folder / name, ignore=shutil.ignore_patterns("checkpoint.pt"))
        config = json.loads((folder / name / "config.json").read_text())
        config["activation_function"] = "gelu_new"
        (folder / name / "config.json").write_text(json.dumps(config))
    return {"model": folder / "sft", "reward_model": folder / "reward_model", "dataset": "data/toy/prompts"}


def make_command(program, args):
    """The words that start a program, None for a peer whose Python is not given."""
    if program in PEERS:
        return [sys.executable, f"{program}.py"]
    python = args.rloo_python if program == PEERS["p3o"] else args.ppo_python
    return [python, f"results/trl/{program.split()[-1]}.py"] if python else None


def run(command, threads, flags):
    """Runs a program; its metrics, medians over the steps but the first, with the memory of the process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        flags = {"steps": STEPS, "device": "cpu"} | flags | {"output_dir": out}
        flags |= {"eval_every": 0, "save_every": 0, "eval_prompts": 2}
        command = command + [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"error: {command[1]} failed; it said: {said[-600:]}")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "seconds_step" in row or "seconds_update" in row][1:]
    names = [name for name in rows[0] if name.startswith("seconds_") or name == "response_length"]
    result = {name: statistics.median(row[name] for row in rows) for name in names}
    phases = [result[f"seconds_{x}"] for x in ("rollout", "score", "update") if f"seconds_{x}" in result]
    result.setdefault("seconds_step", sum(phases))
    return result | {"memory_gb": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9}


# ------------------------------------------------------------------------------------------------ yardsticks
def yardsticks(threads):
    """The machine at its best: operations a second of a float32 matrix product, bytes a second of a copy."""
    code = """
import time, torch
def best(function, times=12):
    spans = []
    for _ in range(times):
        start = time.perf_counter(); function(); spans.append(time.perf_counter() - start)
    return min(spans)
a, b, big = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.randn(64 * 2**20)
other = torch.empty_like(big)
print(2 * 1024**3 / best(lambda: a @ b), 2 * 4 * big.numel() / best(lambda: other.copy_(big)))
"""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return [float(x) for x in done.stdout.split()]


def count(world):
    """(all weights, those of the blocks, those of the output layer) of a GPT-2, mean tokens of a prompt."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(world["model"])
    head, positions = model.lm_head.weight.numel(), model.transformer.wpe.weight.numel()
    whole = sum(p.numel() for p in model.parameters())
    prompts = datasets.load_dataset(str(world["dataset"]), split="train")["prompt"][:]
    ids = AutoTokenizer.from_pretrained(world["model"])(prompts, add_special_tokens=False)["input_ids"]
    return whole, whole - head - positions, head, statistics.fmean(map(len, ids))


# --------------------------------------------------------------------------------------------------- reports
def spread(values):
    """median [least, most]"""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def describe(results, peers, rows, size, rates):
    """A row of the table: a program's runs, its peer's (may be empty), rows of a rollout, yardsticks."""
    weights, blocks, head, prompt_length = size
    row = {"completions/s": spread([rows / result["seconds_step"] for result in results])}
    row["memory, GB"] = f"{statistics.median(result['memory_gb'] for result in results):.2f}"
    if "seconds_update" in results[0]:
        names = "seconds_rollout", "seconds_score", "seconds_update", "response_length"
        rollout, score, update, length = (statistics.median(r[name] for r in results) for name in names)
        for phase, seconds in (("rollout", rollout), ("score", score), ("update", update)):
            row[f"{phase}, tokens/s"] = f"{rows * length / seconds:.0f}"
        row["rollout, share of step"] = f"{rollout / (rollout + score + update):.2f}"
        row["update, share of step"] = f"{update / (rollout + score + update):.2f}"
        row["rollout, share of bandwidth"] = f"{4 * weights * length / rollout / rates[1]:.2f}"
        operations = 6 * EPOCHS * rows * (blocks * (prompt_length + length) + head * length)
        row["update, share of matrix rate"] = f"{operations / update / rates[0]:.2f}"
    ratios = [peer["seconds_step"] / own["seconds_step"] for peer, own in zip(peers, results)]
    row["speed over trl's"] = spread(ratios) if ratios else ""
    return row


def compare(name, args, folder):
    """Rows of the comparison of one of MODELS: one for each number of threads and program."""
    world = {"model": "out/sft", "reward_model": "out/reward_model", "dataset": "data/toy/prompts"}
    if name != "toy":
        world = make_world(folder, **MODELS[name]) if MODELS[name] else make_old_toy(folder)
    B, length = BATCH.get(name, 64), 32 if name in BATCH else 24
    flags = world | {"prompts_per_step": B, "minibatch_size": B // 2, "micro_batch_size": B // 2}
    flags |= {"prompt_length": 32, "response_length": length, "num_responses": K, "epochs": EPOCHS}
    flags |= {"steps": FEW if name in BATCH else STEPS}
    commands = {program: make_command(program, args) for program in (*PEERS, *PEERS.values())}
    commands = {program: command for program, command in commands.items() if command}
    size, rows = count(world), []
    for threads in args.threads:
        rates, found = yardsticks(threads), {program: [] for program in commands}
        for _ in range(args.repeats):
            for program, command in commands.items():
                found[program].append(run(command, threads, flags))
                print(f"{name}, {threads} threads, {program}: {found[program][-1]}", flush=True)
        for program, results in found.items():
            row = {"model": name, "threads": threads, "program": program}
            row |= describe(results, found.get(PEERS.get(program), []), B * K, size, rates)
            if program == "ppo":  # its update trains a critic too, of the same size
                del row["update, share of matrix rate"]
            rows.append(row)
    return rows


def growth(args, folder):
    """Rows: seconds a step and memory of p3o.py as one thing grows, with the exponent over the range."""
    base = {"prompts_per_step": 16, "response_length": 32, "n_embd": 256, "num_responses": 2}
    rows = []
    for what, factors in (
        ("prompts_per_step", (1, 2, 4)),
        ("response_length", (1, 2, 4)),
        ("n_embd", (1, 2, 4)),
        ("num_responses", (1, 2, 4)),
    ):
        points = []
        for factor in factors:
            size = base | {what: base[what] * factor}
            place = folder / f"{what}{factor}"
            place.mkdir()
            shape = {"n_embd": size["n_embd"], "n_layer": 4, "n_head": 4, "vocab_size": 8192}
            flags = make_world(place, **shape) | {
                "prompt_length": 32,
                "response_length": size["response_length"],
            }
            flags |= {x: size[x] for x in ("prompts_per_step", "num_responses")} | {"steps": FEW}
            flags |= {"minibatch_size": size["prompts_per_step"] // 2, "micro_batch_size": 8}
            command = make_command("p3o", args)
            results = [run(command, args.threads[0], flags) for _ in range(args.repeats)]
            seconds = statistics.median(result["seconds_step"] for result in results)
            memory = statistics.median(result["memory_gb"] for result in results)
            points.append((size[what], seconds, memory))
        span = math.log(points[-1][0] / points[0][0])
        for value, seconds, memory in points:
            row = {
                "grows": what,
                "to": value,
                "seconds a step": f"{seconds:.2f}",
                "memory, GB": f"{memory:.2f}",
            }
            row["exponent of seconds"] = f"{math.log(points[-1][1] / points[0][1]) / span:.2f}"
            row["exponent of memory"] = f"{math.log(points[-1][2] / points[0][2]) / span:.2f}"
            rows.append(row)
            print(row, flush=True)
    return rows


def write_table(name, rows, each, args):
    """NAME.csv and NAME.md; each: what a repeat is."""
    import torch
    import transformers

    info, cpu = Path("/proc/cpuinfo"), "unknown CPU"
    if info.exists():
        cpu = next(line.split(":")[1].strip() for line in open(info) if line.startswith("model name"))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    source = (
        f"Commit {git.stdout.strip()}; torch {torch.__version__}, transformers {transformers.__version__}; "
    )
    source += f"{cpu}, {os.cpu_count()} cores; {args.repeats} repeats in turns, {each}."
    heads = list(dict.fromkeys(head for row in rows for head in row))
    with open(Path(args.folder, f"{name}.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [heads, ["---"] * len(heads), *([str(row.get(head, "")) for head in heads] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = "In brackets: the least and the most of the repeats."
    Path(args.folder, f"{name}.md").write_text(f"# {name}\n\n{source} {note}\n\n{table}\n")


def main(args):
    os.chdir(ROOT)
    for name in ["growth"] if args.growth else args.models:
        with tempfile.TemporaryDirectory() as folder:
            if args.growth:
                write_table(name, growth(args, Path(folder)), f"{FEW} steps each", args)
            else:
                rows, steps = compare(name, args, Path(folder)), FEW if name in BATCH else STEPS
                write_table(f"speed_{name.replace(', ', '_')}", rows, f"{steps} steps each", args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="threads of a process; default: 1 2"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="default: all")
    parser.add_argument("--repeats", type=int, default=5, help="runs of every program; default: 5")
    parser.add_argument("--growth", action="store_true", help="seconds and memory as the work grows")
    parser.add_argument("--folder", default=str(ROOT / "results"), help="of the tables")
    parser.add_argument("--rloo_python", help="a Python that has trl 1.16.0; default: no such peer")
    parser.add_argument("--ppo_python", help="a Python that has trl 1.10.0; default: no such peer")
    main(parser.parse_args())
