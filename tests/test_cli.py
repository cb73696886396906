"""What users get wrong ends in one line, `error: <what is wrong>; <what to do>`, and nothing is written or lost.

To add a case: a line in CASES. Each runs inside this process, with one of its scripts in rotation, because the checks
are the same text in every script; ALL_CASES=1 runs all.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo
import p3o

SCRIPTS = ("sft", "reward_model", "p3o", "ppo", "dpo")
RL = ("p3o", "ppo", "dpo")  # those that have a policy and a reward model
# those that read prompts alone, and those that need preference pairs
PROMPTS, PAIRS = ("p3o", "ppo"), ("reward_model", "dpo")
FROM_SFT = ("reward_model", *RL)  # those that start from the SFT model
ALL = ("prompt", "completion", "chosen", "rejected")  # the columns of the data
SMALL = {"model": "lm", "reward_model": "rm", "dataset": "data", "prompt_length": 16, "response_length": 6}
SMALL |= {"steps": 1, "prompts_per_step": 2, "minibatch_size": 2, "eval_prompts": 2, "eval_rows": 2}


def arguments(script, **changes):
    """The command line of a small run of a script, with those of the flags that it has."""
    known = {field.name for field in dataclasses.fields(importlib.import_module(script).Args)}
    given = SMALL | {"output_dir": f"out/{script}"} | changes
    return sum([[f"--{name}", str(value)] for name, value in given.items() if name in known], [])


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
    write_rows(folder / "data", columns=ALL)
    write_rows(folder / "data_im_end", columns=ALL)
    (folder / "data_im_end/data.json").write_text('{"eos_token": "<|im_end|>"}')
    write_rows(folder / "only_prompts", columns=["prompt"])
    write_rows(folder / "dialogues", columns=["chosen", "rejected"])  # as in HH-RLHF
    write_rows(folder / "no_train", ["validation"], columns=ALL)
    write_rows(folder / "no_held_out", ["train"], columns=ALL)
    write_rows(folder / "long_prompts", columns=ALL, prompt="x" * 17)
    write_rows(folder / "long_responses", columns=ALL, **dict.fromkeys(ALL[1:], "x" * 6))  # and EOS
    write_rows(folder / "empty", rows=0)
    (folder / "hollow").mkdir()
    save_tiny_models(folder)
    shutil.copytree(folder / "rm", folder / "other_tokens")
    byte_tokenizer(True, CHATML, pad_token="<pad>", eos_token="</s>").save_pretrained(folder / "other_tokens")
    for name in "unreadable", "no_weights", "no_tokenizer", "no_eos", "bad_config", "copy", "many_rows":
        shutil.copytree(folder / "lm", folder / name)
    (folder / "unreadable/model.safetensors").rename(folder / "unreadable/model.gguf")
    (folder / "no_weights/checkpoint-500").mkdir()
    (folder / "no_weights/model.safetensors").rename(folder / "no_weights/checkpoint-500/model.safetensors")
    [path.unlink() for path in (folder / "no_tokenizer").glob("tokenizer*")]
    byte_tokenizer(pad_token="<pad>", unk_token="<unk>").save_pretrained(folder / "no_eos")
    (folder / "bad_config/config.json").write_text('{"model_type": "gpt2", ')
    model = AutoModelForCausalLM.from_pretrained(folder / "many_rows")
    model.resize_token_embeddings(400)
    model.save_pretrained(folder / "many_rows")
    (folder / "a_file").write_text("in the way")
    (folder / "dangling").symlink_to("nothere")
    os.mkfifo(folder / "a_pipe")  # like /dev/null it is neither a file nor a folder
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script in SCRIPTS:
            assert run_inside(script, arguments(script, output_dir=f"done/{script}")) is None, script
            shutil.copytree(f"done/{script}", f"foreign/{script}", ignore=shutil.ignore_patterns("args.json"))
        yield folder


def snapshot(folder):
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


def logged_steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def case(name, expected, scripts=SCRIPTS, extra="", **changes):
    """expected: what the line must contain. changes: flags that differ from the small run. extra: more words."""
    return name, expected, scripts, extra.split(), changes


WAYS, NO_FOLDERS = ("--resume", "--overwrite"), ("a_file", "a_pipe", "dangling")
DONE, OVER = {"output_dir": "done/{script}"}, {"extra": "--overwrite"}
PATHS = ("out/nothere", "owner/nothere", "nothere/deep/er")  # the third is deeper than a hub name
NUMBERS = {"steps": "0", "seed": "-1", "response_length": "0", "save_every": "0", "learning_rate": "0.0"}
CASES = [
    *[case(f"{flag} {path}", [path], **{flag: path}) for flag in ("dataset", "model") for path in PATHS],
    *[case(f"{name} {value}", [f"--{name} {value}"], **{name: value}) for name, value in NUMBERS.items()],
    case("an empty folder", ["hollow", "data.py"], dataset="hollow"),
    case("empty files", ["empty", "data.py"], dataset="empty"),
    case("no train split", ["no_train", "train", "data.py"], dataset="no_train"),
    case("nothing held out", ["no_held_out", "validation", "data.py"], dataset="no_held_out"),
    case("dialogues", ["dialogues", "'prompt'", "data.py"], dataset="dialogues"),
    case("prompts, not demonstrations", ["'completion'", "data.py"], ("sft",), dataset="only_prompts"),
    case("prompts, not pairs", ["'chosen', 'rejected'", "data.py"], PAIRS, dataset="only_prompts"),
    case("prompts too long", ["--prompt_length 16"], dataset="long_prompts"),
    case("responses too long", ["--response_length"], ("sft", *PAIRS), dataset="long_responses"),
    case("another end of turn", ["'</s>'", "'<|im_end|>'", "sft.py"], FROM_SFT, dataset="data_im_end"),
    *[case(f"model {x}", [x], model=x) for x in ("no_tokenizer", "hollow", "bad_config")],
    case("no EOS", ["no_eos", "EOS"], model="no_eos"),
    *[case(f"model {x}", [x], FROM_SFT, model=x) for x in ("unreadable", "no_weights")],
    case("lengths beyond the context", ["lm", "32", "--prompt_length"], prompt_length=27),
    case("no such reward model", ["out/nothere"], PROMPTS, reward_model="out/nothere"),
    case("policy as reward model", ["lm", "score"], PROMPTS, reward_model="lm"),
    case("reward model without weights", ["no_weights"], PROMPTS, reward_model="no_weights"),
    case("reward model of other tokens", ["other_tokens", "README"], PROMPTS, reward_model="other_tokens"),
    case("fewer embeddings than the policy", ["embeddings"], PROMPTS, model="many_rows"),
    case("learning rate nan", ["--learning_rate nan"], learning_rate="nan"),
    case("temperature negative", ["--temperature -1.0"], RL, temperature=-1),
    case("beta nan", ["--beta nan"], RL, beta="nan"),
    case("minibatch divides not", ["--minibatch_size"], PROMPTS, minibatch_size=3, prompts_per_step=4),
    case("the same, DPO online", ["--minibatch_size"], ("dpo",), "--online", minibatch_size=3),
    case("one response", ["--num_responses", "pairs"], ("p3o",), num_responses=1),
    case("weights held below 1", ["--max_importance_weight"], ("p3o",), max_importance_weight=0.5),
    case("a run is there", ["not empty", "--resume", "--overwrite"], **DONE),
    case("resume and overwrite", ["not empty"], extra=" ".join(WAYS), **DONE),
    *[case(f"foreign {x}", ["not empty"], extra=x, output_dir="foreign/{script}") for x in ("", *WAYS)],
    case("over all inputs", ["lies inside"], **OVER, output_dir="."),
    *[case(f"over {x}", [f"{x} is no folder"], **OVER, output_dir=x) for x in NO_FOLDERS],
    case("over a run, the model", ["--model"], **OVER, output_dir="done/sft", model="done/sft"),
    case("the same by a detour", ["--model"], **OVER, output_dir="rm/../done/sft", model="done/sft"),
    case("another seed", ["--seed was 0 and is now 7"], extra="--resume", seed=7, **DONE),
    case("another model", ["--model was lm and is now copy"], extra="--resume", model="copy", **DONE),
    case("another beta", ["--beta was"], RL, "--resume", beta=0.7, **DONE),
    case("a run of another script", ["was"], FROM_SFT, "--resume", output_dir="done/sft"),
]

SPREAD = [  # one row per case and script: all scripts, or one in rotation
    pytest.param(expected, script, extra, changes, id=f"{script}-{name}")
    for number, (name, expected, scripts, extra, changes) in enumerate(CASES)
    for script in (scripts if os.environ.get("ALL_CASES") else [scripts[number % len(scripts)]])
]


def check_line(line, expected=()):
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line and len(line) < 500, line
    assert "; " in line or " must " in line, f"what to do: {line}"
    for part in expected:
        assert part in line, f"{part!r} is not in {line!r}"


@pytest.mark.parametrize("expected, script, extra, changes", SPREAD)
def test_bad_input(expected, script, extra, changes, world):
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
def test_wrong_flags_and_torchrun_are_refused_and_help_names_every_flag(script, world, capsys, monkeypatch):
    before = snapshot(world)
    for words in (["--nonsense", "1"], ["--see", "1"], ["word"], ["--steps", "many"], ["--dtype", "float8"]):
        assert run_inside(script, arguments(script) + words) == 2
        assert f"{script}.py: error: " in capsys.readouterr().err
    assert run_inside(script, ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(importlib.import_module(script).Args):
        assert f"--{field.name}" in text and field.metadata.get("help"), field.name
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_line(run_inside(script, arguments(script)), ["one process", "examples/"])
    assert snapshot(world) == before


def test_a_real_process(world):
    done = run_script("p3o.py", *arguments("p3o", dataset="dialogues"), cwd=world)
    assert done.returncode == 1
    check_line(done.stderr.strip(), ["dialogues", "data.py"])


def test_sft_takes_the_end_of_turn_of_the_data(world, tmp_path):
    """A chat model whose EOS is not the end of a turn becomes one that stops there, and the later stages take it."""
    assert run_inside("sft", arguments("sft", dataset="data_im_end", output_dir=tmp_path / "sft")) is None
    eos = AutoTokenizer.from_pretrained(tmp_path / "sft").convert_tokens_to_ids("<|im_end|>")
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        record = json.loads((tmp_path / "sft" / name).read_text())
        assert (record.get("eos_token") or record["eos_token_id"]) in ("<|im_end|>", eos)


def start_held(module, argv, cwd, gate, log):
    """In a child: waits in open_run until the other one is there too, so that both have found the folder free."""
    os.chdir(cwd)
    script, sys.stderr = importlib.import_module(module), open(log, "w", buffering=1)
    plain = script.open_run

    def open_run(*args):
        socket.create_connection(("127.0.0.1", gate)).recv(1)
        return plain(*args)

    script.open_run, sys.argv = open_run, [f"{module}.py", *argv]
    script.main(script.Args(**vars(script.transformers.HfArgumentParser(script.Args).parse_args())))


@pytest.mark.parametrize("script", ["sft", "p3o"])
def test_two_runs_in_one_folder(script, world, tmp_path):
    argv, logs = arguments(script, output_dir=tmp_path / "run"), [tmp_path / "log0", tmp_path / "log1"]
    with socket.create_server(("127.0.0.1", 0)) as gate:
        given = script, argv, str(world), gate.getsockname()[1]
        processes = [context.Process(target=start_held, args=(*given, log)) for log in logs]
        for process in processes:
            process.start()
        for connection in [gate.accept()[0] for _ in processes]:
            connection.send(b"!")
    for process in processes:
        process.join(60)
    statuses = [process.exitcode for process in processes]
    said = logs[statuses.index(1)].read_text()
    check_line(said.splitlines()[-1], ["another run", "another --output_dir"])
    assert sorted(statuses) == [0, 1] and "Traceback" not in said
    assert logged_steps(tmp_path / "run") == [0, 1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_knows_the_folder_by_any_name(script, world, monkeypatch):
    """As ./out, by an absolute path, after it was moved, and with its inputs by other names; more steps go on."""
    for number, place in enumerate(("moving/a", "./moving/a/", str(world / "moving/a"), "moving/b"), 1):
        if place == "moving/b":
            (world / "moving/a").rename(world / "moving/b")
        detour = "./rm/../" if number % 2 else ""
        names = {"model": f"{detour}lm", "reward_model": f"{detour}rm", "dataset": f"{detour}data"}
        flags = arguments(script, output_dir=place, steps=number, save_every=number, **names)
        assert run_inside(script, [*flags, "--resume"]) is None
        assert logged_steps(world / place) == [*range(number + 1)]
    shutil.rmtree(world / "moving")


def test_rows_that_were_replaced_are_read_anew(tmp_path, monkeypatch):
    """Also if path, size and modification time are the old ones, as after cp -p, rsync -t or tar."""
    args, tokenizer = p3o.Args(dataset="data"), byte_tokenizer(pad_token="<pad>", eos_token="</s>")
    file, rest = write_rows(tmp_path / "data", columns=ALL) / "train.jsonl", [f"p{i}" for i in range(1, 8)]
    monkeypatch.chdir(tmp_path)
    for new in ("p0", "q0"):
        times = file.stat()
        file.write_text(file.read_text().replace("p0", new))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        prompts = p3o.read_prompts(["train"], tokenizer, args)
        pairs = dpo.read_rows(args.dataset, ["train"], ["chosen"], tokenizer, args)
        assert [[row["prompt"] for row in rows] for rows in (prompts, pairs)] == [[new, *rest]] * 2


@pytest.mark.parametrize("script", RL)
def test_a_wrong_reward_ends_the_run(script, world, tmp_path, monkeypatch):
    """It is one number for all responses, or not a number, as test_logprobs.py has them."""
    module = importlib.import_module(script)
    known = {field.name for field in dataclasses.fields(module.Args)}
    wrongs = (lambda batch: 0.5), (lambda batch: [float("nan")] * len(batch["response"]))
    for number, wrong in enumerate(wrongs):
        monkeypatch.setattr(module, "load_reward", lambda *args: wrong)
        given = SMALL | {"output_dir": str(tmp_path / f"{number}"), "online": True}
        with pytest.raises(SystemExit) as stop:
            module.main(module.Args(**{name: value for name, value in given.items() if name in known}))
        check_line(stop.value.code, ["the reward", "return a"])
