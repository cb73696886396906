"""The distributed example: one process is p3o.py, and two processes average to the gradient of one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import p3o

SMALL = ["--steps", 2, "--prompts_per_step", 8, "--minibatch_size", 4, "--device", "cpu"]


def torchrun(processes, *args, cwd):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        processes,
        *args,
    ]
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300)


def test_one_process_gives_the_weights_of_p3o(chain, tmp_path):
    example = ROOT / "examples/p3o_distributed.py"
    done = torchrun(1, example, *SMALL, "--output_dir", tmp_path / "one", cwd=chain)
    assert done.returncode == 0, done.stderr
    done = run_script("p3o.py", *SMALL, "--eval_prompts", 4, "--output_dir", tmp_path / "p3o", cwd=chain)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "p3o"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert not torch.equal(
        *(
            load_file(x / "model.safetensors")["transformer.wte.weight"]
            for x in (tmp_path / "one", chain / "out/sft")
        )
    )


def update(wrap, mine):
    """The policy's weights after one gradient step on the prompts `mine` of a fixed batch of 4 prompts."""
    args = p3o.Args(micro_batch_size=2, max_grad_norm=1e9)
    policy = AutoModelForCausalLM.from_pretrained("out/sft").eval()
    generator = torch.Generator().manual_seed(0)
    batch = {f"{x}_ids": torch.randint(3, 99, (8, 6), generator=generator) for x in ("prompt", "response")}
    batch |= {f"{x}_mask": torch.ones(8, 6, dtype=torch.bool) for x in ("prompt", "response")}
    inputs = [batch[x] for x in ("prompt_ids", "prompt_mask", "response_ids", "response_mask")]
    batch["logp_old_tok"] = p3o.response_logps(policy, *inputs).detach()
    reward = torch.randn(4, 2, generator=generator).double()
    optimizer = torch.optim.SGD(policy.parameters(), 1.0)
    p3o.update_policy(wrap(policy), optimizer, batch, reward, mine, 1, args)
    return policy.state_dict()


def worker(path):
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    weights = update(DistributedDataParallel, torch.arange(4)[rank::world])
    if rank == 0:
        torch.save(weights, path)
    torch.distributed.destroy_process_group()


def test_two_processes_average_to_the_gradient_of_one(chain, tmp_path, monkeypatch):
    done = torchrun(2, __file__, tmp_path / "two.pt", cwd=chain)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(chain)
    two, one = (
        torch.load(tmp_path / "two.pt", weights_only=True),
        update(lambda policy: policy, torch.arange(4)),
    )
    before = load_file("out/sft/model.safetensors")
    for name in before:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-5)
    assert any((one[name] - value).abs().max() > 1e-3 for name, value in before.items())


def test_two_processes_run_to_the_end(chain, tmp_path):
    example = ROOT / "examples/p3o_distributed.py"
    done = torchrun(2, example, *SMALL, "--output_dir", tmp_path / "two", cwd=chain)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2] and all(row["log_ratio_first"] == 0 for row in metrics)


@pytest.mark.parametrize("options, words", [(["--resume"], "--resume"), ([], "torchrun")])
def test_what_it_refuses(chain, tmp_path, options, words):
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    if options:
        environment["RANK"] = "0"
    run = ["examples/p3o_distributed.py", *SMALL, *options, "--output_dir", tmp_path / "no"]
    done = run_script(*run, cwd=chain, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert not (tmp_path / "no").exists()


if __name__ == "__main__":
    worker(sys.argv[1])
