"""Bad input ends in one line, `error: <what is wrong>; <what to do>`, exit status 2, and nothing is written.

One table of cases. Most run inside this process, through the guard(main, Args) that the command line enters, each
for two of its scripts in rotation, as the checks are the same bytes in every script; ALL_CASES=1 runs all.
To add a case: a line in CASES. To add a script: a line in SCRIPTS.
"""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

SCRIPTS = {  # the data set of each script; only those that exist are tested
    "sft": "demonstrations.jsonl",
    "reward_model": "preferences.jsonl",
    "p3o": "prompts.jsonl",
    "ppo": "prompts.jsonl",
    "dpo": "preferences.jsonl",
}
SCRIPTS = {name: data for name, data in SCRIPTS.items() if (ROOT / f"{name}.py").exists()}
SMALL = {  # arguments of a run that takes a second; each script takes those that it has
    "model": "lm",
    "reward_model": "rm",
    "output_dir": "out/run",
    "steps": 1,
    "prompts_per_step": 2,
    "minibatch_size": 2,
    "prompt_length": 16,
    "response_length": 6,
    "eval_prompts": 2,
    "eval_rows": 2,
}
ALL = tuple(SCRIPTS)
RL = ("p3o", "ppo", "dpo")  # those that sample, with a policy and a reward model
PAIRS = ("reward_model", "dpo")  # those that need preference pairs


# ---------------------------------------------------------------------------------------------- a small world
def save_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder):
    good = [
        {"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}", "completion": f"c{i}"} for i in range(8)
    ]
    for name, columns in (
        ("prompts", ["prompt"]),
        ("demonstrations", ["prompt", "completion"]),
        ("preferences", ["prompt", "chosen", "rejected"]),
    ):
        save_rows(folder / f"{name}.jsonl", [{column: row[column] for column in columns} for row in good])

    def spoil(
        name, **changes
    ):  # all columns, so that every script finds its own; every row spoilt in one way
        save_rows(folder / f"{name}.jsonl", [row | changes for row in good])

    columns = ("prompt", "chosen", "rejected", "completion")
    spoil("long", prompt="x" * 17)
    spoil("same", chosen="a", rejected="a")
    spoil("same_when_cut", chosen="123456 and", rejected="123456 or")
    spoil("silent", chosen="", rejected=" ", completion="\n")
    spoil("numbers", **dict.fromkeys(columns, 3))
    spoil("nulls", **dict.fromkeys(columns))
    spoil("objects", **dict.fromkeys(columns, {"text": "a"}))
    spoil("chat", prompt=[{"role": "user", "content": "p"}])
    save_rows(folder / "columns.jsonl", [{"question": "q", "answer": "a"}] * 4)
    save_rows(folder / "no_turns.jsonl", [{"chosen": f"a{i}", "rejected": f"b{i}"} for i in range(8)])
    save_rows(folder / "one_row.jsonl", good[:1])
    save_rows(folder / "text.jsonl", [{"text": f"t{i}"} for i in range(8)])
    whole = (folder / "preferences.jsonl").read_text()
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text("\n\n\n")
    (folder / "broken.jsonl").write_text(whole[:-20])
    (folder / "scalars.jsonl").write_text("1\n2\n3\n")
    (folder / "prose.txt").write_text("It is a truth universally acknowledged")
    (folder / "not_utf8.jsonl").write_bytes(
        b"".join(
            b'{"prompt": "p\xff%d", "chosen": "a", "rejected": "b", "completion": "c"}\n' % i
            for i in range(8)
        )
    )
    (folder / "fake.parquet").write_text(whole)
    (folder / "fake.jsonl.gz").write_text(whole)
    (folder / "no_data").mkdir()
    (folder / "no_data" / "README.md").write_text("nothing here")
    (folder / "no_train").mkdir()
    shutil.copy(folder / "preferences.jsonl", folder / "no_train" / "validation.jsonl")


