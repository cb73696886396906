"""Nothing is lost: runs that are killed, interrupted, poisoned or out of disk end as if left alone.

Every run is a process of its own, forked from a server that has imported the scripts, so that a start is cheap,
and killed by a real SIGKILL. KILLS is their number per script (KILLS=100 pytest tests/test_resume.py is a soak),
KILL_SEED chooses other moments.
"""

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from multiprocessing import forkserver

import pytest
import torch
from conftest import ROOT, byte_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

KILLS = int(os.environ.get("KILLS", 3))
SOAK = KILLS > 3
SEED = int(os.environ.get("KILL_SEED", 0))
COMMON = {"steps": 6, "save_every": 2, "eval_every": 3, "prompt_length": 12, "response_length": 6}
COMMON |= {"minibatch_size": 2, "micro_batch_size": 1}
ROLLOUT = COMMON | {"model": "lm", "reward_model": "rm", "dataset": "prompts.jsonl"}
ROLLOUT |= {"prompts_per_step": 2, "eval_prompts": 3}
RUNS = {  # name: (script, arguments)
    "sft": ("sft", COMMON | {"model": "lm", "dataset": "demonstrations.jsonl", "eval_rows": 3}),
    "reward_model": (
        "reward_model",
        COMMON | {"model": "lm", "dataset": "preferences.jsonl", "eval_rows": 3},
    ),
    "p3o": ("p3o", ROLLOUT),
    "ppo": ("ppo", ROLLOUT | {"normalize_reward": True, "kl_target": 1.0, "critic_warmup_steps": 1}),
    "dpo": (
        "dpo",
        {k: v for k, v in ROLLOUT.items() if k != "prompts_per_step"} | {"dataset": "preferences.jsonl"},
    ),
    "dpo_online": ("dpo", ROLLOUT | {"online": True}),
}
RUNS = {name: run for name, run in RUNS.items() if (ROOT / f"{run[0]}.py").exists()}
EVERY_RUN = pytest.mark.parametrize("name", RUNS)


def in_turn(argument, *values):
    """Every run with every value in a soak, else with one of them, in turn."""
    pairs = [
        (name, v)
        for i, name in enumerate(RUNS)
        for j, v in enumerate(values)
        if SOAK or (i - j) % len(values) == 0
    ]
    return pytest.mark.parametrize(f"name, {argument}", pairs)


TIMING = ("seconds_", "tokens_per_second", "peak_memory_gb")

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["test_resume", *sorted({script for script, _ in RUNS.values()})])


# -------------------------------------------------------------------------------------------------- processes
def at_operation(number, action, where="runs"):
    """Calls action just before the number-th write, rename or removal of a file with `where` in its path."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            by_folder = event in ("os.remove", "os.rmdir") and args[1] != -1  # as rmtree does: without a path
            if by_folder or any(isinstance(arg, str | os.PathLike) and where in str(arg) for arg in args):
                seen += 1
                if seen == number or (isinstance(number, range) and seen in number):
                    action()

    sys.addaudithook(hook)


def kill_at(number, which=signal.SIGKILL):
    at_operation(number, lambda: os.kill(os.getpid(), which))


def stop_at(step):
    """SIGTERM just before that step is logged: the run ends with a checkpoint of it, and status 143."""
    at_operation(step + 1, lambda: os.kill(os.getpid(), signal.SIGTERM), "metrics.jsonl")


def count_operations(path):
    """Appends a byte to a file for every operation that kill_at could have chosen."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    at_operation(range(10**6), lambda: os.write(descriptor, b"."))


