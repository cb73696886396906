"""What README.md promises holds: commands, flags, links, what the commands print, and the code in it runs."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer

README = (ROOT / "README.md").read_text()
EXAMPLES = (ROOT / "examples" / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README + EXAMPLES, re.S)


def code(marker):
    """The first Python block after a piece of text."""
    return README.split(marker)[1].split("```python\n")[1].split("```")[0]


def flags_of(script):
    """The flags that a script knows, from its --help."""
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--\w+", done.stdout))


def commands():
    """(script, its words) of each `python x.py ...` in the shell blocks; lists such as "${H[@]}" are filled in."""
    text = "\n".join(body.replace("\\\n", " ") for kind, body in BLOCKS if kind == "bash")
    for name, words in re.findall(r"^(\w)=\((.*)\)$", text, re.M):
        text = text.replace(f'"${{{name}[@]}}"', words)
    for line in re.split(r"\n|&&", text):
        words = shlex.split(line, comments=True)
        if words[:1] == ["python"] and re.search(r"(?<!_trl)\.py$", words[1]):  # trl may be missing
            yield words[1], words[2:]


def test_every_command_and_its_flags_exist():
    found = {}
    for script, words in commands():
        found.setdefault(script, set()).update(word for word in words if word.startswith("--"))
    assert len(found) >= 8
    for script, flags in found.items():
        assert flags <= flags_of(script), f"{script}: {flags - flags_of(script)}"


def test_every_flag_in_the_text_belongs_to_a_script():
    known = {"--help", "--index"}
    for name in ("sft", "reward_model", "p3o", "ppo", "dpo", "evaluate"):
        known |= {f"--{field.name}" for field in dataclasses.fields(importlib.import_module(name).Args)}
    known |= flags_of("data.py") | flags_of("frontier.py")
    assert set(re.findall(r"--\w+", README)) <= known


def test_links_and_files():
    pages = [ROOT / "README.md", ROOT / "ALGORITHM.md", ROOT / "examples/README.md"]
    pages += (ROOT / "results").rglob("README.md")
    for page in pages:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            path = page.parent / target.partition("#")[0]
            assert target.startswith("https://") or path.exists(), f"{page}: {target}"
    for name in re.findall(r"^(\w+\.py) ", README, re.M):
        assert (ROOT / name).exists(), name


def test_the_metrics_are_logged(p3o_run):
    folder, _ = p3o_run
    logged = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    table = README.split("## What to watch")[1].split("##")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(names) == 9 and names <= set(logged)


def test_the_defaults_of_the_knobs():
    p3o = importlib.import_module("p3o").Args()
    table = README.split("## The knobs that matter")[1].split("##")[0]
    rows = re.findall(r"\| `--(\w+)` \| ([\w.-]+) \|", table)
    assert len(rows) == 7
    for name, default in rows:
        assert getattr(p3o, name) == float(default), name


def test_the_example_of_copying_runs():
    score, logp_old, logp_ref = torch.randn(3, 4, 2)
    values = {"score": score, "logp_old": logp_old, "logp_ref": logp_ref}
    values["logp_new"] = logp_old.clone().requires_grad_()
    exec(code("uses only torch and math:"), values)
    assert values["logp_new"].grad.abs().sum() > 0


def test_talking_to_the_trained_policy(chain, tmp_path):
    """The code as a user would run it. To be quick it is the SFT model, which P3O starts from."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/p3o").symlink_to(chain / "out/sft")
    talk = code("as it did in training:")
    done = subprocess.run([sys.executable, "-c", talk], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (answer,) = done.stdout.splitlines()
    tokenizer = AutoTokenizer.from_pretrained(chain / "out/sft")
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert 0 < len(ids) <= 24 and not set(ids) & set(tokenizer.all_special_ids), f"not words alone: {answer}"
    assert "write about" not in answer, "the answer without its prompt"


def test_your_own_reward(chain, tmp_path):
    """The code as a user would run it, with fewer steps; the rewards in the log are those of its rule."""
    few = 'output_dir="out/p3o-own-reward", steps=1, prompts_per_step=4, minibatch_size=4, eval_prompts=8'
    text = code("**Your own reward.**")
    assert 'output_dir="out/p3o-own-reward"' in text
    (tmp_path / "own.py").write_text(text.replace('output_dir="out/p3o-own-reward"', few))
    for name in ("data", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "data/toy").symlink_to(chain / "data/toy")
    (tmp_path / "out/sft").symlink_to(chain / "out/sft")  # and no reward model at all
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "own.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out/p3o-own-reward/samples_1.jsonl").read_text().splitlines()
    assert len(rows) == 8
    for row in map(json.loads, rows):
        words = row["response"].split()
        rule = min(len(words), 10) - 5.0 * words.count("bad")
        assert row["reward"] in (rule, rule - 1), "the missing-EOS penalty may come off"


def test_defaults_make_a_chain():
    """The outputs of one stage are the default inputs of the next."""
    args = {s: importlib.import_module(s).Args() for s in ("sft", "reward_model", "p3o", "ppo", "dpo")}
    assert args["reward_model"].model == args["sft"].output_dir
    for name in ("p3o", "ppo", "dpo"):
        assert args[name].model == args["sft"].output_dir
        assert args[name].reward_model == args["reward_model"].output_dir


def test_ci_runs_the_lines_of_the_readme():
    ci = (ROOT / ".ci/run").read_text()
    for start in ("pip install", "python -m pytest"):
        assert start in ci and sum(line.startswith(start) for line in README.splitlines()) == 1


def quickstart_log():
    """All that the commands of the quick start printed when results/quickstart was made."""
    lines = (ROOT / "results/quickstart/runs.jsonl").read_text().splitlines()
    return [printed for line in lines for printed in json.loads(line)["said"]]


def test_what_the_readme_shows_was_printed():
    shown = next(body for kind, body in BLOCKS if kind == "").splitlines()
    assert len(shown) >= 5 and set(shown) <= set(quickstart_log())


@pytest.mark.parametrize("name", ["sft", "reward_model", "p3o", "ppo", "dpo", "evaluate", "frontier"])
def test_the_last_line_in_a_docstring_was_printed(name):
    docstring = (ROOT / f"{name}.py").read_text().split('"""')[1]
    shown = [line.strip() for line in docstring.splitlines() if line.startswith(("    out/", "    p3o: "))]
    assert shown and set(shown) <= set(quickstart_log())
