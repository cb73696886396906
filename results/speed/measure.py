"""How results/speed measures: a GPT-2 with random weights, and the time and memory of a process."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import lib
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

PEERS = {"p3o.py": "TRL's RLOOTrainer", "ppo.py": "TRL's PPOTrainer"}
SIZES = {"toy": (64, 24, 6), "GPT-2, 124M": (8, 32, 3)}  # prompts a step, K = 2; response length; steps
THREADS = {"toy": (1, 2), "GPT-2, 124M": (2,)}


def make_gpt2(folder, words=50257, **size):
    """A GPT-2 and a reward model with random weights, and prompts of 32 random words."""
    names = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(3, words))]
    model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **special)
    size |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": words}
    config = GPT2Config(num_labels=1, **size)
    torch.manual_seed(0)
    for name, kind in (("model", GPT2LMHeadModel), ("reward_model", GPT2ForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for split in ("train", "validation"):
        rows = torch.randint(3, words, (256, 32)).tolist()
        prompts = [{"prompt": " ".join(f"w{i}" for i in row)} for row in rows]
        lib.write_lines(folder / "data" / f"{split}.jsonl", prompts)
    return {"model": folder / "model", "reward_model": folder / "reward_model", "prompts": folder / "data"}


def measure(command, threads, **flags):
    """(seconds of a step, the median of all but the first; GB, the most that the process held)."""
    with tempfile.TemporaryDirectory() as folder:
        flags |= {
            "eval_every": 10**6,
            "save_every": 10**6,
            "eval_prompts": 2,
            "output_dir": Path(folder, "run"),
        }
        words = [str(word) for x, y in flags.items() for word in (f"--{x}", y)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen([*command, *words], cwd=lib.ROOT, env=environment, **pipes)
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"error: {command[1]} failed; it said: {said[-600:]}")
        rows = lib.read_lines(Path(folder, "run/metrics.jsonl"))
    steps = [sum(y for x, y in row.items() if x.startswith("seconds")) for row in rows]
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return statistics.median([x for x in steps if x > 0][1:]), memory


def measure_all(args, paths):
    """A line for every model, number of threads and program."""
    commands = {script: [sys.executable, script] for script in PEERS}
    if args.trl_python:
        commands[PEERS["p3o.py"]] = [args.trl_python, *lib.METHODS["RLOO of TRL"].script.split()]
    lines = []
    for model, threads in [(model, threads) for model in args.models for threads in THREADS[model]]:
        B, length, steps = SIZES[model]
        flags = {x: paths[model][x] for x in ("model", "reward_model")} | {"device": "cpu"}
        flags |= {"dataset": paths[model]["prompts"], "steps": steps, "response_length": length, "epochs": 2}
        flags |= {"prompts_per_step": B, "minibatch_size": B // 2, "micro_batch_size": B // 2}
        found = {program: [] for program in commands}
        for _, (program, command) in [(i, x) for i in range(args.repeats) for x in commands.items()]:
            found[program].append(measure(command, threads, **flags))
        for program, runs in found.items():
            line = {"model": model, "threads": threads, "program": program, "repeats": args.repeats}
            line |= {"completions_per_second": spread([2 * B / seconds for seconds, _ in runs])}
            line["memory_gb"] = round(statistics.median(memory for _, memory in runs), 2)
            peer = found.get(PEERS.get(program), [])
            line["speed_over_trl"] = spread([y / x for (x, _), (y, _) in zip(runs, peer)]) if peer else None
            lines.append(line | lib.origin())
    return lines


def spread(values):
    return [float(f"{x:.3g}") for x in (statistics.median(values), min(values), max(values))]