def limit_files(size):
    """No file may grow beyond size bytes: what a full disk looks like, from here on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limit_later(size, operation, where="runs"):
    at_operation(operation, lambda: limit_files(size), where)


def bad_gradient(call):
    """The gradient norm is nan at that call."""
    plain, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(*args, **kwargs):
        calls.append(0)
        return plain(*args, **kwargs) * (math.nan if len(calls) == call else 1)

    torch.nn.utils.clip_grad_norm_ = clip


def bad_update(call):
    """That optimizer step leaves weights that are not numbers."""
    plain, calls = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        calls.append(0)
        plain(self, *args, **kwargs)
        if len(calls) == call:
            self.param_groups[0]["params"][0].data.mul_(math.nan)

    torch.optim.AdamW.step = step


def child(script, argv, cwd, log, setup):
    """Runs in the child: one script from the command line, output to a file."""
    os.chdir(cwd)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    sys.argv = [f"{script}.py", *argv]
    module = importlib.import_module(script)
    for function, *args in setup:
        function(*args)
    module.guard(module.main, module.Args)


class Run:
    """One run of a script in a folder, started as often as it takes."""

    def __init__(self, name, folder, world, **changes):
        script, arguments = RUNS[name]
        arguments = arguments | {"output_dir": folder} | changes
        self.script, self.folder, self.world = script, folder, world
        self.argv = sum([[f"--{key}", str(value)] for key, value in arguments.items()], [])
        self.log = folder.with_name(folder.name + ".log")

    def start(self, *setup, extra=("--resume",)):
        folder = self.folder.parent
        folder.mkdir(exist_ok=True)
        args = self.script, [*self.argv, *extra], self.world, self.log, setup
        process = context.Process(target=child, args=args)
        process.start()
        return process

    def go(self, *setup, extra=("--resume",)):
        """The exit status: negative for a signal, as subprocess has it."""
        process = self.start(*setup, extra=extra)
        process.join(120)
        assert process.exitcode is not None, "hangs"
        return process.exitcode

    def said(self):
        return self.log.read_text()

    def go_to(self, step):
        """The run up to a checkpoint of this step."""
        assert self.go((stop_at, step), extra=()) == 128 + signal.SIGTERM, self.said()
        assert self.checkpoint()["step"] == step == self.steps()[-1]

    def rows(self, name="metrics.jsonl"):
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self):
        return [row["step"] for row in self.rows()]

    def checkpoint(self):
        return torch.load(self.folder / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def server():
    """Started by hand, as it would not find the scripts to import by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def world(server, tmp_path_factory):
    """Data and small random models; large enough that a checkpoint takes a moment to write."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = byte_tokenizer(pad_token="<pad>", eos_token="</s>")
    size = {"n_embd": 96, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": None}
    size |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    for name, model in {
        "lm": GPT2LMHeadModel(GPT2Config(**size)),
        "rm": GPT2ForSequenceClassification(GPT2Config(num_labels=1, initializer_range=0.3, **size)),
    }.items():
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, columns in (
        ("prompts", ["prompt"]),
        ("demonstrations", ["prompt", "completion"]),
        ("preferences", ["prompt", "chosen", "rejected"]),
    ):
        rows = [{column: f"{column[0]}{i}" for column in columns} for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """name -> the Run that was left alone and the number of its file operations, made when asked for."""
    folder, made = tmp_path_factory.mktemp("undisturbed") / "runs", {}

    def make(name):
        if name not in made:
            run = Run(name, folder / name, world)
            operations = folder.parent / f"{name}.operations"
            assert run.go((count_operations, operations), extra=()) == 0, run.said()
            made[name] = run, operations.stat().st_size
        return made[name]

    return make


# ------------------------------------------------------------------------------------------------ comparisons
def assert_same(one, other, path=""):
    """Nested values equal to the bit."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert one == other, path


def timeless(rows):
    return [{key: row[key] for key in row if not key.startswith(TIMING)} for row in rows]


