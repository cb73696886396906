"""What users get wrong ends in one line, `error: <what is wrong>; <what to do>`, and nothing is written or lost.

One table of cases. They run inside this process, as from the command line. Each case runs with one of its scripts
in rotation, because the checks are the same text in every script; ALL_CASES=1 runs all. To add one: a line in CASES.
"""

import dataclasses
import importlib
import json
import os
import runpy
import shutil
import socket
import sys

import pytest
from conftest import CHATML, ROOT, byte_tokenizer, context, run_script, save_tiny_models, write_rows
from transformers import AutoTokenizer

SCRIPTS = ("sft", "reward_model", "p3o", "ppo", "dpo")
RL = ("p3o", "ppo", "dpo")  # those that have a policy and a reward model
PROMPTS = ("p3o", "ppo")  # those that read prompts alone
PAIRS = ("reward_model", "dpo")  # those that need preference pairs
SMALL = {
    "model": "lm",
    "reward_model": "rm",
    "dataset": "data",
    "steps": 1,
    "eval_prompts": 2,
    "eval_rows": 2,
}
SMALL |= {"prompts_per_step": 2, "minibatch_size": 2, "prompt_length": 16, "response_length": 6}


# ---------------------------------------------------------------------------------------------- a small world
def write_data(
    folder, splits=("train", "validation"), columns="prompt completion chosen rejected", **changes
):
    return write_rows(folder, splits, 8, columns.split(), **changes)


