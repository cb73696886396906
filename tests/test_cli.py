"""Bad input ends in one line, `error: <what is wrong>; <what to do>`, exit status 2, and nothing is written.

One table of cases. They run inside this process, through the guard(main, Args) that the command line enters, each
with one of its scripts in rotation, as the checks are the same bytes in every script; ALL_CASES=1 runs all.
Formats of data are data.py's business, and test_data.py's. To add a case: a line in CASES.
"""

import dataclasses
import functools
import importlib
import json
import os
import shutil
import signal
import sys

import datasets
import pytest
import torch
from conftest import byte_tokenizer, run_script
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

SCRIPTS = ("sft", "reward_model", "p3o", "ppo", "dpo")
RL = ("p3o", "ppo", "dpo")  # those that sample, with a policy and a reward model
PROMPTS = ("p3o", "ppo")  # those that read prompts alone
PAIRS = ("reward_model", "dpo")  # those that need preference pairs
SMALL = {  # arguments of a run that takes a moment; each script takes those that it has
    "model": "lm",
    "reward_model": "rm",
    "dataset": "data",
    "steps": 1,
    "prompts_per_step": 2,
    "minibatch_size": 2,
    "prompt_length": 16,
    "response_length": 6,
    "eval_prompts": 2,
    "eval_rows": 2,
}


# ---------------------------------------------------------------------------------------------- a small world
COLUMNS = ("prompt", "completion", "chosen", "rejected")


def write_data(folder, splits=("train", "validation"), columns=COLUMNS, **changes):
    """Eight rows a split, of text unless `changes` spoils a column."""
    folder.mkdir()
    rows = [{x: f"{x[0]}{i}" for x in columns} | changes for i in range(8)]
    for split in splits:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def make_data(folder):
    write_data(folder / "data")
    write_data(folder / "only_prompts", columns=["prompt"])
    write_data(folder / "only_texts", columns=["text"])
    write_data(folder / "dialogues", columns=["chosen", "rejected"])  # as in HH-RLHF
    write_data(folder / "no_train", splits=["validation"])
    write_data(folder / "no_held_out", splits=["train"])
    write_data(folder / "long_prompts", prompt="x" * 17)
    write_data(folder / "long_responses", completion="x" * 6, chosen="x" * 6, rejected="x" * 6)  # and EOS
    write_data(folder / "numbers", **dict.fromkeys(COLUMNS, 3))
    write_data(folder / "nulls", **dict.fromkeys(COLUMNS))
    write_data(folder / "objects", **dict.fromkeys(COLUMNS, {"text": "a"}))
    write_data(folder / "chat", prompt=[{"role": "user", "content": "p"}])
    write_data(folder / "empty", splits=[])
    for split in ("train", "validation"):
        (folder / "empty" / f"{split}.jsonl").write_text("")
    (folder / "no_data").mkdir()
    (folder / "no_data" / "README.md").write_text("nothing here")
    (folder / "hollow").mkdir()


