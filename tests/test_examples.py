"""The distributed example: one process is p3o.py, and two processes average to the gradient of one."""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import conftest
import pytest
import torch
from conftest import QUICK, ROOT
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import p3o

EXAMPLE = ROOT / "examples/p3o_distributed.py"
SMALL = ["--steps", 2, "--prompts_per_step", 8, "--minibatch_size", 4, "--device", "cpu"]


def of_rank(rank, world, port, target, *args):
    """Runs in a child: what torchrun sets, and then target."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    target(*args)


def in_processes(world, target, *args):
    """target(*args) in a group of processes that start at once, unlike torchrun's; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        conftest.context.Process(target=of_rank, args=(rank, world, port, target, *args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def read_steps(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]


def test_one_process_gives_the_weights_of_p3o(chain, p3o_run, tmp_path):
    argv = [str(word) for word in (*QUICK, "--output_dir", tmp_path / "one")]
    status = in_processes(
        1, conftest.child, "examples/p3o_distributed.py", argv, str(chain), str(tmp_path / "log")
    )
    assert status == [0], (tmp_path / "log.err").read_text()
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", p3o_run[0]))
    assert all(torch.equal(one[name], other[name]) for name in other)
    before = load_file(chain / "out/sft/model.safetensors")
    assert not all(torch.equal(one[name], before[name]) for name in before)
    for row, same in zip(*map(read_steps, (tmp_path / "one", p3o_run[0])), strict=True):
        measured = {name for name in row if name.startswith(("seconds", "tokens_per", "peak"))}
        assert set(row) == {name for name in same if not name.startswith("eval_")}
        assert all(row[name] == same[name] for name in set(row) - measured)


def update(wrap, mine):
    """The policy's weights after one gradient step on the prompts `mine` of a fixed batch of 4 prompts."""
    args = p3o.Args(micro_batch_size=1, max_grad_norm=1e9, device="cpu")
    policy = AutoModelForCausalLM.from_pretrained("out/sft").eval()
    generator = torch.Generator().manual_seed(0)
    batch = {f"{x}_ids": torch.randint(3, 99, (8, 6), generator=generator) for x in ("prompt", "response")}
    batch |= {f"{x}_mask": torch.ones(8, 6, dtype=torch.bool) for x in ("prompt", "response")}
    batch["logp_old_tok"] = p3o.response_logps(policy, *(batch[name] for name in p3o.TOKENS)).detach()
    reward = torch.randn(4, 2, generator=generator).double()
    optimizer = torch.optim.SGD(policy.parameters(), 1.0)
    p3o.update_policy(wrap(policy), optimizer, batch, reward, mine, 1, args)
    return policy.state_dict()


def worker(folder, path):
    os.chdir(folder)
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    weights = update(DistributedDataParallel, torch.arange(4)[rank::world])
    if rank == 0:
        torch.save(weights, path)
    torch.distributed.destroy_process_group()


def test_two_processes_average_to_the_gradient_of_one(chain, tmp_path, monkeypatch):
    """Each with two prompts, in two micro-batches."""
    assert in_processes(2, worker, str(chain), str(tmp_path / "two.pt")) == [0, 0]
    monkeypatch.chdir(chain)
    two, one = (
        torch.load(tmp_path / "two.pt", weights_only=True),
        update(lambda policy: policy, torch.arange(4)),
    )
    before = load_file("out/sft/model.safetensors")
    for name in before:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-5)
    assert any((one[name] - value).abs().max() > 1e-3 for name, value in before.items())


def test_the_documented_command_runs_two_processes_to_the_end(chain, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, EXAMPLE]
    command = [str(word) for word in (*command, *SMALL, "--output_dir", tmp_path / "two")]
    done = subprocess.run(command, cwd=chain, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = read_steps(tmp_path / "two")
    assert [row["step"] for row in metrics] == [1, 2] and all(row["log_ratio_first"] == 0 for row in metrics)
    assert done.stdout.splitlines()[-1].startswith("step 2: reward ")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two").generation_config.top_k == 0


@pytest.mark.parametrize(
    "environment, options, words",
    [
        ({}, {}, "start this with torchrun"),
        ({"RANK": "0"}, {"resume": True}, "--resume and --reward_shift are not in this example"),
        ({"RANK": "0"}, {"reward_shift": 1.0}, "--resume and --reward_shift are not in this example"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, {}, "3 processes do not divide --minibatch_size"),
        ({"RANK": "0"}, {"num_responses": 1}, "--num_responses is 1"),
        ({"RANK": "0"}, {"minibatch_size": 5}, "--minibatch_size does not divide 64 prompts"),
    ],
)
def test_what_it_refuses(environment, options, words, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("p3o_distributed", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        example.main(p3o.Args(device="cpu", output_dir=str(tmp_path / "no"), **options))
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and words in printed and not (tmp_path / "no").exists()