def make_models(folder):
    save_tiny_models(folder)
    shutil.copytree(folder / "rm", folder / "other_tokens")
    byte_tokenizer(True, CHATML, pad_token="<pad>", eos_token="</s>").save_pretrained(folder / "other_tokens")
    for name in "unreadable", "no_weights", "no_tokenizer", "no_eos", "bad_config", "copy_of_lm":
        shutil.copytree(folder / "lm", folder / name)
    (folder / "unreadable/model.safetensors").rename(folder / "unreadable/model.gguf")
    (folder / "no_weights/checkpoint-500").mkdir()
    (folder / "no_weights/model.safetensors").rename(folder / "no_weights/checkpoint-500/model.safetensors")
    for path in (folder / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    byte_tokenizer(pad_token="<pad>", unk_token="<unk>").save_pretrained(folder / "no_eos")
    (folder / "bad_config/config.json").write_text('{"model_type": "gpt2", ')


def arguments(script, **changes):
    """The command line of a small run of a script, with those of the flags that it has."""
    known = {field.name for field in dataclasses.fields(importlib.import_module(script).Args)}
    given = SMALL | {"output_dir": f"out/{script}"} | changes
    given = {name: value for name, value in given.items() if name in known}
    return sum([[f"--{name}", str(value)] for name, value in given.items()], [])


def run_inside(script, argv):
    """Runs a script in this process, and returns what it gave to sys.exit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *argv])
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The working directory, with data, models and a finished run of every script in done/."""
    folder = tmp_path_factory.mktemp("world")
    write_data(folder / "data")
    write_data(folder / "data_im_end")
    (folder / "data_im_end/data.json").write_text('{"eos_token": "<|im_end|>"}')
    write_data(folder / "only_prompts", columns="prompt")
    write_data(folder / "dialogues", columns="chosen rejected")  # as in HH-RLHF
    write_data(folder / "no_train", splits=["validation"])
    write_data(folder / "no_held_out", splits=["train"])
    write_data(folder / "long_prompts", prompt="x" * 17)
    write_data(folder / "long_responses", completion="x" * 6, chosen="x" * 6, rejected="x" * 6)  # and EOS
    write_data(folder / "empty", splits=[])
    for split in ("train", "validation"):
        (folder / f"empty/{split}.jsonl").write_text("")
    (folder / "hollow").mkdir()
    make_models(folder)
    (folder / "a_file").write_text("in the way")
    (folder / "dangling").symlink_to("nothere")
    os.mkfifo(folder / "a_pipe")  # like /dev/null it is neither a file nor a folder
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script in SCRIPTS:
            assert run_inside(script, arguments(script, output_dir=f"done/{script}")) is None, script
            shutil.copytree(folder / "done" / script, folder / "foreign" / script)
            (folder / "foreign" / script / "args.json").unlink()
        yield folder


def snapshot(folder):
    return {
        path: (path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_ino)
        for path in folder.rglob("*")
    }


# -------------------------------------------------------------------------------------------------- the cases
def case(name, expected, scripts=SCRIPTS, extra="", **changes):
    """expected: what the line must contain. changes: flags that differ from the small run. extra: more words."""
    return name, expected, scripts, extra.split(), changes


DONE = {"output_dir": "done/{script}"}
OVER = {"extra": "--overwrite"}
CASES = [
    # data
    case("no such folder", ["nothere"], dataset="data/nothere"),
    case("not on the hub", ["owner/nothere"], dataset="owner/nothere"),
    case("deeper than a hub name", ["nothere/deep/er"], dataset="nothere/deep/er"),
    case("an empty folder", ["hollow", "data.py"], dataset="hollow"),
    case("empty files", ["empty", "data.py"], dataset="empty"),
    case("no train split", ["no_train", "train", "data.py"], dataset="no_train"),
    case("nothing held out", ["no_held_out", "validation", "data.py"], dataset="no_held_out"),
    case("dialogues", ["dialogues", "'prompt'", "data.py"], dataset="dialogues"),
    case("prompts, not demonstrations", ["'completion'", "data.py"], ("sft",), dataset="only_prompts"),
    case("fewer embeddings than the policy", ["embeddings"], PROMPTS, model="many_rows")
    case("prompts, not pairs", ["'chosen', 'rejected'", "data.py"], PAIRS, dataset="only_prompts"),
    case("prompts too long", ["--prompt_length 16"], dataset="long_prompts"),
    case("responses too long", ["--response_length"], ("sft", *PAIRS), dataset="long_responses"),
    case(
        "another end of turn",
        ["'</s>'", "'<|im_end|>'", "sft.py"],
        ("reward_model", *RL),
        dataset="data_im_end",
    ),
    # models
    case("no such model", ["out/nothere"], model="out/nothere"),
    case("deeper than a hub name, model", ["nothere/deep/er"], model="nothere/deep/er"),
    case("model not on the hub", ["owner/nothere"], model="owner/nothere"),
    case("empty model folder", ["hollow"], model="hollow"),
    case("weights in another format", ["unreadable"], ("reward_model", *RL), model="unreadable"),
    case("weights in a folder below", ["no_weights"], ("reward_model", *RL), model="no_weights"),
    case("no tokenizer", ["no_tokenizer"], model="no_tokenizer"),
    case("no EOS", ["no_eos", "EOS"], model="no_eos"),
    case("broken config", ["bad_config"], model="bad_config"),
    case("lengths beyond the context", ["lm", "32", "--prompt_length"], prompt_length=27),
    case("no such reward model", ["out/nothere"], PROMPTS, reward_model="out/nothere"),
    case("policy as reward model", ["lm", "score"], PROMPTS, reward_model="lm"),
    case("reward model without weights", ["no_weights"], PROMPTS, reward_model="no_weights"),
    case("reward model of other tokens", ["other_tokens", "README"], PROMPTS, reward_model="other_tokens"),
    # numbers
    case("no steps", ["--steps 0"], steps=0),
    case("learning rate 0", ["--learning_rate 0.0"], learning_rate=0),
    case("learning rate nan", ["--learning_rate nan"], learning_rate="nan"),
    case("temperature negative", ["--temperature -1.0"], RL, temperature=-1),
    case("beta nan", ["--beta nan"], RL, beta="nan"),
    case("seed negative", ["--seed -1"], seed=-1),
    case("response length 0", ["--response_length 0"], response_length=0),
    case("save never", ["--save_every 0"], save_every=0),
    case("minibatch divides not", ["--minibatch_size"], PROMPTS, minibatch_size=3, prompts_per_step=4),
    case("the same, DPO online", ["--minibatch_size"], ("dpo",), "--online", minibatch_size=3),
    case("one response", ["--num_responses", "pairs"], ("p3o",), num_responses=1),
    case("weights held below 1", ["--max_importance_weight"], ("p3o",), max_importance_weight=0.5),
    # the output folder
    case("a run is there", ["not empty", "--resume", "--overwrite"], **DONE),
    case("resume and overwrite", ["not empty"], extra="--resume --overwrite", **DONE),
    case("files of somebody else", ["not empty"], output_dir="foreign/{script}"),
    case("the same, overwriting", ["not empty"], **OVER, output_dir="foreign/{script}"),
    case("the same, resuming", ["not empty"], extra="--resume", output_dir="foreign/{script}"),
    case("over all inputs", ["lies inside"], **OVER, output_dir="."),
    case("a file in the way", ["a_file is no folder"], **OVER, output_dir="a_file"),
    case("a pipe in the way", ["a_pipe is no folder"], **OVER, output_dir="a_pipe"),
    case("a dangling link", ["dangling is no folder"], output_dir="dangling"),
    case("over a run, the model", ["--model"], **OVER, output_dir="done/sft", model="done/sft"),
    case("the same by a detour", ["--model"], **OVER, output_dir="rm/../done/sft", model="done/sft"),
    # resume
    case("another seed", ["--seed was 0 and is now 7"], extra="--resume", seed=7, **DONE),
    case(
        "another model",
        ["--model was lm and is now copy_of_lm"],
        extra="--resume",
        model="copy_of_lm",
        **DONE,
    ),
    case("another beta", ["--beta was"], RL, "--resume", beta=0.7, **DONE),
    case("a run of another script", ["was"], ("reward_model", *RL), "--resume", output_dir="done/sft"),
]


def spread(cases):
    """One row per case and script: all scripts, or one in rotation."""
    for number, (name, expected, scripts, extra, changes) in enumerate(cases):
        for script in scripts if os.environ.get("ALL_CASES") else [scripts[number % len(scripts)]]:
            yield pytest.param(name, expected, script, extra, changes, id=f"{script}-{name}")


def check_line(line, expected=()):
    assert isinstance(line, str), f"no line, but status {line}"
    assert line.startswith("error: ") and "\n" not in line and len(line) < 500, line
    assert "; " in line or " must " in line, f"what to do: {line}"
    for part in expected:
        assert part in line, f"{part!r} is not in {line!r}"


@pytest.mark.parametrize("name, expected, script, extra, changes", [*spread(CASES)])
def test_bad_input(name, expected, script, extra, changes, world):
    changes = {k: v.format(script=script) if isinstance(v, str) else v for k, v in changes.items()}
    before = snapshot(world)
    try:
        line = run_inside(script, arguments(script, **changes) + extra)
    finally:
        after = snapshot(world)
        for path in sorted(set(after) - set(before), reverse=True):  # so that the other cases can go on
            path.rmdir() if path.is_dir() else path.unlink()
    check_line(line, expected)
    assert after == before, "something was written"


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_flags(script, world, capsys):
    before = snapshot(world)
    for words in (["--nonsense", "1"], ["--see", "1"], ["word"], ["--steps", "many"], ["--dtype", "float8"]):
        assert run_inside(script, arguments(script, **{}) + words) == 2
        assert f"{script}.py: error: " in capsys.readouterr().err
    assert snapshot(world) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script, capsys):
    assert run_inside(script, ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(importlib.import_module(script).Args):
        assert f"--{field.name}" in text and field.metadata.get("help"), field.name


def test_a_real_process(world):
    """The same as a process, with the README's first mistake: HH-RLHF's dialogues where prompts should be."""
    before = snapshot(world)
    done = run_script("p3o.py", *arguments("p3o", dataset="dialogues"), cwd=world)
    assert done.returncode == 1 and snapshot(world) == before
    check_line(done.stderr.strip(), ["dialogues", "data.py"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_torchrun_is_refused(script, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = snapshot(world)
    check_line(run_inside(script, arguments(script)), ["one process", "examples/"])
    assert snapshot(world) == before


def test_sft_takes_the_end_of_turn_of_the_data(world, tmp_path):
    """A chat model whose EOS is not the end of a turn becomes one that stops there, and the later stages take it."""
    assert run_inside("sft", arguments("sft", dataset="data_im_end", output_dir=tmp_path / "sft")) is None
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        record = json.loads((tmp_path / "sft" / name).read_text())
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
        found = record["eos_token" if name.startswith("tokenizer") else "eos_token_id"]
        assert found in ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))


# ------------------------------------------------------------------------------------- one folder and its run
def start_held(module, argv, cwd, gate, log):
    """In a child: waits in open_run until the other one is there too, so that both have found the folder free."""
    os.chdir(cwd)
    script, sys.stderr = importlib.import_module(module), open(log, "w", buffering=1)
    plain = script.open_run

    def open_run(*args):
        socket.create_connection(("127.0.0.1", gate)).recv(1)
        return plain(*args)

    script.open_run, sys.argv = open_run, [f"{module}.py", *argv]
    parser = script.transformers.HfArgumentParser(script.Args)
    script.main(script.Args(**vars(parser.parse_args())))


@pytest.mark.parametrize("script", ["sft", "p3o"])
def test_two_runs_in_one_folder(script, world, tmp_path):
    """One succeeds, and the other one ends in one line."""
    with socket.create_server(("127.0.0.1", 0)) as gate:
        argv = arguments(script, output_dir=tmp_path / "run"), str(world), gate.getsockname()[1]
        logs = [tmp_path / "log0", tmp_path / "log1"]
        processes = [context.Process(target=start_held, args=(script, *argv, log)) for log in logs]
        for process in processes:
            process.start()
        for connection in [gate.accept()[0] for _ in processes]:
            connection.send(b"!")
    for process in processes:
        process.join(60)
    statuses = [process.exitcode for process in processes]
    assert sorted(statuses) == [0, 1]
    check_line(logs[statuses.index(1)].read_text().splitlines()[-1], ["another run", "another --output_dir"])
    assert "Traceback" not in logs[statuses.index(1)].read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_knows_the_folder_by_any_name(script, world, monkeypatch):
    """As ./out, by an absolute path, after it was moved, and with its inputs by other names; more steps go on."""
    steps = []
    for number, place in enumerate(("moving/a", "./moving/a/", str(world / "moving/a"), "moving/b"), 1):
        if place == "moving/b":
            (world / "moving/a").rename(world / "moving/b")
        detour = "./rm/../" if number % 2 else ""
        names = {"model": f"{detour}lm", "reward_model": f"{detour}rm", "dataset": f"{detour}data"}
        flags = arguments(script, output_dir=place, steps=number, save_every=number, **names)
        assert run_inside(script, [*flags, "--resume"]) is None
        log = (world / place / "metrics.jsonl").read_text().splitlines()
        steps.append([json.loads(line)["step"] for line in log])
    assert steps == [[*range(number + 1)] for number in range(1, 5)]
    shutil.rmtree(world / "moving")


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_that_were_replaced_are_read_anew(script, tmp_path, capsys):
    """Also if path, size and modification time are the old ones, as after cp -p, rsync -t or tar."""
    module, tokenizer = importlib.import_module(script), byte_tokenizer(pad_token="<pad>", eos_token="</s>")
    file, found = write_data(tmp_path / "data") / "train.jsonl", []
    args = module.Args(dataset=str(tmp_path / "data"))
    for old, new in (("p0", "p0"), ("p0", "q0")):
        times = file.stat()
        file.write_text(file.read_text().replace(old, new))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        if script == "p3o":
            rows = module.read_prompts(["train"], tokenizer, args)
        else:
            rows = module.read_rows(args.dataset, ["train"], ["chosen"], tokenizer, args)
        found.append([row["prompt"] for row in rows])
    rest = [f"p{i}" for i in range(1, 8)]
    assert found == [["p0", *rest], ["q0", *rest]]


# --------------------------------------------------------------------------------------- a reward of one's own
@pytest.mark.parametrize("script", RL)
def test_a_wrong_reward_ends_the_run(script, world, tmp_path, monkeypatch):
    """It is one number for all responses, or not a number, as test_logprobs.py has them."""
    module = importlib.import_module(script)
    online = {"online": True} if script == "dpo" else {}
    for number, wrong in enumerate(
        (lambda batch: 0.5, lambda batch: [float("nan")] * len(batch["response"]))
    ):
        monkeypatch.setattr(module, "load_reward", lambda *args: wrong)
        given = SMALL | {"output_dir": str(tmp_path / f"{number}")} | online
        known = {field.name for field in dataclasses.fields(module.Args)}
        with pytest.raises(SystemExit) as stop:
            module.main(module.Args(**{name: value for name, value in given.items() if name in known}))
        check_line(stop.value.code, ["the reward", "return a"])
