"""How fast is it, and what does growth cost? p3o.py and ppo.py phase by phase, beside TRL's RLOOTrainer.

    python results/speed.py            after the quick start; run nothing beside it
    python results/speed.py --growth   seconds and memory against batch, length, model and K

Every measurement is a run of its own from the command line, the programs in turns, --repeats times: seconds
are medians over its steps but the first, memory is the largest of the process. RLOOTrainer with K = 2 is the
pairwise gradient: the same model, prompts, reward, lengths, batch and epochs; it takes part where trl can be
imported (1.16.0). Two models: the toy's, and a GPT-2 of 124M with random weights and random words (32 tokens,
responses of 32). Writes speed.csv and speed.md.

Share of bandwidth: of the rate of copying 256 MB, measured just before with as many threads; decoding reads
every weight once per token.
"""

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEPS = 6
EPOCHS, K = 2, 2  # passes over a rollout, responses per prompt
MODELS = {"toy": {}, "gpt2-124M": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}}
BATCH = {"toy": 64, "gpt2-124M": 8}  # prompts of a step; 2 responses to each


# ------------------------------------------------------------------------------------------------ what is run
def make_world(folder, vocab_size=50257, prompt_length=32, **size):
    """Random GPT-2 and reward model over words w0, w1, ..., and prompts of exactly prompt_length of them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0"
    )
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


def run(program, threads, flags):
    """Runs a program; its metrics, medians over the steps but the first, with the memory of the process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        flags = flags | {"output_dir": out, "steps": STEPS}
        if program == "trl":
            command = [sys.executable, __file__, "--peer", json.dumps({k: str(v) for k, v in flags.items()})]
        else:
            flags |= {"eval_every": 0, "save_every": 0, "eval_prompts": 2, "device": "cpu"}
            command = [sys.executable, str(ROOT / f"{program}.py")]
            command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"error: {program} failed; it said: {said[-600:]}")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "seconds_step" in row or "seconds_update" in row][1:]
    result = {
        name: statistics.median(row[name] for row in rows) for name in rows[0] if name.startswith("seconds_")
    }
    result["seconds_step"] = result.get("seconds_step") or sum(result.values())
    result["tokens"] = statistics.median(
        row["tokens"] if "tokens" in row else row["response_length"] for row in rows
    )
    return result | {"memory_gb": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9}


def peer(flags):
    """TRL's RLOOTrainer on the same work; writes seconds_step of every rollout to metrics.jsonl."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    import p3o

    args = p3o.Args(flags["model"], flags["reward_model"], flags["dataset"], device="cpu")
    args.response_length, B = int(flags["response_length"]), int(flags["prompts_per_step"])
    args.prompt_length = int(flags["prompt_length"])
    micro, minibatch = int(flags["micro_batch_size"]), int(flags["minibatch_size"])
    tokenizer = p3o.load_tokenizer(args.model)
    rows = p3o.read_prompts(args.dataset, ["train"], tokenizer, args)
    scorer = p3o.load_model(
        AutoModelForSequenceClassification, args.reward_model, tokenizer, args, num_labels=1
    )
    out, log, clock = Path(flags["output_dir"]), [], []
    lengths = []

    @torch.no_grad()
    def reward(prompts, completion_ids, **others):
        lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
        scores = []
        for first in range(0, len(prompts), micro * K):
            ids = tokenizer(prompts[first : first + micro * K], add_special_tokens=False)["input_ids"]
            tokens = p3o.pad(ids, "left", tokenizer, "cpu")
            tokens += p3o.pad(completion_ids[first : first + micro * K], "right", tokenizer, "cpu")
            scores += p3o.read_score(scorer, *tokens).tolist()
        return scores

    updates = EPOCHS * B // minibatch  # optimizer steps on a rollout

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **options):
            if state.global_step % updates == 0:
                clock.append(time.perf_counter())

        def on_train_end(self, args, state, control, **options):
            clock.append(time.perf_counter())

    config = RLOOConfig(
        output_dir=str(out),
        max_steps=STEPS * updates,
        per_device_train_batch_size=micro * K,
        gradient_accumulation_steps=minibatch // micro,
        steps_per_generation=B // micro,
        num_iterations=EPOCHS,
        num_generations=K,
        max_completion_length=args.response_length,
        beta=0.5,
        disable_dropout=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
    )
    data = Dataset.from_dict({"prompt": [row["prompt"] for row in rows]})
    RLOOTrainer(
        model=flags["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Clock()],
    ).train()
    out.mkdir(exist_ok=True)
    for step, (start, end) in enumerate(zip(clock, clock[1:])):
        log.append(json.dumps({"step": step, "seconds_step": end - start, "tokens": lengths[step]}) + "\n")
    (out / "metrics.jsonl").write_text("".join(log))


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


def count(folder):
    """(all weights, those of the blocks, width times vocabulary) of a saved GPT-2."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    head = model.lm_head.weight.numel()
    whole = sum(p.numel() for p in model.parameters())
    positions = model.transformer.wpe.weight.numel()
    return whole, whole - head - positions, head


