"""Nothing is lost: a run that is killed at any moment and resumed ends with the same bytes as one left alone.

What the disk holds at a file operation is what kill -9 leaves there: one test copies the folder at every operation of
a run and resumes each copy. Another kills processes at random moments: KILLS of each run (KILLS=100 is a soak), and
KILL_SEED chooses other moments.
"""

import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time

import conftest
import pytest
import torch
import transformers
from conftest import ROOT, context, save_tiny_models, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

KILLS = int(os.environ.get("KILLS", 1))
SEED = int(os.environ.get("KILL_SEED", 0))
STEPS = 3
COMMON = {"model": "lm", "dataset": "data", "steps": STEPS, "learning_rate": 1e-2, "prompt_length": 12}
COMMON |= {"response_length": 6, "minibatch_size": 2, "micro_batch_size": 1}
COMMON |= {"save_every": 2, "eval_every": 2}  # saved: 0, 2, 3
ROWS = COMMON | {"eval_rows": 3}
ROLLOUT = COMMON | {"reward_model": "rm", "prompts_per_step": 2, "eval_prompts": 3}
RUNS = {  # name: (script, arguments)
    "sft": ("sft", ROWS),
    "reward_model": ("reward_model", ROWS),
    "p3o": ("p3o", ROLLOUT),
    "ppo": ("ppo", ROLLOUT | {"normalize_reward": True, "kl_target": 1.0, "critic_warmup_steps": 1}),
    "dpo": ("dpo", ROLLOUT),
    "dpo_online": ("dpo", ROLLOUT | {"online": True}),
}
EACH = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The working directory of all runs, with data and models."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_models(folder)
    write_rows(folder / "data", rows=20, columns=("prompt", "completion", "chosen", "rejected"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def command_line(name, folder, *extra, **changes):
    flags = RUNS[name][1] | {"output_dir": folder} | changes
    return sum([[f"--{key}", str(value)] for key, value in flags.items()], [*extra])


def run(name, folder, *extra, **changes):
    """Runs a script in this process, and returns what it gave to sys.exit."""
    torch.seed()  # as a new process would have it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *command_line(name, folder, *extra, **changes)])
        try:
            runpy.run_path(str(ROOT / f"{RUNS[name][0]}.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code


@pytest.fixture(scope="module")
def undisturbed(world):
    """{name: the contents of a run that was left alone}"""
    found = {}
    for name in RUNS:
        assert run(name, f"undisturbed/{name}") is None
        found[name] = contents(world / "undisturbed" / name)
        assert [row["step"] for row in found[name]["metrics.jsonl"]] == [*range(STEPS + 1)]
    return found


def contents(folder):
    """{path in the folder: what it holds, as far as two equal runs hold the same}"""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: row[key] for key in row if key != "seconds"} for row in rows]
        elif name == "checkpoint.pt":
            state = torch.load(path, weights_only=True)
            found[name] = repr({key: state[key] for key in state.keys() - {"args", "log_size"}})
        elif name != "args.json":
            found[name] = path.read_bytes() if path.is_file() else "a folder"
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def copy_at_every_operation(name, folder, copies, extra):
    """In a child: runs a script, and before each write, rename or removal in its folder copies the folder."""
    copying = [False]

    def copy(half=None):
        """half: a file of which only one half has been written."""
        copying[0], target = True, copies / f"{len(list(copies.iterdir()))}"
        shutil.copytree(folder, target)
        if half:
            os.truncate(target / half, (target / half).stat().st_size // 2)
        copying[0] = False

    def hook(event, args):
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or event in ("os.rename", "os.remove", "os.truncate"):
            inside = any(isinstance(arg, str | os.PathLike) and f"{folder}/" in str(arg) for arg in args)
            if inside and folder.exists() and not copying[0]:
                copy()

    def save_pretrained(model, place):
        export(model, place)
        copy(os.path.relpath(place, folder) + "/model.safetensors")

    def save_checkpoint(state, path):
        write(state, path)
        copy(os.path.basename(path))

    export, write = transformers.PreTrainedModel.save_pretrained, torch.save
    transformers.PreTrainedModel.save_pretrained, torch.save = save_pretrained, save_checkpoint
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.addaudithook(hook)
    sys.exit(run(name, str(folder), *extra))


def copies_of(name, folder, copies, *extra):
    copies.mkdir()
    process = context.Process(target=copy_at_every_operation, args=(name, folder, copies, extra))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    seen = []
    for copy in sorted(copies.iterdir(), key=lambda path: int(path.name)):
        state = {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        if state not in seen:
            seen.append(state)
            yield copy


@EACH
def test_killed_at_every_file_operation_and_resumed(name, world, undisturbed, tmp_path):
    copies = [*copies_of(name, world / "copied" / name, tmp_path / "copies")]
    assert len(copies) > 15, "too few operations were seen"
    if name != "p3o" and KILLS < 10:  # the functions that write are the same text in every script
        copies = random.Random(f"{name} {SEED}").sample(copies, 8)
    for copy in copies:
        if (copy / "args.json").exists():
            (copy / ".tmpA1b2C3").write_bytes(b"half")  # a kill leaves it while safetensors writes
        assert run(name, str(copy), "--resume") is None, copy
        assert_same(contents(copy), undisturbed[name])
    assert_same(contents(world / "copied" / name), undisturbed[name])


def test_killed_while_it_overwrites_and_begun_again(world, undisturbed, tmp_path):
    """The earlier run is replaced, and a file of the user's stays."""
    folder = tmp_path / "run"
    assert run("p3o", str(folder), seed=1, steps=5) is None
    assert contents(folder)["model.safetensors"] != undisturbed["p3o"]["model.safetensors"]
    (folder / "notes.txt").write_text("mine")
    copies = [*copies_of("p3o", folder, tmp_path / "copies", "--overwrite")]
    assert len(copies) > 8
    for copy in copies[:9]:  # the rest is a run like any other
        assert run("p3o", str(copy), "--overwrite") is None
        assert_same(contents(copy), undisturbed["p3o"] | {"notes.txt": b"mine"})


@EACH
def test_killed_at_random_moments_and_resumed(name, world, undisturbed, tmp_path):
    """Each process is killed, or comes to its end, and the next one resumes its run; then another run begins."""
    rng, killed, folder = random.Random(f"{name} {SEED}"), 0, tmp_path / "0"
    script, duration = f"{RUNS[name][0]}.py", 1.0
    while killed < KILLS:
        argv, start = command_line(name, str(folder), "--resume"), time.monotonic()
        process = context.Process(target=conftest.child, args=(script, argv, str(world), tmp_path / "log"))
        process.start()
        process.join(rng.random() * duration)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log.err").read_text()
        if process.exitcode == 0:
            duration = time.monotonic() - start
            assert_same(contents(folder), undisturbed[name])
            folder = tmp_path / str(int(folder.name) + 1)
        else:
            killed += 1
    assert run(name, str(folder), "--resume") is None
    assert_same(contents(folder), undisturbed[name])


@EACH
def test_a_run_that_is_not_finite_stops(name, world, tmp_path, monkeypatch):
    """In one line, without the bad step, and with the last checkpoint as it was."""
    plain = torch.nn.utils.clip_grad_norm_

    def clip(*args, **kwargs):
        found = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
        return plain(*args, **kwargs) * (math.nan if found["step"] == 3 else 1)  # so step 4 is bad

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    line = run(name, str(tmp_path / "run"), steps=6)
    assert re.fullmatch(r"error: [^\n]* not finite; [^\n]*learning.rate[^\n]*", line), line
    log = [json.loads(text)["step"] for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert log == [0, 1, 2, 3] and checkpoint["step"] == 2
    auto = AutoModelForSequenceClassification if name == "reward_model" else AutoModelForCausalLM
    for key, value in auto.from_pretrained(tmp_path / "run").state_dict().items():
        assert value.isfinite().all() and torch.equal(value, checkpoint["model"][key])


@pytest.mark.parametrize("name", ["p3o", "ppo"])
def test_equivalent_rewards_give_the_same_bytes(name, world, tmp_path):
    """--reward_shift adds an offset per prompt to every score. P3O must not move by a bit. PPO does."""
    for shift in (0, 0.3, 1000):
        assert run(name, str(tmp_path / f"{shift}"), reward_shift=shift) is None
    weights = [(tmp_path / f"{shift}/model.safetensors").read_bytes() for shift in (0, 0.3, 1000)]
    assert [weight == weights[0] for weight in weights] == [True, name == "p3o", name == "p3o"]
