"""P3O in TRL (examples/p3o_with_trl.py, one and two processes) against p3o.py, on the embedded task.

    python results/trl/compare.py        after toy.py, sft.py and reward_model.py; 12 minutes on two x86 cores

writes what each run printed to results/trl/NAME.txt (a run that has its file is not repeated), and to
results/trl/table.md reward and exact KL of every policy on the same held-out prompts, four answers to each.
"""

import statistics
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import p3o  # noqa: E402

EXAMPLE, SEEDS = "examples/p3o_with_trl.py", (0, 1, 2)
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, EXAMPLE]
RUNS = {f"p3o_seed{seed}": ["p3o.py", "--device", "cpu", "--seed", seed] for seed in SEEDS}
RUNS |= {f"trl_seed{seed}": [EXAMPLE, "--use_cpu", "--seed", seed] for seed in SEEDS}
RUNS |= {"trl_two_processes": [*LAUNCH, "--use_cpu", "--per_device_train_batch_size", 32]}


def train(name, words):
    """One run as from the command line, in the folder of the project; its standard output is kept."""
    log = ROOT / f"results/trl/{name}.txt"
    if not log.exists():
        command = [sys.executable, *map(str, words), "--output_dir", f"out/trl/{name}"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        log.write_text(done.stdout)


@torch.no_grad()
def measure(name):
    """Reward and exact KL of a policy, four answers to each of the 256 held-out prompts, always one seed."""
    args = p3o.Args(model=str(ROOT / "out/sft"), reward_model=str(ROOT / "out/reward_model"), device="cpu")
    tokenizer = p3o.load_tokenizer(args.model)
    prompts = p3o.read_prompts(str(ROOT / args.dataset), ["validation"], tokenizer, args)
    folders = ROOT / f"out/trl/{name}", ROOT / args.model
    policies = [p3o.load_model(AutoModelForCausalLM, str(x), tokenizer, args) for x in folders]
    torch.manual_seed(0)
    batch = p3o.sample_batch(policies[0], prompts, 4, tokenizer, args)
    batch = p3o.score_batch(batch, (*policies, p3o.load_reward(tokenizer, args)), 256, args)
    metrics = p3o.batch_metrics(batch, 4, args.beta)
    return metrics["reward"], metrics["kl_exact"], metrics["objective"]


def main():
    lines = ["| run | reward | KL, nats/response | reward - beta KL |", "|---|---|---|---|"]
    values = {}
    for name, words in RUNS.items():
        train(name, words)
        values[name] = measure(name)
        lines.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in values[name])} |")
        print(lines[-1], flush=True)
    for method in ("p3o", "trl"):
        columns = zip(*(values[f"{method}_seed{seed}"] for seed in SEEDS))
        cells = [f"{statistics.mean(x):.3f} +- {statistics.stdev(x):.3f}" for x in columns]
        lines.append(f"| {method}, mean and standard deviation over seeds | {' | '.join(cells)} |")
    (ROOT / "results/trl/table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