# --------------------------------------------------------------------------------------------------- reports
def spread(values):
    """median [least, most]"""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def compare(args, folder):
    """Rows of the comparison: one for each model, number of threads and program."""
    programs = ["p3o", "ppo"]
    try:
        import trl

        programs.append("trl")
        print(f"trl {trl.__version__}")
    except ImportError:
        print("trl is not installed: no peer")
    worlds = {"toy": {"model": "out/sft", "reward_model": "out/reward_model", "dataset": "data/toy/prompts"}}
    rows = []
    for name in args.models:
        if name not in worlds:
            (folder / name).mkdir()
            worlds[name] = make_world(folder / name, **MODELS[name])
        B, length = BATCH[name], 24 if name == "toy" else 32
        flags = worlds[name] | {"prompts_per_step": B, "minibatch_size": B // 2, "micro_batch_size": B // 2}
        flags |= {"prompt_length": 32, "response_length": length}
        weights, _, _ = count(ROOT / worlds[name]["model"])
        for threads in args.threads:
            _, bandwidth = yardsticks(threads)
            found = {program: [] for program in programs}
            for _ in range(args.repeats):
                for program in programs:
                    found[program].append(run(program, threads, flags))
            for program, results in found.items():
                row = {"model": name, "threads": threads, "program": program}
                seconds = [result["seconds_step"] for result in results]
                row["completions/s"] = spread([B * K / s for s in seconds])
                row["memory, GB"] = f"{statistics.median(r['memory_gb'] for r in results):.2f}"
                tokens = statistics.median(result["tokens"] for result in results)
                for phase in ("rollout", "score", "update"):
                    spans = [result[f"seconds_{phase}"] for result in results if f"seconds_{phase}" in result]
                    row[f"{phase}, tokens/s"] = (
                        f"{B * K * tokens / statistics.median(spans):.3g}" if spans else ""
                    )
                if program == "p3o":
                    span = {
                        x: statistics.median(r[f"seconds_{x}"] for r in results)
                        for x in ("rollout", "update")
                    }
                    row["rollout, share of bandwidth"] = (
                        f"{4 * weights * length / span['rollout'] / bandwidth:.2f}"
                    )
                if "trl" in found:
                    ratios = [
                        peer["seconds_step"] / own["seconds_step"] for peer, own in zip(found["trl"], results)
                    ]
                    row["speed over trl's"] = spread(ratios)
                rows.append(row)
                print(row, flush=True)
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
            flags |= {x: size[x] for x in ("prompts_per_step", "num_responses")}
            flags |= {"minibatch_size": size["prompts_per_step"] // 2, "micro_batch_size": 8}
            results = [run("p3o", args.threads[0], flags) for _ in range(args.repeats)]
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


def main(args):
    os.chdir(ROOT)
    import torch
    import transformers

    name = "growth" if args.growth else "speed"
    info, cpu = Path("/proc/cpuinfo"), "unknown CPU"
    if info.exists():
        cpu = next(line.split(":")[1].strip() for line in open(info) if line.startswith("model name"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    source = f"Commit {commit}; torch {torch.__version__}, transformers {transformers.__version__}; "
    source += f"{cpu}, {os.cpu_count()} cores; {args.repeats} repeats in turns, {STEPS} steps each."
    with tempfile.TemporaryDirectory() as folder:
        rows = (growth if args.growth else compare)(args, Path(folder))
    heads = list(dict.fromkeys(head for row in rows for head in row))
    with open(Path(args.folder, f"{name}.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [heads, ["---"] * len(heads), *([str(row.get(head, "")) for head in heads] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = "In brackets: the least and the most of the repeats."
    Path(args.folder, f"{name}.md").write_text(f"# {name}\n\n{source} {note}\n\n{table}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="threads of a process; default: 1 2"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="default: both")
    parser.add_argument("--repeats", type=int, default=5, help="runs of every program; default: 5")
    parser.add_argument("--growth", action="store_true", help="seconds and memory as the work grows")
    parser.add_argument("--folder", default=str(ROOT / "results"), help="of the tables")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    peer(json.loads(args.peer)) if args.peer else main(args)