def weights_of(run):
    paths = run.folder.rglob("*.safetensors")
    return {
        str(path.relative_to(run.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }


def assert_same_runs(run, expected):
    """Weights, optimizer and all other state, logs and samples; and nothing left over."""
    states = [{k: v for k, v in r.checkpoint().items() if k != "log_sizes"} for r in (run, expected)]
    assert_same(*states)
    assert weights_of(run) == weights_of(expected)
    assert run.steps() == list(range(len(run.steps()))), "gaps or repeats"
    assert timeless(run.rows()) == timeless(expected.rows())
    for path in expected.folder.rglob("*.jsonl"):
        if path.name != "metrics.jsonl":
            assert (run.folder / path.name).read_bytes() == path.read_bytes(), path.name
    files = [sorted(path.relative_to(r.folder) for path in r.folder.rglob("*")) for r in (run, expected)]
    assert files[0] == files[1]
    beside = {path.name for path in run.folder.parent.iterdir() if path.name.startswith(run.folder.name)}
    assert beside == {run.folder.name, run.log.name}


def one_line(run):
    """What a failed run said: no traceback, and a last line that starts with "error: "."""
    said = run.said()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said and len(errors) == 1 and said.splitlines()[-1] == errors[0], said[-3000:]
    assert "; " in errors[0]
    return errors[0]


# ---------------------------------------------------------------------------------------------------- kill -9
@EVERY_RUN
def test_killed_between_file_operations(name, world, undisturbed, tmp_path):
    """Each time at another operation: before the first log line, in a checkpoint, in an export."""
    expected, operations = undisturbed(name)
    rng, killed, rounds = random.Random(f"{name} {SEED}"), 0, 0
    while killed < KILLS:
        run, rounds = Run(name, tmp_path / f"runs{rounds}" / name, world), rounds + 1
        while killed < KILLS and (status := run.go((kill_at, rng.randint(1, operations * 2 // 3)))) != 0:
            assert status == -signal.SIGKILL, run.said()
            killed += 1
        assert run.go() == 0, run.said()
        assert_same_runs(run, expected)
    print(f"{name}: {killed} kills in {rounds} runs")


@EVERY_RUN
def test_killed_at_the_last_operations(name, world, undisturbed, tmp_path):
    """The last checkpoint is written, the models half exported: nothing is left to train, but to finish."""
    expected, operations = undisturbed(name)
    back = random.Random(f"{name} {SEED}").randint(0, 6)
    run = Run(name, tmp_path / "runs" / name, world)
    assert run.go((kill_at, operations - back)) == -signal.SIGKILL
    assert run.go() == 0, run.said()
    assert_same_runs(run, expected)


@EVERY_RUN
def test_killed_while_a_checkpoint_is_written(name, world, undisturbed, tmp_path):
    """From outside, as soon as half a checkpoint is seen; and at random times."""
    expected, _ = undisturbed(name)
    run, rng = Run(name, tmp_path / "runs" / name, world), random.Random(f"{name} {SEED}")
    for kill in range(max(2, KILLS // 2)):
        process, half = run.start(), run.folder / ("checkpoint.pt.new", "new")[kill % 2]
        give_up = time.monotonic() + (30 if kill < 2 else rng.random())
        while process.is_alive() and not half.exists() and time.monotonic() < give_up:
            pass
        process.kill()
        process.join()
    assert run.go() == 0, run.said()
    assert_same_runs(run, expected)


def test_what_a_kill_may_leave_is_swept_up(world, undisturbed, tmp_path):
    """States made by hand: half files beside whole ones, half a log line, exports that are not whole."""
    expected, _ = undisturbed("p3o")
    run = Run("p3o", tmp_path / "runs" / "p3o", world)
    run.go_to(4)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 0.1}\n{"step": 6, "lo')
    with open(run.folder / "samples.jsonl", "a") as file:
        file.write('{"step": 6, "prompt": "half a')
    (run.folder / "checkpoint.pt.new").write_bytes(b"PK\x03\x04 half")
    (run.folder / "new").mkdir()
    (run.folder / "new" / "model.safetensors").write_bytes(b"half")
    (run.folder / "model.safetensors").write_bytes(b"half")
    run.folder.with_name("p3o.args.json").write_text('{"args": {"mod')
    assert run.go() == 0, run.said()
    assert_same_runs(run, expected)


@EVERY_RUN
def test_killed_while_overwriting(name, world, undisturbed, tmp_path):
    """--overwrite, killed while it deletes or soon after, and started again: the same run."""
    expected, _ = undisturbed(name)
    run = Run(name, tmp_path / "runs" / name, world)
    for operation in random.Random(f"{name} {SEED}").sample(range(2, 14), max(1, KILLS // 3)):
        shutil.rmtree(run.folder, ignore_errors=True)
        shutil.copytree(expected.folder, run.folder)
        assert run.go((kill_at, operation), extra=("--overwrite",)) == -signal.SIGKILL
        assert run.go(extra=("--overwrite",)) == 0, run.said()
        assert_same_runs(run, expected)


# ----------------------------------------------------------------------------------------- SIGINT and SIGTERM
@in_turn("which", signal.SIGINT, signal.SIGTERM)
def test_signals_save_and_exit(name, which, world, undisturbed, tmp_path):
    """Ctrl-C and a scheduler's notice: the step is finished and saved, exit status 128 + signal."""
    expected, operations = undisturbed(name)
    run = Run(name, tmp_path / "runs" / name, world)
    numbers = random.Random(f"{name} {which} {SEED}").sample(range(5, operations // 2), 2)
    stopped_at = []
    for number in sorted(numbers):
        status = run.go((kill_at, number, which))
        if status == 0:
            break
        assert status == 128 + which, run.said()
        stopped_at.append(run.checkpoint()["step"])
        assert run.steps() == list(range(stopped_at[-1] + 1)), "the checkpoint is of the last step in the log"
        assert "Traceback" not in run.said() and f"after step {stopped_at[-1]} of 6" in run.said()
    assert stopped_at and run.go() == 0, run.said()
    assert_same_runs(run, expected)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_signals_from_outside(which, world, tmp_path):
    run = Run("p3o", tmp_path / "runs" / "p3o", world, steps=500)
    process, seen = run.start(), 0
    while process.is_alive() and seen < 3:
        seen = (run.folder / "metrics.jsonl").exists() and len(run.steps())
    os.kill(process.pid, which)
    process.join(60)
    assert process.exitcode == 128 + which, run.said()
    step = run.checkpoint()["step"]
    assert run.steps() == list(range(step + 1)) and 2 <= step < 500
    assert f"after step {step} of 500" in run.said().splitlines()[-1]


def test_a_signal_between_saving_and_exiting_is_not_lost(monkeypatch, tmp_path):
    """It comes just after end_step found no reason to save: it must not exit as if it had saved."""
    import p3o

    class Late(list):
        looks = 0

        def __bool__(self):
            self.looks += 1
            return self.looks > 1

    saved, signals = [], Late([signal.SIGTERM])
    monkeypatch.setattr(p3o, "received_signals", signals)
    monkeypatch.setattr(p3o, "save_checkpoint", lambda args, step, *rest: saved.append(step))
    args = type("A", (), {"output_dir": str(tmp_path), "steps": 9, "save_every": 0})
    try:
        p3o.end_step(args, 3, {}, {}, None, {})
    except SystemExit:
        assert saved == [3], "stopped without saving"


# ------------------------------------------------------------------------------------------------ bad numbers
@in_turn("poison", bad_gradient, bad_update)
def test_a_run_that_is_not_finite_stops(name, poison, world, undisturbed, tmp_path):
    """Status 1, one line with the step and the last good checkpoint, which is whole; bad steps not logged."""
    run = Run(name, tmp_path / "runs" / name, world, save_every=1, epochs=1)
    run.go_to(2)
    before = {p: p.read_bytes() for p in run.folder.rglob("*") if p.suffix in (".pt", ".safetensors")}
    assert run.go((poison, 1)) == 1, run.said()
    line = one_line(run)
    assert "step 3" in line and "last good checkpoint" in line and "step 2" in line
    assert {path: path.read_bytes() for path in before} == before
    for row in run.rows():
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
    assert AutoModelForCausalLM.from_pretrained(run.folder).dtype == torch.float32 or name == "reward_model"


@EVERY_RUN
def test_a_huge_learning_rate(name, world, tmp_path):
    """The user's own way there, without tricks: the run stops by itself, or goes on with finite numbers."""
    run = Run(name, tmp_path / "runs" / name, world, learning_rate=1e8, steps=4)
    status = run.go()
    assert status in (0, 1) and "Traceback" not in run.said(), run.said()[-3000:]
    if status == 1:
        assert " at step " in one_line(run) or "after step" in one_line(run)
    for row in run.rows():
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row


# -------------------------------------------------------------------------------------------------- full disk
@EVERY_RUN
def test_full_disk_leaves_the_last_checkpoint(name, world, undisturbed, tmp_path):
    """The next checkpoint does not fit: one line, status 1, the last one untouched; then the same end."""
    expected, _ = undisturbed(name)
    run = Run(name, tmp_path / "runs" / name, world)
    run.go_to(2)
    before = (run.folder / "checkpoint.pt").read_bytes()
    assert run.go((limit_later, 100_000, 2, "metrics.jsonl")) == 1, run.said()
    line = one_line(run)
    assert "step 4" in line and "step 2" in line and "--resume" in line
    assert run.go((limit_files, 100_000)) == 1, "there is no room yet"
    assert "make room" in one_line(run)
    assert (run.folder / "checkpoint.pt").read_bytes() == before
    assert not (run.folder / "checkpoint.pt.new").exists(), "half a checkpoint takes the room that is missing"
    assert run.go() == 0, run.said()
    assert_same_runs(run, expected)


@EVERY_RUN
def test_full_disk_at_any_write(name, world, undisturbed, tmp_path):
    """From some operation on nothing can be written at all: one line, and with room again the same end."""
    expected, operations = undisturbed(name)
    run = Run(name, tmp_path / "runs" / name, world)
    for number in random.Random(f"{name} {SEED}").sample(range(1, operations // 2), KILLS - 1):
        if (status := run.go((limit_later, 0, number))) == 0:
            break
        assert status == 1, run.said()
    assert run.go() == 0, run.said()
    assert_same_runs(run, expected)


# ------------------------------------------------------------------------------------------------ determinism
@EVERY_RUN
def test_same_seed_same_bytes(name, world, undisturbed, tmp_path):
    expected, _ = undisturbed(name)
    again = Run(name, tmp_path / "runs" / name, world)
    assert again.go(extra=()) == 0, again.said()
    assert_same_runs(again, expected)


@in_turn("seed", 1, 2, 3)
def test_another_seed_other_bytes(name, seed, world, undisturbed, tmp_path):
    run = Run(name, tmp_path / "runs" / name, world, seed=seed)
    assert run.go(extra=()) == 0, run.said()
    assert weights_of(run) != weights_of(undisturbed(name)[0])


@pytest.mark.parametrize("clipping", ["joint", "separate", "none"])
def test_equivalent_rewards_give_the_same_bytes(clipping, world, tmp_path):
    """--reward_shift adds an offset per prompt to every score; P3O must not move by a bit."""
    weights = []
    for shift in (0, 10, 1000):
        run = Run(
            "p3o", tmp_path / "runs" / str(shift), world, reward_shift=shift, clipping=clipping, steps=4
        )
        assert run.go(extra=()) == 0, run.said()
        weights.append(weights_of(run))
    assert weights[0] == weights[1] == weights[2]
