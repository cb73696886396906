"""results/speed.py: its arithmetic, by hand, and one real measurement of a tiny model."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import speed


def test_a_row_of_the_table_by_hand():
    own = [
        {"seconds_rollout": 1.0, "seconds_score": 1.0, "seconds_update": 2.0, "response_length": 10.0}
        | {"seconds_step": 4.0, "memory_gb": memory}
        for memory in (0.5, 0.7, 0.6)
    ]
    peers = [{"seconds_step": seconds, "memory_gb": 1.0} for seconds in (8.0, 6.0, 4.0)]
    weights, blocks, head, prompt = 1000, 600, 300, 5
    row = speed.describe(own, peers, 128, (weights, blocks, head, prompt), (1e6, 1e5))
    assert row["completions/s"] == "32 [32, 32]" and row["memory, GB"] == "0.60"
    assert row["rollout, tokens/s"] == "1280" and row["update, tokens/s"] == "640"
    assert row["rollout, share of step"] == "0.25" and row["update, share of step"] == "0.50"
    assert row["rollout, share of bandwidth"] == f"{1000 * 4 * 10 / 1.0 / 1e5:.2f}" == "0.40"
    # 2 epochs, 128 rows; a multiplication and an addition for each weight, thrice
    operations = sum(2 * 3 * (600 * 15 + 300 * 10) for epoch in range(2) for row in range(128))
    assert row["update, share of matrix rate"] == f"{operations / 2.0 / 1e6:.2f}"
    assert row["speed over trl's"] == "1.5 [1, 2]"


def test_a_peer_without_its_python_takes_no_part():
    args = SimpleNamespace(rloo_python=None, ppo_python="other")
    assert speed.make_command("p3o", args)[1] == "p3o.py"
    assert speed.make_command("trl's rloo", args) is None
    assert speed.make_command("trl's ppo", args) == ["other", "results/trl/ppo.py"]
    assert all((speed.ROOT / "results" / "trl" / f"{name}.py").exists() for name in ("rloo", "ppo"))


@pytest.mark.parametrize("program", ["p3o", "ppo"])
def test_a_run_is_measured(program, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "STEPS", 3)
    world = speed.make_world(tmp_path, vocab_size=50, prompt_length=7, n_embd=16, n_layer=1, n_head=2)
    weights, blocks, head, prompt = speed.count(world)
    assert prompt == 7 and head == 50 * 16 and weights == blocks + head + 1024 * 16
    flags = world | {"prompts_per_step": 4, "minibatch_size": 2, "response_length": 5, "prompt_length": 7}
    found = speed.run(speed.make_command(program, None), 1, flags)
    phases = [found[f"seconds_{phase}"] for phase in ("rollout", "score", "update")]
    assert min(phases) > 0 and found["seconds_step"] == pytest.approx(sum(phases))
    assert 1 <= found["response_length"] <= 5 and 0.1 < found["memory_gb"] < 8


def test_a_run_that_fails_says_what_it_said(tmp_path):
    with pytest.raises(SystemExit, match="p3o.py failed.*no-such-model"):
        speed.run(speed.make_command("p3o", None), 1, {"model": tmp_path / "no-such-model"})


def test_the_floor_compares_passes_over_the_same_tokens(tmp_path):
    """Sorted and trimmed micro-batches give the gradient of the batch as it stands, and every phase is timed."""
    import floor
    import torch

    import p3o

    torch.manual_seed(0)
    world = speed.make_world(tmp_path, vocab_size=50, prompt_length=7, n_embd=16, n_layer=1, n_head=2)
    args = p3o.Args(**{name: str(path) for name, path in world.items()}, device="cpu", num_responses=2)
    args.prompts_per_step, args.minibatch_size, args.micro_batch_size = 8, 4, 4
    args.prompt_length, args.response_length = 7, 6
    models, optimizer, tokenizer, prompts = floor.load(args)
    lengths = torch.tensor([6, 1, 3, 3, 2, 5])
    pads = torch.tensor([0, 3, 1, 0, 2, 0])
    tokens = [torch.randint(3, 50, (6, 7)), torch.arange(7) >= pads.unsqueeze(1)]
    tokens += [torch.randint(3, 50, (6, 6)), torch.arange(6) < lengths.unsqueeze(1)]
    gradients = []
    for size, order in ((6, None), (2, lengths)):
        models[0].zero_grad()
        floor.passes(models[0], tokens, size, order)
        gradients.append(torch.cat([p.grad.flatten() for p in models[0].parameters()]))
    assert gradients[0].norm() > 0.1 and torch.allclose(*gradients, atol=1e-5)
    assert [x.shape[1] for x in floor.trim(*(x[[1, 4]] for x in tokens))] == [5, 5, 2, 2]
    found = floor.measure(models, optimizer, tokenizer, prompts, args, repeats=2)
    assert len(found) == 11 and all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())


def test_the_speeds_in_the_readme_are_the_measured_ones():
    lines = [
        line for line in (speed.ROOT / "README.md").read_text().splitlines() if "(results/speed_" in line
    ]
    assert len(lines) >= 3
    for line in lines:
        model, threads, *said = (cell.strip() for cell in line.strip("|").split("|"))
        with open(speed.ROOT / model.split("(")[1].strip(")").replace(".md", ".csv")) as file:
            rows = {row["program"]: row for row in csv.DictReader(file) if row["threads"] == threads}
        for place, program in enumerate(("p3o", "trl's rloo", "", "ppo", "trl's ppo")):
            if program:
                measured = rows[program]["completions/s"].split()[0] if program in rows else ""
                assert said[place] == measured, line
        assert [said[2], said[5]] == [rows[x]["speed over trl's"] for x in ("p3o", "ppo")], line
