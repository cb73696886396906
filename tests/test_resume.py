"""Nothing is lost: runs that are killed, interrupted, poisoned or out of disk end as if left alone.

Every run is a process of its own, forked from conftest's server, and killed by a real SIGKILL. What is the same
bytes in every script is tried on p3o.py; killing and resuming on all of them. KILLS is the number of kills for each
(KILLS=100 python -m pytest tests/test_resume.py is a soak), KILL_SEED chooses other moments.
"""

import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import tqdm
import transformers
from conftest import byte_tokenizer, context
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

import p3o

KILLS = int(os.environ.get("KILLS", 2))
SEED = int(os.environ.get("KILL_SEED", 0))
STEPS = 5
COMMON = {"model": "../world/lm", "dataset": "../world/data", "output_dir": "run", "steps": STEPS}
COMMON |= {"save_every": 2, "eval_every": 3, "minibatch_size": 2, "micro_batch_size": 1}  # saved: 2, 4, 5
COMMON |= {"prompt_length": 12, "response_length": 6}
ROWS = COMMON | {"eval_rows": 3}
ROLLOUT = COMMON | {"reward_model": "../world/rm", "prompts_per_step": 2, "eval_prompts": 3}
RUNS = {  # name: (script, arguments)
    "sft": ("sft", ROWS),
    "reward_model": ("reward_model", ROWS),
    "p3o": ("p3o", ROLLOUT),
    "ppo": ("ppo", ROLLOUT | {"normalize_reward": True, "kl_target": 1.0, "critic_warmup_steps": 1}),
    "dpo": ("dpo", ROLLOUT),
    "dpo_online": ("dpo", ROLLOUT | {"online": True}),
}
TIMING = ("seconds_", "tokens_per_second", "peak_memory_gb")
MINE = {"notes.txt": b"mine", "mine.jsonl": b'{"mine": 1}\n', "mine.safetensors": b"mine", "mine/a.pt": b"a"}


