"""What the README names exists: files, commands, flags, functions, and its example runs."""

import ast
import dataclasses
import importlib.util
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
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def commands():
    """(script, [flags]) of every python line in the shell blocks and of every `python x.py ...` in the text."""
    text = "\n".join(body.replace("\\\n", " ") for kind, body in BLOCKS if kind == "bash")
    text = re.sub(r'^(\w)="(.*)"$', "", text, flags=re.M)
    lines = [part for line in text.splitlines() for part in line.split("&&")]
    lines += re.findall(r"`(python [^`]+)`", README)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["python"] and words[1].endswith(".py"):
            yield words[1], words[2:]


def test_commands_and_flags():
    found = list(commands())
    assert len(found) >= 10
    for script, words in found:
        if script.startswith("results/"):  # their flags are those of the next test
            assert (ROOT / script).exists(), script
            continue
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        fields = {f.name for f in dataclasses.fields(importlib.import_module(script[:-3]).Args)}
        assert {flag[2:] for flag in flags} <= fields, f"{script}: {set(flags)}"


def test_every_flag_in_the_text_belongs_to_a_script():
    fields = {f.name for s in SCRIPTS for f in dataclasses.fields(importlib.import_module(s).Args)}
    texts = [
        (ROOT / "results" / x).read_text() for x in ("lib.py", "toy_task.py", "language/film_reviews.py")
    ]
    fields |= set(re.findall(r'"(\w+)"(?:\] =|:) \{"', "".join(texts)))
    text = "\n".join(line for line in README.splitlines() if not line.strip().startswith("accelerate launch"))
    flags = set(re.findall(r"--(\w+)", text)) - {"help"}
    assert flags <= fields, flags - fields


def test_files_and_links():
    folders = (ROOT, ROOT / "examples", *(path.parent for path in (ROOT / "results").rglob("README.md")))
    for page in (folder / "README.md" for folder in folders):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), target
    for name in set(re.findall(r"`?([\w/]+\.(?:py|cff|txt))`?", README)):
        assert (ROOT / name).exists(), name


def test_the_equation_table():
    rows = [row for row in README.splitlines() if re.search(r"\[\w+\.py\]", row) and row.startswith("|")]
    assert len(rows) >= 9
    for row in rows:
        *_, functions, file, _ = re.split(r"(?<!\\)\|", row)
        tree = ast.parse((ROOT / re.search(r"\((\w+\.py)\)", file)[1]).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert set(re.findall(r"`(\w+)", functions)) <= defined, row


def test_the_metrics_table(chain):
    import p3o

    logged = set(re.findall(r'"(\w+)"', (ROOT / "p3o.py").read_text()))
    table = README.split("## Metrics")[1].split("##")[0]
    named = re.findall(
        r"`([\w*]+)`", "\n".join(row.split("|")[1] for row in table.splitlines() if "|" in row)
    )
    names = {name for name in named if "*" not in name}
    assert names and names <= logged | {f.name for f in dataclasses.fields(p3o.Args)}, names - logged


def test_the_example_of_copying_runs():
    code = README.split("nothing but torch and math:")[1].split("```python\n")[1].split("```")[0]
    score, logp_old, logp_ref = torch.randn(3, 4, 2)
    values = {"score": score, "logp_old": logp_old, "logp_ref": logp_ref}
    values["logp_new"] = logp_old.clone().requires_grad_()
    exec(code, values)
    assert values["logp_new"].grad.abs().sum() > 0


def test_talking_to_the_trained_policy(chain, tmp_path):
    """The section's code as a user would run it. To be quick it is the SFT model, which P3O starts from."""
    code = README.split("as it did in training:")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/p3o").symlink_to(chain / "out/sft")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.splitlines()
    tokenizer = AutoTokenizer.from_pretrained(chain / "out/sft")
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert 0 < len(ids) <= 24 and not set(ids) & set(tokenizer.all_special_ids), f"not words alone: {said}"
    assert "write about" not in said, "the answer without its prompt"


def test_your_own_reward(chain, tmp_path):
    """The section's code as a user would run it; it was this rule on the texts that was trained on."""
    code = README.split("### Your own reward")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "own.py").write_text(code)
    for name in ("data", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "data/toy").symlink_to(chain / "data/toy")
    (tmp_path / "out/sft").symlink_to(chain / "out/sft")  # and no reward model at all
    flags = "--steps 1 --prompts_per_step 4 --minibatch_size 4 --eval_prompts 8".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "own.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out/p3o-own-reward/samples_1.jsonl").read_text().splitlines()
    assert len(rows) == 8
    for row in map(json.loads, rows):
        words = row["response"].split()
        rule = min(len(words), 10) - 5.0 * words.count("bad")
        assert row["reward"] in (rule, rule - 1), "the missing-EOS penalty may come off"


def test_length():
    assert len(README.splitlines()) <= 220


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
    """All that the commands of the quick start said when they were run for results/quickstart."""
    lines = (ROOT / "results/quickstart/runs.jsonl").read_text().splitlines()
    return [said for line in lines for said in json.loads(line)["said"]]


def test_the_log_in_the_readme_is_the_committed_one():
    log = quickstart_log()
    shown = next(body for kind, body in BLOCKS if kind == "").splitlines()
    assert shown and set(shown) <= set(log)


@pytest.mark.parametrize(
    "script", ["sft.py", "reward_model.py", "p3o.py", "ppo.py", "dpo.py", "evaluate.py", "frontier.py"]
)
def test_the_last_line_in_a_docstring_is_the_committed_one(script):
    log = quickstart_log()
    docstring = (ROOT / script).read_text().split('"""')[1]
    shown = [line.strip() for line in docstring.splitlines() if line.startswith(("    out/", "    p3o: "))]
    assert shown and set(shown) <= set(log)
