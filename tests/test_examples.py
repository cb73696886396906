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
from transformers import AutoModelForCausalLM

import p3o

SMALL = "--steps 2 --prompts_per_step 8 --minibatch_size 4 --device cpu --eval_prompts 4".split()


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
    arguments = [(rank, world, port, target, *args) for rank in range(world)]
    processes = [conftest.context.Process(target=of_rank, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def run_example(world, chain, folder):
    """The example with SMALL in processes that print into files; their exit statuses."""
    argv = [str(word) for word in (*SMALL, "--output_dir", folder)]
    return in_processes(world, conftest.child, "examples/p3o_distributed.py", argv, str(chain), str(folder))


spec = importlib.util.spec_from_file_location("p3o_distributed", ROOT / "examples/p3o_distributed.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def test_one_process_gives_the_weights_of_p3o(chain, tmp_path):
    assert run_example(1, chain, tmp_path / "one") == [0], (tmp_path / "one.err").read_text()
    done = run_script("p3o.py", *SMALL, "--output_dir", tmp_path / "p3o", cwd=chain)
    assert done.returncode == 0, done.stderr
    folders = tmp_path / "one", tmp_path / "p3o", chain / "out/sft"
    one, other, before = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert (folders[0] / "samples_2.jsonl").read_bytes() == (folders[1] / "samples_2.jsonl").read_bytes()
    assert not any(torch.equal(one[name], before[name]) for name in before)
    logs = [[json.loads(line) for line in open(folder / "metrics.jsonl")] for folder in folders[:2]]
    assert [row | {"seconds": 0} for row in logs[0]] == [row | {"seconds": 0} for row in logs[1]]


def update(average_gradients, mine):
    """The policy's weights after one gradient step on the prompts `mine` of a fixed batch of 4 prompts."""
    args = p3o.Args(micro_batch_size=1, max_grad_norm=1e9, device="cpu")
    policy = AutoModelForCausalLM.from_pretrained("out/sft").eval()
    generator = torch.Generator().manual_seed(0)
    batch = {f"{x}_ids": torch.randint(3, 99, (8, 6), generator=generator) for x in ("prompt", "response")}
    batch |= {f"{x}_mask": torch.ones(8, 6, dtype=torch.bool) for x in ("prompt", "response")}
    batch["logp_old_tok"] = p3o.response_logps(policy, **p3o.token_rows(batch, slice(None))).detach()
    reward = torch.randn(4, 2, generator=generator).double()
    average_gradients(policy)
    optimizer = torch.optim.SGD(policy.parameters(), 1.0)
    p3o.update_policy(policy, optimizer, batch, reward, mine, args)
    return policy.state_dict()


def worker(folder, path):
    os.chdir(folder)
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    metrics = {"reward": float(rank), "log_ratio_max": 3.0 + rank, "loss": -float(rank)}
    averaged = example.average_metrics(metrics, "cpu")
    assert averaged == {"reward": 0.5, "log_ratio_max": 4.0, "loss": -0.5}, "the log-ratio is the largest"
    torch.save(update(example.average_gradients, torch.arange(4)[rank::world]), f"{path}{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_average_to_the_gradient_and_metrics_of_one(chain, tmp_path, monkeypatch):
    """Each process has two prompts, in two micro-batches."""
    assert in_processes(2, worker, str(chain), str(tmp_path / "rank")) == [0, 0]
    monkeypatch.chdir(chain)
    one, before = update(lambda policy: None, torch.arange(4)), load_file("out/sft/model.safetensors")
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    for name in before:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one[name], atol=1e-6, rtol=1e-5)
    assert any((one[name] - value).abs().max() > 1e-3 for name, value in before.items())


def test_two_processes_run_to_the_end(chain, tmp_path):
    assert run_example(2, chain, tmp_path / "two") == [0, 0], (tmp_path / "two.err").read_text()
    assert [json.loads(line)["step"] for line in open(tmp_path / "two/metrics.jsonl")] == [0, 1, 2]
    printed = (tmp_path / "two.out").read_text().splitlines()
    gains = [line for line in printed + (tmp_path / "two.err").read_text().splitlines() if "gain" in line]
    assert [line.split(":")[0][-6:] for line in gains] == ["step 0", "step 2"], "one process evaluates"
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert policy.generation_config.eos_token_id == policy.config.eos_token_id


REFUSED = [
    ({}, {}, "start this script with torchrun"),
    ({"RANK": "0"}, {"resume": True}, "--resume and --reward_shift are not in this example"),
    ({"RANK": "0"}, {"reward_shift": 1.0}, "--resume and --reward_shift are not in this example"),
    ({"RANK": "0", "WORLD_SIZE": "3"}, {}, "the 3 processes must divide --minibatch_size"),
    ({"RANK": "0"}, {"num_responses": 1}, "--num_responses must be at least 2"),
    ({"RANK": "0"}, {"minibatch_size": 5}, "--minibatch_size must divide --prompts_per_step"),
]


def test_what_it_refuses(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for environment, options, words in REFUSED:
        for name, value in ({"WORLD_SIZE": "1"} | environment).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match=f"^error: .*{words}"):
            example.main(p3o.Args(device="cpu", output_dir=str(tmp_path / "no"), **options))
    assert not (tmp_path / "no").exists()
