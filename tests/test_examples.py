"""The distributed example: one process is p3o.py, and two processes average to the gradient of one."""

import importlib.util
import json
import os
import socket

import conftest
import pytest
import torch
from conftest import ROOT, run_script
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


def run_example(world, chain, folder):
    """The example with SMALL in processes that print into files; their exit statuses."""
    argv = [str(word) for word in (*SMALL, "--output_dir", folder)]
    return in_processes(world, conftest.child, "examples/p3o_distributed.py", argv, str(chain), str(folder))


def read_steps(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]


def test_one_process_gives_the_weights_of_p3o(chain, tmp_path):
    assert run_example(1, chain, tmp_path / "one") == [0], (tmp_path / "one.err").read_text()
    done = run_script("p3o.py", *SMALL, "--eval_prompts", 4, "--output_dir", tmp_path / "p3o", cwd=chain)
    assert done.returncode == 0, done.stderr
    folders = tmp_path / "one", tmp_path / "p3o", chain / "out/sft"
    one, other, before = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert not any(torch.equal(one[name], before[name]) for name in before)
    for row, same in zip(*map(read_steps, folders[:2]), strict=True):
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


def test_two_processes_run_to_the_end(chain, tmp_path):
    assert run_example(2, chain, tmp_path / "two") == [0, 0], (tmp_path / "two.err").read_text()
    metrics = read_steps(tmp_path / "two")
    assert [row["step"] for row in metrics] == [1, 2] and all(row["log_ratio_first"] == 0 for row in metrics)
    printed = (tmp_path / "two.out").read_text().splitlines()
    assert [line.split(":")[0] for line in printed if line.startswith("step")] == ["step 1", "step 2"]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert policy.generation_config.eos_token_id == policy.config.eos_token_id


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