def make_models(folder):
    torch.manual_seed(0)
    ours = {"pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = byte_tokenizer(**ours)
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    size |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    gpt2 = GPT2Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **size)
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    for name, model in {
        "lm": GPT2LMHeadModel(gpt2),
        "rm": GPT2ForSequenceClassification(GPT2Config(**gpt2.to_diff_dict() | {"num_labels": 1})),
        "two_labels": GPT2ForSequenceClassification(GPT2Config(**gpt2.to_diff_dict() | {"num_labels": 2})),
        "short": GPT2LMHeadModel(GPT2Config(**gpt2.to_diff_dict() | {"n_positions": 20})),
        "few_embeddings": GPT2LMHeadModel(GPT2Config(**gpt2.to_diff_dict() | {"vocab_size": 200})),
        "bert": BertLMHeadModel(bert),
        "bert_rm": BertForSequenceClassification(BertConfig(**bert.to_diff_dict() | {"num_labels": 1})),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in (
        "no_weights",
        "no_tokenizer",
        "no_config",
        "bad_config",
        "cut",
        "garbage",
        "few",
        "other_size",
        "nan",
    ):
        shutil.copytree(folder / "lm", folder / name)
    weights = load_file(folder / "lm" / "model.safetensors")
    (folder / "no_weights" / "model.safetensors").unlink()
    for path in (folder / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    (folder / "no_config" / "config.json").unlink()
    (folder / "bad_config" / "config.json").write_text('{"model_type": "gpt2", ')
    whole = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "garbage" / "model.safetensors").write_bytes(b"\x80\x04garbage" * 99)
    some = {name: value for name, value in weights.items() if "mlp" not in name}
    save_file(some, folder / "few" / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "few_embeddings" / "model.safetensors", folder / "other_size" / "model.safetensors")
    bad = {name: value * float("nan") for name, value in weights.items()}
    save_file(bad, folder / "nan" / "model.safetensors", {"format": "pt"})
    byte_tokenizer(pad_token="<pad>").save_pretrained(folder / "few_embeddings")  # then without an EOS:
    shutil.copytree(folder / "lm", folder / "no_eos")
    byte_tokenizer(pad_token="<pad>", unk_token="<unk>").save_pretrained(folder / "no_eos")
    tokenizer.save_pretrained(folder / "few_embeddings")
    (folder / "hollow").mkdir()


def arguments(script, **changes):
    """The command line of a small run of a script, with those changes that it has flags for."""
    known = {f.name for f in dataclasses.fields(importlib.import_module(script).Args)}
    given = {name: value for name, value in SMALL.items() if name in known}
    given |= {"dataset": SCRIPTS[script], "output_dir": f"out/{script}"}
    given |= {name: value for name, value in changes.items() if name in known}
    return sum([[f"--{name}", str(value)] for name, value in given.items()], [])


def run_inside(script, argv):
    """guard(main, Args) in this process; returns the exit status."""
    module, before = importlib.import_module(script), (sys.argv, os.environ.copy())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [f"{script}.py", *argv]
    try:
        module.guard(module.main, module.Args)
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before[0]
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A working directory with data, models and a finished run of every script in done/."""
    folder, here = tmp_path_factory.mktemp("world"), os.getcwd()
    make_data(folder)
    make_models(folder)
    os.chdir(folder)
    try:
        for script in SCRIPTS:
            status = run_inside(script, arguments(script, output_dir=f"done/{script}"))
            assert status == 0, f"{script}: the small run must work, or the cases below prove nothing"
    finally:
        os.chdir(here)
    for script in SCRIPTS:
        for name in ("bad_args", "bad_checkpoint", "foreign"):
            copy_run(folder / "done" / script, folder / name / script, f"{name}/{script}")
        (folder / "bad_args" / script / "args.json").write_text('{"args": ')
        (folder / "bad_checkpoint" / script / "checkpoint.pt").write_bytes(b"PK\x03\x04nonsense")
        (folder / "foreign" / script / "args.json").unlink()
    (folder / "a_file").write_text("in the way")
    (folder / "link").symlink_to("done/sft")
    return folder


def copy_run(source, target, name):
    """A run copied as if it had been made with --output_dir name."""
    shutil.copytree(source, target)
    record = json.loads((target / "args.json").read_text())
    record["args"]["output_dir"] = str(name)
    (target / "args.json").write_text(json.dumps(record))


def snapshot(folder):
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


# -------------------------------------------------------------------------------------------------- the cases
def case(name, expected, scripts=ALL, extra=(), **changes):
    """expected: what the line must contain. changes: flags that differ from the small run; extra: more words."""
    return name, expected, scripts, tuple(extra), changes


CASES = [
    # data
    case("no such file", ["'nothere.jsonl'", "does not exist"], dataset="nothere.jsonl"),
    case("no such folder", ["'data/nothere'", "does not exist"], dataset="data/nothere"),
    case("not on the hub", ["'owner/nothere'"], dataset="owner/nothere"),
    case("empty name of data", ["''"], ("sft", "reward_model", "p3o", "ppo"), dataset=""),
    case("empty file", ["'empty.jsonl'"], dataset="empty.jsonl"),
    case("blank lines", ["'blank.jsonl'"], dataset="blank.jsonl"),
    case("broken JSON", ["cannot read", "'broken.jsonl'"], dataset="broken.jsonl"),
    case("JSON without columns", ["'scalars.jsonl'"], dataset="scalars.jsonl"),
    case("no data format", ["'prose.txt'"], dataset="prose.txt"),
    case("not UTF-8", ["'not_utf8.jsonl'", "cannot read"], dataset="not_utf8.jsonl"),
    case("not Parquet", ["cannot read", "'fake.parquet'"], dataset="fake.parquet"),
    case("not gzip", ["cannot read", "'fake.jsonl.gz'"], dataset="fake.jsonl.gz"),
    case("folder without data", ["'no_data'"], dataset="no_data"),
    case("empty folder", ["'hollow'"], dataset="hollow"),
    case("no train split", ["'no_train'", "['validation']", "'train'"], dataset="no_train"),
    case("one row", ["'one_row.jsonl'"], dataset="one_row.jsonl"),
    case("wrong columns", ["'question', 'answer'", "prompt+chosen+rejected"], dataset="columns.jsonl"),
    case(
        "demonstrations, not pairs",
        ["'completion'", "chosen+rejected"],
        PAIRS,
        dataset="demonstrations.jsonl",
    ),
    case("prompts, not demonstrations", ["'prompt'", "prompt+completion"], ("sft",), dataset="prompts.jsonl"),
    case("text, not prompts", ["'text'", "expected"], ("p3o", "ppo"), dataset="text.jsonl"),
    case("numbers for text", ["0 of 7 rows", "null or not text"], dataset="numbers.jsonl"),
    case("objects for text", ["0 of 7 rows", "null or not text"], dataset="objects.jsonl"),
    case("nulls", ["0 of 7 rows", "null or not text"], dataset="nulls.jsonl"),
    case("prompts too long", ["0 of 7 rows", "--prompt_length"], dataset="long.jsonl"),
    case("empty responses", ["0 of 7 rows", "empty response"], ("sft", *PAIRS), dataset="silent.jsonl"),
    case("chosen is rejected", ["0 of 7 rows", "are the same"], PAIRS, dataset="same.jsonl"),
    case("the same when cut", ["0 of 7 rows", "are the same"], PAIRS, dataset="same_when_cut.jsonl"),
    case("dialogues without turns", ["0 of 7 rows", "prompts"], dataset="no_turns.jsonl"),
    case("no chat template", ["conversations", "chat template"], dataset="chat.jsonl"),
    # models
    case("no such model", ["'nothere/deep/er'", "does not exist"], model="nothere/deep/er"),
    case("empty name of model", ["''"], model=""),
    case("model not on the hub", ["'owner/nothere'"], model="owner/nothere"),
    case("a file for a model", ["'a_file'"], model="a_file"),
    case("empty model folder", ["'hollow'"], model="hollow"),
    case("no weights", ["'no_weights'"], ("reward_model", *RL), model="no_weights"),
    case("no tokenizer", ["'no_tokenizer'", "tokenizer"], model="no_tokenizer"),
    case("no EOS", ["'no_eos'", "EOS"], model="no_eos"),
    case("no config", ["'no_config'"], model="no_config"),
    case("broken config", ["'bad_config'"], model="bad_config"),
    case("weights cut short", ["'cut'", "cannot load"], model="cut"),
    case("weights not safetensors", ["'garbage'", "cannot load"], model="garbage"),
    case("weights missing", ["'few'"], model="few"),
    case("weights of another size", ["'other_size'"], model="other_size"),
    case("weights not numbers", ["'nan'", "finite"], model="nan"),
    case("fewer embeddings than tokens", ["'few_embeddings'", "200"], model="few_embeddings"),
    case("context too short", ["'short'", "20", "22", "--prompt_length"], model="short"),
    case("lengths beyond the context", ["'lm'", "32", "--prompt_length"], prompt_length=27),
    case("encoder as policy", ["'bert'", "decoder"], ("sft", *RL), model="bert"),
    case("encoder to start from", ["'bert'"], ("reward_model",), model="bert"),
    case("reward model as policy", ["'rm'", "language model"], ("sft", *RL), model="rm"),
    case("no such reward model", ["'nothere/deep/er'"], RL, reward_model="nothere/deep/er"),
    case("policy as reward model", ["'lm'", "reward model"], RL, reward_model="lm"),
    case("two labels", ["'two_labels'", "one label"], RL, reward_model="two_labels"),
    case("encoder as reward model", ["'bert_rm'", "decoder"], RL, reward_model="bert_rm"),
    case("reward model without weights", ["'no_weights'"], RL, reward_model="no_weights"),
    case("reward model cut short", ["'cut'"], RL, reward_model="cut"),
    # numbers
    case("no steps", ["--steps 0", "from 1"], steps=0),
    case("steps backwards", ["--steps -3", "from 1"], steps=-3),
    case("learning rate 0", ["--learning_rate 0.0"], learning_rate=0),
    case("learning rate negative", ["--learning_rate -0.1"], learning_rate=-0.1),
    case("learning rate nan", ["--learning_rate nan"], learning_rate="nan"),
    case("learning rate inf", ["--learning_rate inf"], learning_rate="inf"),
    case("temperature 0", ["--temperature 0.0"], ("sft", *RL), temperature=0),
    case("beta negative", ["--beta -0.1"], RL, beta=-0.1),
    case("beta nan", ["--beta nan"], RL, beta="nan"),
    case("reward shift nan", ["--reward_shift nan"], ("p3o", "ppo"), reward_shift="nan"),
    case("clip range 0", ["--clip_range 0.0"], ("p3o", "ppo"), clip_range=0),
    case("seed negative", ["--seed -1"], seed=-1),
    case("prompt length 0", ["--prompt_length 0"], prompt_length=0),
    case("response length 0", ["--response_length 0"], response_length=0),
    case("epochs 0", ["--epochs 0"], epochs=0),
    case("huge", ["99999999999 is out of range"], minibatch_size=99999999999),
    case(
        "minibatch does not divide",
        ["--minibatch_size 3"],
        ("p3o", "ppo"),
        minibatch_size=3,
        prompts_per_step=4,
    ),
    case(
        "micro-batch does not divide",
        ["--micro_batch_size 4"],
        minibatch_size=6,
        prompts_per_step=6,
        micro_batch_size=4,
    ),
    case("micro-batch too large", ["--micro_batch_size 8"], micro_batch_size=8),
    case("save never", ["--save_every -1"], save_every=-1),
    case("one response", ["--num_responses", "pairs"], ("p3o",), num_responses=1),
    case("weights held below 1", ["--max_importance_weight 0.5"], ("p3o",), max_importance_weight=0.5),
    case("discount above 1", ["--gamma 1.5"], ("ppo",), gamma=1.5),
    # flags
    case("unknown flag", ["--nonsense"], extra=["--nonsense", "1"]),
    case("abbreviated flag", ["--see"], extra=["--see", "1"]),
    case("unknown word", ["word"], extra=["word"]),
    case("control characters", ["unknown argument"], extra=["--a\x1b[2J\nb"]),
    case("missing value", ["--seed"], extra=["--seed"]),
    case("words for a number", ["--steps", "'many'"], steps="many"),
    case("a fraction for a whole number", ["--steps", "'1.5'"], steps=1.5),
    case("words for yes or no", ["maybe"], extra=["--resume", "maybe"]),
    case("unknown choice", ["--dtype", "'float8'", "bfloat16"], dtype="float8"),
    case("unknown clipping", ["--clipping", "'both'", "joint"], ("p3o",), clipping="both"),
    case("unknown device", ["--device", "tpux"], device="tpux"),
    case("a device that cannot compute", ["--device meta"], device="meta"),
    case("a device that is not there", ["--device cuda:99"], device="cuda:99"),
    # output
    case("a run is there", ["holds a run", "--resume", "--overwrite"], output_dir="done/{script}"),
    case(
        "resume and overwrite",
        ["--resume", "--overwrite"],
        extra=["--resume", "--overwrite"],
        output_dir="done/{script}",
    ),
    case("files of somebody else", ["holds files but no run"], output_dir="foreign/{script}"),
    case("the same, overwriting", ["no run"], extra=["--overwrite"], output_dir="foreign/{script}"),
    case("a file in the way", ["a_file"], output_dir="a_file"),
    case("inside a file", ["a_file"], output_dir="a_file/run"),
    case("output over the model", ["holds an input"], extra=["--overwrite"], output_dir="lm"),
    case("output over all inputs", ["holds an input"], extra=["--overwrite"], output_dir="."),
    case(
        "output over a run that is the model",
        ["holds an input"],
        extra=["--overwrite"],
        output_dir="done/sft",
        model="done/sft",
    ),
    case(
        "output over a run that is the model, a long way round",
        ["holds an input"],
        extra=["--overwrite"],
        output_dir="rm/../done/sft",
        model="done/sft",
    ),
    case(
        "output over a run that is the model, by a link",
        ["holds an input"],
        extra=["--overwrite"],
        output_dir="link",
        model="done/sft",
    ),
    case("output over the reward model", ["holds an input"], RL, ["--overwrite"], output_dir="rm"),
    # resume
    case("another seed", ["--seed was 0", "7"], extra=["--resume"], output_dir="done/{script}", seed=7),
    case(
        "another length",
        ["--response_length was 6"],
        extra=["--resume"],
        output_dir="done/{script}",
        response_length=5,
    ),
    case("another model", ["--model was lm"], extra=["--resume"], output_dir="done/{script}", model="./lm"),
    case("another beta", ["--beta was"], RL, ["--resume"], output_dir="done/{script}", beta=0.7),
    case(
        "run of another script",
        ["was", "on --resume only"],
        ("reward_model", *RL),
        ["--resume"],
        output_dir="done/sft",
    ),
    case("args.json broken", ["args.json"], extra=["--resume"], output_dir="bad_args/{script}"),
    case("checkpoint broken", ["checkpoint.pt"], extra=["--resume"], output_dir="bad_checkpoint/{script}"),
]


def spread(cases):
    """One row per case and script."""
    for number, (name, expected, scripts, extra, changes) in enumerate(cases):
        scripts = [script for script in scripts if script in SCRIPTS]
        if scripts and not os.environ.get("ALL_CASES"):
            scripts = dict.fromkeys(scripts[(number + shift) % len(scripts)] for shift in (0, 1))
        for script in scripts:
            yield name, expected, script, extra, changes


CASES = list(spread(CASES))


def check_line(stderr, expected):
    lines = stderr.splitlines()
    assert len(lines) == 1, f"one line, not {len(lines)}:\n{stderr[-2000:]}"
    assert lines[0].startswith("error: ") and "; " in lines[0], lines[0]
    wrong, todo = lines[0].removeprefix("error: ").split("; ", 1)
    assert len(wrong) > 8 and len(todo) > 4 and len(lines[0]) < 700
    assert lines[0].isprintable(), "control characters on the terminal"
    for part in expected:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


@pytest.mark.parametrize(
    "name, expected, script, extra, changes", CASES, ids=[f"{c[2]}-{c[0]}" for c in CASES]
)
def test_bad_input(name, expected, script, extra, changes, world, monkeypatch, capfd):
    monkeypatch.chdir(world)
    changes = {k: v.format(script=script) if isinstance(v, str) else v for k, v in changes.items()}
    before, start = snapshot(world), time.perf_counter()
    status = run_inside(script, arguments(script, **changes) + list(extra))
    seconds, after = time.perf_counter() - start, snapshot(world)
    shutil.rmtree(world / "out", ignore_errors=True)
    check_line(capfd.readouterr().err, expected)
    assert status == 2
    assert after == before, "something was written"
    assert seconds < 10


def test_enough_cases():
    assert len({c[0] for c in CASES}) >= 40 and len(CASES) >= 2 * 80


def test_real_processes(world):
    """The same from the command line, run side by side."""
    commands = {
        "p3o": (arguments("p3o", model="nothere/deep/er"), ["'nothere/deep/er'"]),
        "sft": (arguments("sft", dataset="broken.jsonl"), ["'broken.jsonl'"]),
    }
    before = snapshot(world)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {
        script: subprocess.Popen(
            [sys.executable, ROOT / f"{script}.py", *argv], cwd=world, env=environment, **pipes
        )
        for script, (argv, _) in commands.items()
    }
    for script, process in running.items():
        check_line(process.communicate(timeout=120)[1], commands[script][1])
        assert process.returncode == 2
    assert snapshot(world) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("script", SCRIPTS)
def test_unwritable_folder(script, world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(world)
    tmp_path.chmod(0o500)
    status = run_inside(script, arguments(script, output_dir=str(tmp_path / "run")))
    check_line(capfd.readouterr().err, [str(tmp_path)])
    assert status == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script, capfd):
    assert run_inside(script, ["--help"]) == 0
    text = " ".join(capfd.readouterr().out.split())
    for f in dataclasses.fields(importlib.import_module(script).Args):
        assert f"--{f.name}" in text
        assert f.metadata.get("help"), f"--{f.name} has no help"
    for name in ("steps", "save_every", "device"):
        assert name in text[text.index("continue from the last checkpoint") :][:120], (
            "--resume lists what may change"
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_may_change_on_resume(script, world, monkeypatch, capfd, tmp_path):
    """More steps and another --save_every go on from the checkpoint."""
    monkeypatch.chdir(world)
    copy_run(world / "done" / script, tmp_path / "run", tmp_path / "run")
    argv = arguments(script, output_dir=str(tmp_path / "run"), steps=2, save_every=7) + ["--resume"]
    assert run_inside(script, argv) == 0, capfd.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    argv = arguments(script, output_dir=str(tmp_path / "run"), steps=1) + ["--resume"]
    assert run_inside(script, argv) == 2, "fewer steps than are done"
    check_line(capfd.readouterr().err, ["--steps"])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