def make_models(folder):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(pad_token="<pad>", eos_token="</s>")
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": tokenizer.pad_token_id}
    size |= {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    bert = {"vocab_size": len(tokenizer), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"intermediate_size": 8, "initializer_range": 1.0}  # as in trained ones, tokens see each other
    for name, model in {
        "lm": GPT2LMHeadModel(GPT2Config(**size)),
        "rm": GPT2ForSequenceClassification(GPT2Config(**size, num_labels=1)),
        "two_labels": GPT2ForSequenceClassification(GPT2Config(**size, num_labels=2)),
        "short": GPT2LMHeadModel(GPT2Config(**size | {"n_positions": 20})),
        "few_embeddings": GPT2LMHeadModel(GPT2Config(**size | {"vocab_size": 200})),
        "bert": BertLMHeadModel(BertConfig(**bert)),
        "bert_rm": BertForSequenceClassification(BertConfig(**bert, num_labels=1)),
        "other_tokens": GPT2ForSequenceClassification(GPT2Config(**size, num_labels=1)),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    byte_tokenizer(reverse=True, pad_token="<pad>", eos_token="</s>").save_pretrained(folder / "other_tokens")
    copies = "no_weights no_tokenizer no_config bad_config cut garbage few other_size nan no_eos only_config"
    for name in copies.split():
        shutil.copytree(folder / "lm", folder / name)
    byte_tokenizer(pad_token="<pad>", unk_token="<unk>").save_pretrained(folder / "no_eos")
    (folder / "no_weights" / "model.safetensors").unlink()
    for path in (folder / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    (folder / "no_config" / "config.json").unlink()
    shutil.copytree(folder / "no_config", folder / "adapter")
    (folder / "adapter" / "model.safetensors").rename(folder / "adapter" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "lm", "r": 2, "task_type": "CAUSAL_LM"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "bad_config" / "config.json").write_text('{"model_type": "gpt2", ')
    whole = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "garbage" / "model.safetensors").write_bytes(b"\x80\x04garbage" * 99)
    weights = load_file(folder / "lm" / "model.safetensors")
    some = {name: value for name, value in weights.items() if "mlp" not in name}
    save_file(some, folder / "few" / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "few_embeddings" / "model.safetensors", folder / "other_size" / "model.safetensors")
    bad = {name: value * float("nan") for name, value in weights.items()}
    save_file(bad, folder / "nan" / "model.safetensors", {"format": "pt"})
    (folder / "only_config" / "model.safetensors").unlink()  # to be initialised by sft.py, but too short:
    record = json.loads((folder / "only_config" / "config.json").read_text())
    (folder / "only_config" / "config.json").write_text(json.dumps(record | {"n_positions": 20}))


def arguments(script, **changes):
    """The command line of a small run of a script, with those changes that it has flags for."""
    known = {f.name for f in dataclasses.fields(importlib.import_module(script).Args)}
    given = SMALL | {"output_dir": f"out/{script}"} | changes
    given = {name: value for name, value in given.items() if name in known}
    return sum([[f"--{name}", str(value)] for name, value in given.items()], [])


def run_inside(script, argv):
    """guard(main, Args) in this process; returns the exit status."""
    module, before = importlib.import_module(script), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [f"{script}.py", *argv]
    try:
        module.guard(module.main, module.Args)
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The working directory, with data, models and a finished run of every script in done/."""
    folder = tmp_path_factory.mktemp("world")
    make_data(folder)
    make_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets, "load_dataset", functools.cache(datasets.load_dataset))  # read it once
        for script in SCRIPTS:
            status = run_inside(script, arguments(script, output_dir=f"done/{script}"))
            assert status == 0, f"{script}: the small run must work, or the cases below prove nothing"
        make_runs(folder)
        yield folder


def make_runs(folder):
    for script in SCRIPTS:
        for name in ("bad_checkpoint", "foreign"):
            shutil.copytree(folder / "done" / script, folder / name / script)
        (folder / "bad_checkpoint" / script / "checkpoint.pt").write_bytes(b"PK\x03\x04nonsense")
        (folder / "foreign" / script / "args.json").unlink()
    (folder / "a_file").write_text("in the way")
    (folder / "link").symlink_to("done/sft")


def snapshot(folder):
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


# -------------------------------------------------------------------------------------------------- the cases
def case(name, expected, scripts=SCRIPTS, extra="", **changes):
    """expected: what the line must contain. changes: flags that differ from the small run; extra: more words."""
    return name, expected, scripts, extra.split(" ") if extra else [], changes


CONVERT = "python data.py --dataset {} --model lm --output_dir data/NAME"  # the way out of every wrong format
DONE = {"output_dir": "done/{script}"}
OVER = {"extra": "--overwrite"}
REWARD = {"output_dir": "done/ppo", "reward_model": "done/ppo"}
CASES = [
    # data
    case("no such folder", [CONVERT.format("data/nothere")], dataset="data/nothere"),
    case("not on the hub", [CONVERT.format("owner/nothere")], dataset="owner/nothere"),
    case("a file, not a folder", [CONVERT.format("data/train.jsonl")], dataset="data/train.jsonl"),
    case("control characters in a name", ["data.py --dataset data/?[2J??"], dataset="data/\x1b[2J\n?"),
    case("a folder without data", [CONVERT.format("no_data")], dataset="no_data"),
    case("an empty folder", [CONVERT.format("hollow")], dataset="hollow"),
    case("empty files", ["empty"], dataset="empty"),
    case("no train split", [CONVERT.format("no_train"), "train"], dataset="no_train"),
    case("nothing held out", [CONVERT.format("no_held_out"), "validation"], dataset="no_held_out"),
    case("dialogues", [CONVERT.format("dialogues"), "prompt"], dataset="dialogues"),
    case("texts, not prompts", [CONVERT.format("only_texts"), "prompt"], dataset="only_texts"),
    case("prompts, not demonstrations", ["completion"], ("sft",), dataset="only_prompts"),
    case("prompts, not pairs", ["chosen"], PAIRS, dataset="only_prompts"),
    case("numbers for text", [CONVERT.format("numbers")], dataset="numbers"),
    case("objects for text", [CONVERT.format("objects")], dataset="objects"),
    case("nulls", [CONVERT.format("nulls")], dataset="nulls"),
    case("conversations", [CONVERT.format("chat")], dataset="chat"),
    case("prompts too long", ["0 of 8", "--prompt_length 16"], dataset="long_prompts"),
    case(
        "responses too long",
        ["0 of 8", "--response_length 6"],
        ("sft", *PAIRS),
        dataset="long_responses",
    ),
    # models
    case("no such model", ["'nothere/deep/er'"], model="nothere/deep/er"),
    case("empty name of model", ["''"], model=""),
    case("model not on the hub", ["'owner/nothere'"], model="owner/nothere"),
    case("a file for a model", ["'a_file'"], model="a_file"),
    case("empty model folder", ["'hollow'"], model="hollow"),
    case("no weights", ["'no_weights'"], ("reward_model", *RL), model="no_weights"),
    case("no tokenizer", ["'no_tokenizer'", "tokenizer"], model="no_tokenizer"),
    case("no EOS", ["'no_eos'", "EOS"], model="no_eos"),
    case("an adapter", ["'adapter'"], model="adapter"),
    case("no config", ["'no_config'"], model="no_config"),
    case("broken config", ["'bad_config'"], model="bad_config"),
    case("weights cut short", ["'cut'"], model="cut"),
    case("weights not safetensors", ["'garbage'"], model="garbage"),
    case("weights missing", ["'few'", "not a whole"], model="few"),
    case("weights of another size", ["'other_size'"], model="other_size"),
    case("weights not numbers", ["'nan'", "finite"], model="nan"),
    case("fewer embeddings than tokens", ["'few_embeddings'"], model="few_embeddings"),
    case("context too short", ["'short'", "20", "22", "--prompt_length"], model="short"),
    case("context of a new model too short", ["'only_config'", "20", "22"], ("sft",), model="only_config"),
    case("lengths beyond the context", ["'lm'", "32", "33", "--prompt_length"], prompt_length=27),
    case("encoder", ["'bert'", "decoder"], model="bert"),
    case("reward model as policy", ["'rm'", "CausalLM"], ("sft", *RL), model="rm"),
    case("no such reward model", ["'nothere/deep/er'"], RL, reward_model="nothere/deep/er"),
    case("policy as reward model", ["'lm'", "SequenceClassification"], RL, reward_model="lm"),
    case("two labels", ["'two_labels'"], RL, reward_model="two_labels"),
    case("encoder as reward model", ["'bert_rm'", "decoder"], RL, reward_model="bert_rm"),
    case("reward model without weights", ["'no_weights'"], RL, reward_model="no_weights"),
    case("reward model cut short", ["'cut'"], RL, reward_model="cut"),
    case("reward model of other tokens", ["'other_tokens'", "README"], RL, reward_model="other_tokens"),
    # numbers
    case("no steps", ["--steps 0"], steps=0),
    case("steps backwards", ["--steps -3"], steps=-3),
    case("learning rate 0", ["--learning_rate 0.0"], learning_rate=0),
    case("learning rate negative", ["--learning_rate -0.1"], learning_rate=-0.1),
    case("learning rate nan", ["--learning_rate nan"], learning_rate="nan"),
    case("learning rate inf", ["--learning_rate inf"], learning_rate="inf"),
    case("temperature 0", ["--temperature 0.0"], ("sft", *RL), temperature=0),
    case("beta negative", ["--beta -0.1"], RL, beta=-0.1),
    case("beta nan", ["--beta nan"], RL, beta="nan"),
    case("reward shift nan", ["--reward_shift nan"], PROMPTS, reward_shift="nan"),
    case("clip range 0", ["--clip_range 0.0"], PROMPTS, clip_range=0),
    case("seed negative", ["--seed -1"], seed=-1),
    case("prompt length 0", ["--prompt_length 0"], prompt_length=0),
    case("response length 0", ["--response_length 0"], response_length=0),
    case("epochs 0", ["--epochs 0"], epochs=0),
    case("minibatch 0", ["size 0"], ("sft", "reward_model", *PROMPTS), minibatch_size=0),
    case("micro-batch negative", ["--micro_batch_size -1"], micro_batch_size=-1),
    case("huge", ["99999999999 is out of range"], minibatch_size=99999999999),
    case("minibatch divides not", ["--minibatch_size"], PROMPTS, minibatch_size=3, prompts_per_step=4),
    case("the same, DPO online", ["--minibatch_size"], ("dpo",), "--online", minibatch_size=3),
    case("save never", ["--save_every -1"], save_every=-1),
    case("one response", ["--num_responses", "pairs"], ("p3o",), num_responses=1),
    case("weights held below 1", ["--max_importance_weight 0.5"], ("p3o",), max_importance_weight=0.5),
    case("discount above 1", ["--gamma"], ("ppo",), gamma=1.5),
    case("two scalings", ["--scale_reward"], ("ppo",), "--normalize_reward true --scale_reward"),
    # flags
    case("unknown flag", ["--nonsense"], extra="--nonsense 1"),
    case("abbreviated flag", ["--see"], extra="--see 1"),
    case("unknown word", ["word"], extra="word"),
    case("control characters in a flag", ["--a"], extra="--a\x1b[2J\nb"),
    case("missing value", ["--seed"], extra="--seed"),
    case("words for a number", ["--steps", "'many'"], steps="many"),
    case("a fraction for a whole number", ["--steps", "'1.5'"], steps=1.5),
    case("words for yes or no", ["maybe"], extra="--resume maybe"),
    case("unknown choice", ["--dtype", "'float8'", "bfloat16"], dtype="float8"),
    case("unknown clipping", ["--clipping", "'both'", "joint"], ("p3o",), clipping="both"),
    case("unknown device", ["--device tpux"], device="tpux"),
    case("a device that is not there", ["--device cuda:99"], device="cuda:99"),
    # the output folder
    case("a run is there", ["holds a run", "--resume", "--overwrite"], **DONE),
    case("resume and overwrite", ["--resume", "--overwrite"], extra="--resume --overwrite", **DONE),
    case("resume nothing", ["holds no run", "--resume"], extra="--resume", output_dir="out/nothing"),
    case("files of somebody else", ["holds files but no run"], output_dir="foreign/{script}"),
    case("the same, overwriting", ["no run"], **OVER, output_dir="foreign/{script}"),
    case("the same, resuming", ["no run"], extra="--resume", output_dir="foreign/{script}"),
    case("a file in the way", ["a_file"], output_dir="a_file"),
    case("inside a file", ["a_file"], output_dir="a_file/run"),
    case("a folder that cannot be", ["cannot write", "--output_dir"], output_dir="/proc/nothere/run"),
    case("over the model", ["holds files but no run"], **OVER, output_dir="lm"),
    case("over all inputs", ["holds files but no run"], **OVER, output_dir="."),
    case("over the data", ["holds files but no run"], **OVER, output_dir="data"),
    case("over a run, the model", ["input --model"], **OVER, output_dir="done/sft", model="done/sft"),
    case("the same by a detour", ["input --model"], **OVER, output_dir="rm/../done/sft", model="done/sft"),
    case("the same by a link", ["input --model"], **OVER, output_dir="link", model="done/sft"),
    case("over a run, the reward model", ["input --reward_model"], RL, **OVER, **REWARD),
    case(
        "over its parent",
        ["input --reward_model"],
        RL,
        **OVER,
        **REWARD | {"reward_model": "done/ppo/critic"},
    ),
    # resume
    case("another seed", ["--seed was 0", "7"], extra="--resume", seed=7, **DONE),
    case("another length", ["--response_length was 6"], extra="--resume", response_length=5, **DONE),
    case("another model", ["--model was lm"], extra="--resume", model="./lm", **DONE),
    case("another beta", ["--beta was"], RL, "--resume", beta=0.7, **DONE),
    case("a run of another script", ["was"], ("reward_model", *RL), "--resume", output_dir="done/sft"),
    case("checkpoint broken", ["checkpoint.pt"], extra="--resume", output_dir="bad_checkpoint/{script}"),
]


def spread(cases):
    """One row per case and script: all scripts, or one in rotation."""
    for number, (name, expected, scripts, extra, changes) in enumerate(cases):
        for script in scripts if os.environ.get("ALL_CASES") else [scripts[number % len(scripts)]]:
            yield pytest.param(name, expected, script, extra, changes, id=f"{script}-{name}")


def check_line(stderr, expected):
    lines = stderr.splitlines()
    assert len(lines) == 1, f"one line, not {len(lines)}:\n{stderr[-2000:]}"
    assert lines[0].startswith("error: ") and "; " in lines[0], lines[0]
    wrong, todo = lines[0].removeprefix("error: ").split("; ", 1)
    assert len(wrong) > 8 and len(todo) > 4 and len(lines[0]) < 700
    assert lines[0].isprintable(), "control characters on the terminal"
    for part in expected:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


@pytest.mark.parametrize("name, expected, script, extra, changes", [*spread(CASES)])
def test_bad_input(name, expected, script, extra, changes, world, capfd):
    changes = {k: v.format(script=script) if isinstance(v, str) else v for k, v in changes.items()}
    before = snapshot(world)
    try:
        status = run_inside(script, arguments(script, **changes) + extra)
    finally:
        after = snapshot(world)
        for path in sorted(set(after) - set(before), reverse=True):  # for the cases behind this one
            path.rmdir() if path.is_dir() else path.unlink()
    check_line(capfd.readouterr().err, expected)
    assert status == 2
    assert after == before, "something was written"


def test_enough_cases():
    assert len({c[0] for c in CASES}) == len(CASES) >= 90


def test_a_real_process(world):
    """The same from the command line: the README's first mistake, HH-RLHF's dialogues for prompts."""
    before = snapshot(world)
    done = run_script("p3o.py", *arguments("p3o", dataset="dialogues"), cwd=world)
    assert done.returncode == 2
    check_line(done.stderr, [CONVERT.format("dialogues")])
    assert snapshot(world) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(world, tmp_path, capfd):
    tmp_path.chmod(0o500)
    status = run_inside("p3o", arguments("p3o", output_dir=str(tmp_path / "run")))
    check_line(capfd.readouterr().err, [str(tmp_path)])
    assert status == 2


@pytest.mark.parametrize("script", [*SCRIPTS, "evaluate", "data"])
def test_help_names_every_flag(script, capfd):
    module = importlib.import_module(script)
    assert run_inside(script, ["--help"]) == 0
    text = " ".join(capfd.readouterr().out.split())
    for f in dataclasses.fields(module.Args):
        assert f"--{f.name}" in text
        assert f.metadata.get("help"), f"--{f.name} has no help"
    if script in SCRIPTS:  # --resume lists what may change
        listed = text[text.index("go on; ") :][:120]
        assert all(name in listed for name in module.MAY_CHANGE if name not in ("resume", "overwrite"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_that_may_be_zero_are_flags(script, monkeypatch):
    module, seen = importlib.import_module(script), []

    def stop(args, may_be_zero):
        seen.extend(may_be_zero.split())
        raise InterruptedError

    monkeypatch.setattr(module, "check_args", stop)
    with pytest.raises(InterruptedError):
        module.main(module.Args())
    assert seen and set(seen) <= {f.name for f in dataclasses.fields(module.Args)}


def test_what_may_change_on_resume(world, capfd):
    """More steps, another --save_every or --micro_batch_size go on; fewer steps than are done are an error."""
    log, argv = world / "out" / "metrics.jsonl", functools.partial(arguments, "p3o", output_dir="out")
    assert run_inside("p3o", argv()) == 0
    assert run_inside("p3o", [*argv(steps=2, save_every=7, micro_batch_size=1), "--resume"]) == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2]
    before, _ = log.read_bytes(), capfd.readouterr()
    assert run_inside("p3o", [*argv(), "--resume"]) == 2
    check_line(capfd.readouterr().err, ["--steps"])
    assert log.read_bytes() == before


@pytest.mark.parametrize("script", ["sft", "p3o"])
def test_most_rows_too_long(script, world, tmp_path, capfd):
    """Below half it is said, below a tenth refused: ten short prompts among many long ones are no data set."""
    for kept, said in (
        (5, "data [train]: 5 of 8"),
        (3, "warning, less than half: data [train]: 3 of 8"),
        (0, "error: "),
    ):
        rows = [{x: "a" if i < kept else "x" * 17 for x in COLUMNS} for i in range(8)]
        folder = tmp_path / f"{kept}" / "data"
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = arguments(script, dataset=folder, output_dir=tmp_path / f"{kept}" / "run")
        assert run_inside(script, flags) == (2 if kept == 0 else 0)
        printed = "".join(capfd.readouterr())
        assert said.replace("data [", f"{folder} [") in printed, printed


def test_a_model_without_a_limit_on_its_length(tmp_path):
    """BLOOM's positions have no end: its config names none."""
    p3o, tokenizer = importlib.import_module("p3o"), byte_tokenizer(pad_token="<pad>", eos_token="</s>")
    model = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=8, n_head=2, n_layer=1))
    model.save_pretrained(tmp_path)
    args = p3o.Args(device="cpu", prompt_length=10**6)
    assert p3o.load_model(AutoModelForCausalLM, str(tmp_path), tokenizer, args)
