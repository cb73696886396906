"""What ALGORITHM.md says is so: the numbers of its example, and the functions, tests, flags and files it names."""

import ast
import dataclasses
import math
import re

import pytest
import torch
from conftest import ROOT

import p3o
import ppo

TEXT = (ROOT / "ALGORITHM.md").read_text()
SECTIONS = dict(re.findall(r"^## \d\. ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M))
EXAMPLE = SECTIONS["A worked example"]


def rows(section):
    """The cells of every table row but the head and the rule under it, as they stand."""
    for line in section.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def definitions(path):
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


NUMBERS = {label: cells for label, *cells in rows(EXAMPLE) if label}


def numbers(label):
    return [float(cell) for cell in NUMBERS[label]]


def setting(name):
    return float(re.search(rf"\$\\{name} = ([\d.]+)\$", EXAMPLE)[1])


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def recomputed(added=0.0):
    """Every row of the second table but the texts, from its log-probs, the first table and the shipped functions."""
    beta, clip_range = setting("beta"), setting("varepsilon")
    score, old = tensor([numbers("score $r$")]) + added, tensor([numbers(r"$\log \pi_{\text{old}}$")])
    reward = p3o.trajectory_reward(score, old, tensor([numbers(r"$\log \pi_{\text{SFT}}$")]), beta)
    found = {}
    for column in range(3):
        new = [numbers(rf"$\log \pi_\theta(y_{i} \mid x)$")[column] for i in (1, 2)]
        rho_1, rho_2 = (math.exp(logp - before) for logp, before in zip(new, old[0].tolist()))
        difference = (reward[0, 0] - reward[0, 1]).item()
        values = {r"$\rho_1$": rho_1, r"$\rho_2$": rho_2, "V2: $w$": difference * rho_1 * rho_2}
        values |= {"V1: $A_1$": difference * rho_2, "V1: $A_2$": -difference * rho_1}
        values["V2: $d$"] = math.log(rho_1) - math.log(rho_2)
        for name, clipping in (("V1", "separate"), ("V2", "joint")):
            leaf = tensor([new]).requires_grad_()
            loss, stats = p3o.p3o_loss(leaf, old, reward, clip_range, clipping)
            push_1, push_2 = (-torch.autograd.grad(loss, leaf)[0])[0].tolist()
            values |= {f"{name}: loss": loss.item(), f"{name}: clip_fraction": stats["clip_fraction"]}
            values |= {f"{name}: push on $y_1$": push_1, f"{name}: push on $y_2$": push_2}
        for label, value in values.items():
            found.setdefault(label, []).append(value)
    return reward[0].tolist(), found


def test_the_worked_example():
    """Every number of both tables, to the three decimals that stand there; V1 and V2 never clip the same."""
    reward, found = recomputed()
    assert numbers("trajectory reward $R$") == reward
    said = {"none": 0.0, "$y_1$": 0.5, "the pair": 1.0}  # the share of the terms
    for name in ("V1", "V2"):
        clipped = found.pop(f"{name}: clip_fraction")
        assert [said[cell] for cell in NUMBERS[f"{name}: clipped terms"]] == clipped
    assert len(found) == 12
    for label, values in found.items():
        assert NUMBERS[label] == [f"{value + 0.0:.3f}".replace("-0.000", "0.000") for value in values], label

    added = float(re.search(r"after (\d+) is added", EXAMPLE)[1])
    reward, shifted = recomputed(added)
    assert added == 100 and numbers("$R$ after 100 is added to both scores") == reward
    assert all(shifted[label] == values for label, values in found.items()), "an offset changes no bit"


def test_the_arithmetic_in_the_text_of_the_worked_example():
    """Sums like $2.443 \\times 1.2 = 2.931$ are right as they stand, and their numbers stand in the tables."""
    known = {number.lstrip("-") for cells in NUMBERS.values() for number in cells}
    sums = re.findall(r"\$([-\d. ()/]+(?:\\times|-|/)[-\d. ()/\\times]*) = (-?[\d.]+)\$", EXAMPLE)
    assert len(sums) == 9
    for left, right in sums:
        value = eval(left.replace(r"\times", "*"), {"__builtins__": {}})
        assert value == pytest.approx(float(right), abs=0.0006), left
        long = set(re.findall(r"\d+\.\d{3}", left))
        assert long <= known, f"{long - known} is in no table and the result of no sum before"
        known.add(right.lstrip("-"))


def test_every_equation_names_a_function_and_a_test_that_exist():
    table = list(rows(SECTIONS["Equation, function, test"]))[1:]
    assert len(table) >= 15
    for equation, function, test in table:
        script = re.search(r"\]\((\w+\.py)\)$", function)[1]
        named = set(re.findall(r"`(\w+)[`(]", function))
        assert named and named <= definitions(script), equation
        path, name = re.fullmatch(r"`(tests/\w+\.py)::(\w+)`", test).groups()
        assert name in definitions(path), test
        source = (ROOT / path).read_text()
        assert all(re.search(rf"\b{x}\b", source) for x in named), f"{path} does not mention {named}"


def test_flags_files_tricks_and_the_preset_are_those_of_the_scripts():
    fields = {field.name for script in (p3o, ppo) for field in dataclasses.fields(script.Args)}
    assert set(re.findall(r"--(\w+)", TEXT)) <= fields
    args = p3o.Args()
    assert (args.max_importance_weight, args.missing_eos_penalty, args.num_responses) == (None, 1, 2)
    assert args.clipping == "joint" and "V2 is the default" in TEXT
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith("https://arxiv.org/abs/") or (ROOT / target).exists(), target
    table, preset = list(rows(SECTIONS["PPO, its tricks, and PPO-max"]))[1:], ppo.PRESETS["ppo_max"]
    assert len(table) >= 12
    for trick, flags, functions in table:
        assert "--" in flags and set(re.findall(r"`(\w+)`", functions)) <= definitions("ppo.py"), trick
    assert preset["beta"] == float(re.search(r"sets `--beta` to (\d+\.\d+)", TEXT)[1])
    assert not preset["whiten_advantages"] and preset["normalize_reward"]
    starred = set(re.findall(r"--(\w+)", str([row for row in table if "*" in row[0]])))
    assert preset.keys() - {"whiten_advantages"} <= starred