# ------------------------------------------------------------------------------- what may happen to a process
def at_operation(number, action, where="run/"):
    """Calls action just before the number-th write, rename or removal of a file with `where` in its path.

    number None: before each.
    """
    seen = 0

    def hook(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.truncate"):
            found = any(isinstance(arg, str | os.PathLike) and where in f"{arg}/" for arg in args)
            seen += found
            if found and number in (seen, None):
                action()

    sys.addaudithook(hook)


def count_operations(path):
    """Appends a byte to a file for every operation that kill_at could choose."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    at_operation(None, lambda: os.write(descriptor, b"."))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(number):
    at_operation(number, kill)


def kill_in_checkpoint(step):
    """In the middle of the first checkpoint of that step or a later one: half of the new file is there."""
    plain = torch.save

    def save(state, path):
        plain(state, path)
        if state["step"] >= step:
            os.truncate(path, os.stat(path).st_size // 2)
            kill()

    torch.save = save


def kill_in_export(number):
    """In the middle of the number-th export of a model: half of its weights are there."""
    plain, calls = transformers.PreTrainedModel.save_pretrained, []

    def save_pretrained(self, folder):
        plain(self, folder)
        calls.append(folder)
        if len(calls) == number:
            weights = folder / "model.safetensors"
            os.truncate(weights, weights.stat().st_size // 2)
            kill()

    transformers.PreTrainedModel.save_pretrained = save_pretrained


def send_at(number, which, times=1, where="run/"):
    """The signal, just before an operation; then a line on stdout that tells what came before it."""

    def action():
        for _ in range(times):
            os.kill(os.getpid(), which)
        print("signal sent")

    at_operation(number, action, where)


def limit_files_at(step, size):
    """From this step on no file may grow beyond size bytes, which is what a full disk looks like."""
    limits = size, resource.RLIM_INFINITY
    at_operation(step + 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits), "metrics.jsonl")


def bad_gradient(call):
    """The gradient norm is nan at that call."""
    plain, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(*args, **kwargs):
        calls.append(0)
        return plain(*args, **kwargs) * (math.nan if len(calls) == call else 1)

    torch.nn.utils.clip_grad_norm_ = clip


# ------------------------------------------------------------------------------------------------------- runs
def child(script, argv, cwd, setup):
    """Runs in the child: one script from the command line, output to a file."""
    os.chdir(cwd)
    output = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    tqdm.tqdm.set_lock(threading.RLock())  # its own would be lost in a kill, and reported at the end
    sys.argv = [f"{script}.py", *argv]
    module = importlib.import_module(script)
    for function, *args in setup:
        function(*args)
    module.guard(module.main, module.Args)


class Run:
    """A run of a script, "run" in a working directory of its own, started as often as it takes."""

    def __init__(self, name, cwd, **changes):
        self.script, arguments = RUNS[name]
        self.cwd, self.folder = cwd, cwd / "run"
        self.arguments = arguments | changes
        cwd.mkdir(exist_ok=True)

    def start(self, *setup, extra=None):
        """A process. Unless told otherwise it resumes, where there is something to resume."""
        if extra is None:
            extra = ["--resume"] if (self.folder / "args.json").exists() else []
        argv = sum([[f"--{key}", str(value)] for key, value in self.arguments.items()], []) + extra
        process = context.Process(target=child, args=(self.script, argv, self.cwd, setup))
        process.start()
        return process

    def go(self, *setup, extra=None):
        """The exit status: negative for a signal, as subprocess has it."""
        process = self.start(*setup, extra=extra)
        process.join(120)
        assert process.exitcode is not None, "hangs"
        return process.exitcode

    def said(self):
        return (self.cwd / "log").read_text()

    def error(self):
        """What a failed run said: no traceback, and a last line that starts with "error: "."""
        said = self.said()
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in said and errors == said.splitlines()[-1:], said[-3000:]
        assert "; " in errors[0]
        return errors[0]

    def rows(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def steps(self):
        return [row["step"] for row in self.rows()]

    def checkpoint(self):
        return torch.load(self.folder / "checkpoint.pt", weights_only=True)

    def weights(self):
        paths = [path for path in self.folder.rglob("model.safetensors")]
        return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder for the working directories of runs, beside world/ with data and small random models."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = byte_tokenizer(pad_token="<pad>", eos_token="</s>")
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": None}
    size |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    for name, model in {
        "lm": GPT2LMHeadModel(GPT2Config(**size)),
        "rm": GPT2ForSequenceClassification(GPT2Config(num_labels=1, initializer_range=0.3, **size)),
    }.items():
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(home / "world" / name)
        tokenizer.save_pretrained(home / "world" / name)
    (home / "world" / "data").mkdir()
    columns = ["prompt", "completion", "chosen", "rejected"]
    rows = [{column: f"{column[:2]}{i}" for column in columns} for i in range(60)]
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (home / "world" / "data" / f"{split}.jsonl").write_text(text)
    return home


@pytest.fixture(scope="module")
def undisturbed(home):
    """{name: a Run that was left alone}; its operations: how many kill_at may choose from. All side by side."""
    runs = {name: Run(name, home / name) for name in RUNS}
    processes = {name: run.start((count_operations, run.cwd / "operations")) for name, run in runs.items()}
    for name, process in processes.items():
        process.join(120)
        assert process.exitcode == 0, runs[name].said()
        assert runs[name].steps() == list(range(STEPS + 1))
        runs[name].operations = (runs[name].cwd / "operations").stat().st_size
    return runs


@pytest.fixture
def new_run(home, tmp_path):
    """Makes runs in working directories of their own."""
    return lambda name, **changes: Run(name, home / f"{tmp_path.name}{time.monotonic_ns()}", **changes)


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


def timeless(row):
    return {key: row[key] for key in row if not key.startswith(TIMING)}


def assert_same_runs(run, expected, mine=()):
    """Weights, optimizer and all other state, logs and samples; no file too much, but for mine."""
    states = []
    for state in (run.checkpoint(), expected.checkpoint()):
        del state["log_size"], state["args"]["resume"], state["args"]["overwrite"]
        states.append(state | {"metrics": timeless(state["metrics"])})
    assert_same(*states)
    assert run.weights() == expected.weights()
    assert run.steps() == list(range(STEPS + 1)), "gaps or repeats"
    assert [timeless(row) for row in run.rows()] == [timeless(row) for row in expected.rows()]
    for path in expected.folder.glob("samples_*.jsonl"):
        assert (run.folder / path.name).read_bytes() == path.read_bytes()
    files = [{str(p.relative_to(r.folder)) for p in r.folder.rglob("*")} for r in (run, expected)]
    assert files[0] - {"mine"} == files[1] | set(mine)
    for name in mine:
        assert (run.folder / name).read_bytes() == MINE[name]


def add_mine(run):
    (run.folder / "mine").mkdir()
    for name, content in MINE.items():
        (run.folder / name).write_bytes(content)


# ---------------------------------------------------------------------------------------------------- kill -9
@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed(name, undisturbed, new_run):
    """Between any two file operations, in half a checkpoint, in half an export; in a soak at any time, too."""
    expected, rng, killed = undisturbed[name], random.Random(f"{name} {SEED}"), 0
    run, way = new_run(name), list(RUNS).index(name)
    while killed < KILLS:
        way += 1
        ways = [(kill_at, rng.randint(1, expected.operations * 2 // 3)), (kill_in_export, rng.randint(1, 3))]
        ways += [(kill_in_checkpoint, rng.randint(1, STEPS))]
        if killed == KILLS - 1:
            status = run.go((kill_in_checkpoint, 3))  # so that at the end a checkpoint is resumed
        elif KILLS > 9 and way % 4 == 0:
            process = run.start()
            time.sleep(rng.random())
            process.kill()
            process.join()
            status = process.exitcode
        else:
            status = run.go(ways[way % 3])
        assert status in (-signal.SIGKILL, 0), run.said()
        killed += status != 0
        if status == 0:  # it came through: another one
            assert_same_runs(run, expected)
            run = new_run(name)
    assert run.go() == 0, run.said()
    assert_same_runs(run, expected)


@pytest.mark.parametrize(
    "way", [(kill_in_checkpoint, STEPS), (kill_in_export, 3)], ids=["checkpoint", "export"]
)
def test_killed_while_the_last_step_is_saved(way, undisturbed, new_run):
    """Where the last checkpoint is in place there is nothing left to do: so it comes last."""
    run = new_run("sft")
    assert run.go(way) == -signal.SIGKILL and run.checkpoint()["step"] == 4
    assert run.go() == 0, run.said()
    assert_same_runs(run, undisturbed["sft"])


def test_killed_before_the_first_checkpoint(undisturbed, new_run):
    """--resume begins again; where not even args.json was written, there is no run yet."""
    run = new_run("sft")
    assert run.go((kill_at, 2)) == -signal.SIGKILL and not any(run.folder.iterdir())
    assert run.go(extra=["--resume"]) == 2 and "leave out --resume" in run.error()
    assert run.go((send_at, 4, signal.SIGKILL, 1, "metrics.jsonl")) == -signal.SIGKILL
    assert run.steps() == [0, 1] and not (run.folder / "checkpoint.pt").exists()
    assert run.go(extra=["--resume"]) == 0
    assert_same_runs(run, undisturbed["sft"])


def test_what_a_kill_may_leave_is_swept_up(undisturbed, new_run):
    """States made by hand: half files beside whole ones, half a log line; and files of the user's, which stay."""
    run = new_run("p3o")
    assert run.go((send_at, 7, signal.SIGKILL, 1, "metrics.jsonl")) == -signal.SIGKILL
    assert run.checkpoint()["step"] == run.steps()[-1] == 4
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 0.1}\n{"step": 6, "lo')
    for name in ("checkpoint.pt.new", "samples_5.jsonl", "model.safetensors", "config.json", "args.json"):
        (run.folder / name).write_bytes(b"{half")
    add_mine(run)
    run.arguments["steps"] = 4  # it would end here without its last evaluation
    assert run.go(extra=["--resume"]) == 2 and "raise --steps" in run.error()
    run.arguments["steps"] = STEPS
    assert run.go(extra=["--resume"]) == 0, run.said()
    assert_same_runs(run, undisturbed["p3o"], MINE)
    assert run.go(extra=["--resume"]) == 0, "nothing is left to do, and nothing done"
    assert_same_runs(run, undisturbed["p3o"], MINE)


def test_overwriting(undisturbed, new_run):
    """--overwrite replaces the run and leaves the user's files; killed on the way, and begun again: the same."""
    run = new_run("sft", seed=1)
    shutil.copytree(undisturbed["sft"].folder, run.folder)
    add_mine(run)
    assert run.go((kill_at, 4), extra=["--overwrite"]) == -signal.SIGKILL
    left = {path.name for path in run.folder.iterdir()}
    assert not left & {"checkpoint.pt", "config.json"}, "the old run would be resumed, or taken for this one"
    assert run.go(extra=["--overwrite"]) == 0, run.said()
    assert run.weights() != undisturbed["sft"].weights(), "another seed, other weights"
    run.arguments["seed"] = 0
    assert run.go(extra=["--overwrite"]) == 0, run.said()
    assert_same_runs(run, undisturbed["sft"], MINE)


# ----------------------------------------------------------------------------------------- SIGINT and SIGTERM
@pytest.mark.parametrize(
    "which, name, where",
    [(signal.SIGINT, "p3o", "run/"), (signal.SIGTERM, "sft", "run/"), (signal.SIGINT, "p3o", "samples_0")],
)
def test_signals_save_and_exit(which, name, where, undisturbed, new_run):
    """Ctrl-C and a scheduler's notice: said at once, saved after the step, exit status 128 + signal.

    Also where the step is that before the first: the evaluation of the SFT model."""
    operation = random.Random(f"{name} {SEED}").randint(4, 20) if where == "run/" else 1
    run = new_run(name)
    assert run.go((send_at, operation, which, 1, where)) == 128 + which, run.said()
    step, lines = run.checkpoint()["step"], run.said().splitlines()
    at_once = lines.index("stopping after this step, which will be saved")
    assert lines[at_once + 1] == "signal sent" and "Traceback" not in run.said()
    assert lines[-1] == f"stopped after step {step} of {STEPS} and saved; go on with --resume"
    assert run.steps() == list(range(step + 1)), "the checkpoint is of the last step in the log"
    assert run.go() == 0, run.said()
    assert_same_runs(run, undisturbed[name])


def test_the_same_signal_again_ends_at_once(new_run):
    run = new_run("sft")
    assert run.go((send_at, 4, signal.SIGTERM, 2, "metrics.jsonl")) == -signal.SIGTERM
    assert run.steps() == [0, 1] and not (run.folder / "checkpoint.pt").exists()


def test_a_signal_between_saving_and_exiting_is_not_lost(monkeypatch, tmp_path):
    """It comes just after end_step found no reason to save: it must not exit as if it had saved."""

    class Late(list):
        """A signal that comes after whatever look at it."""

        def __iter__(self):
            yield from list.copy(self)
            self.append(signal.SIGTERM)

        def __bool__(self):
            self.append(signal.SIGTERM)
            return len(self) > 1

    monkeypatch.setattr(p3o, "stop_signals", Late())
    args = SimpleNamespace(output_dir=str(tmp_path), steps=9, save_every=0)
    p3o.end_step(args, 3, {}, {}, None)
    assert len(p3o.stop_signals) > 0 and not (tmp_path / "checkpoint.pt").exists()
    with pytest.raises(SystemExit, match="143"):
        p3o.end_step(args, 4, {}, {}, None)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


# ------------------------------------------------------------------------------------------------ bad numbers
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_not_finite_stops(name, undisturbed, new_run):
    """Status 1, one line with the step and the last good checkpoint, which is whole; bad steps not logged."""
    run, calls = new_run(name, seed=1), {"p3o": 2, "ppo": 4, "dpo_online": 2}.get(name, 1)  # in a step
    assert run.go((bad_gradient, 3 * calls + 1)) == 1, run.said()
    assert "step 4 is not finite" in run.error() and "nan" in run.error()
    assert "last checkpoint, if any, in run is good" in run.error()
    assert run.checkpoint()["step"] == 2 and run.steps() == [0, 1, 2, 3]
    auto = AutoModelForSequenceClassification if name == "reward_model" else AutoModelForCausalLM
    assert_same(auto.from_pretrained(run.folder).state_dict(), run.checkpoint()["parts"][""])
    assert timeless(run.rows()[1]) != timeless(undisturbed[name].rows()[1]), "another seed, the same run"


@pytest.mark.parametrize("name", ["sft", "p3o"])
def test_a_huge_learning_rate(name, new_run):
    """The user's own way there, without tricks: the run stops by itself, or goes on; never a traceback."""
    run = new_run(name, learning_rate=1e9)
    assert run.go() in (0, 1) and "Traceback" not in run.said(), run.said()[-3000:]


# -------------------------------------------------------------------------------------------------- full disk
@pytest.mark.parametrize(
    "size",
    [60_000, 20_000, 700],  # no room for the checkpoint; nor for the weights; nor for another line of the log
    ids=["checkpoint", "weights", "log"],
)
def test_full_disk_leaves_the_last_checkpoint(size, undisturbed, new_run):
    """One line, status 1, the last checkpoint untouched; with room again the same end."""
    run = new_run("sft")
    assert run.go((limit_files_at, 3, size)) == 1, run.said()
    assert "cannot save step 4" in run.error() and "--resume" in run.error()
    before = (run.folder / "checkpoint.pt").read_bytes()
    if size == 60_000:
        assert run.go((limit_files_at, 1, size)) == 1, "there is no room yet"
        assert "cannot save step 4" in run.error()
    assert (run.folder / "checkpoint.pt").read_bytes() == before and run.checkpoint()["step"] == 2
    assert run.go() == 0, run.said()
    assert_same_runs(run, undisturbed["sft"])


# ------------------------------------------------------------------------------------ equivalence of rewards
@pytest.mark.parametrize(
    "name, changes, moves",
    [
        ("p3o", {"clipping": "joint"}, False),
        ("p3o", {"clipping": "separate"}, False),
        ("p3o", {"clipping": "none"}, False),
        ("ppo", {}, True),
    ],
    ids=["joint", "separate", "none", "ppo"],
)
def test_equivalent_rewards_give_the_same_bytes(name, changes, moves, new_run):
    """--reward_shift adds an offset per prompt to every score; P3O must not move by a bit, PPO does."""
    runs = [new_run(name, reward_shift=shift, steps=2, **changes) for shift in (0, 1000)]
    for run, process in [(run, run.start()) for run in runs]:
        process.join(120)
        assert process.exitcode == 0, run.said()
    assert (runs[0].weights() != runs[1].weights()) == moves
