"""evaluate.py: what stands in answers.jsonl, against plain transformers row by row; what is answered again and what not."""

import json
import os
import shutil

import pytest
import torch
from conftest import run_script
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import evaluate
from toy import gold_reward

SMALL = ["--num_prompts", 3, "--samples_per_prompt", 4, "--micro_batch_size", 5, "--sample_batch_size", 8]
TRAIN = [
    "--steps",
    1,
    "--prompts_per_step",
    4,
    "--minibatch_size",
    4,
    "--eval_prompts",
    2,
    "--learning_rate",
    1e-2,
]


@pytest.fixture(scope="module")
def world(chain, tmp_path_factory):
    """A working directory with two trained policies and their evaluation."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(chain, folder, dirs_exist_ok=True)
    for name, seed in (("p3o", 0), ("p3o_again", 1)):
        done = run_script("p3o.py", *TRAIN, "--seed", seed, "--output_dir", f"out/{name}", cwd=folder)
        assert done.returncode == 0, done.stderr
    done = run_script("evaluate.py", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        "out/evaluation: answers.jsonl, 36 responses of sft, p3o, p3o_again"
    )
    return folder


def read(folder):
    return [json.loads(line) for line in (folder / "out/evaluation/answers.jsonl").read_text().splitlines()]


def go(world, folder, *words):
    """evaluate.py in a copy of the world that may be changed."""
    if not folder.exists():
        shutil.copytree(world, folder, copy_function=shutil.copy2)
    return run_script("evaluate.py", *SMALL, *words, cwd=folder)


def test_every_policy_answers_every_prompt(world):
    rows, meta = read(world), json.loads((world / "out/evaluation/meta.json").read_text())
    assert [row["policy"] for row in rows] == ["sft"] * 12 + ["p3o"] * 12 + ["p3o_again"] * 12
    assert [row["prompt_id"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4 + rows_of_ids() * 2
    assert meta["policies"] == {"p3o": "out/p3o", "p3o_again": "out/p3o_again"} and meta["model"] == "out/sft"
    assert (meta["num_prompts"], meta["samples_per_prompt"]) == (3, 4)
    prompts = [
        json.loads(line)["prompt"]
        for line in (world / "data/toy/prompts/test.jsonl").read_text().splitlines()
    ]
    assert all(row["prompt"] == prompts[row["prompt_id"]] for row in rows)
    assert len({row["response"] for row in rows[:12]}) > 6, "samples, not one answer over and over"


def rows_of_ids():
    return [0] * 4 + [1] * 4 + [2] * 4


@torch.no_grad()
def test_the_numbers_of_a_row_are_those_of_plain_transformers(world):
    """One unpadded row at a time: log-probs, exact KL, reward, gold reward, length and end."""
    folders = {"sft": "out/sft", "p3o": "out/p3o", "p3o_again": "out/p3o_again"}
    models = {name: AutoModelForCausalLM.from_pretrained(world / f).eval() for name, f in folders.items()}
    scorer = AutoModelForSequenceClassification.from_pretrained(world / "out/reward_model").eval()
    tokenizer = evaluate.load_tokenizer(str(world / "out/sft"))
    for row in read(world):
        prompt, response = tokenizer(row["prompt"])["input_ids"], row["response_ids"]
        ids, start = torch.tensor([prompt + response]), len(prompt) - 1
        logs = {name: m(ids).logits[0, start:-1].double().log_softmax(-1) for name, m in models.items()}
        for name, log in logs.items():
            naive = sum(log[t, token].item() for t, token in enumerate(response))
            assert row["logp"][name] == pytest.approx(naive, abs=1e-4)
        own, sft = logs[row["policy"]], logs["sft"]
        assert row["kl_exact"] == pytest.approx((own.exp() * (own - sft)).sum().item(), abs=1e-4)
        ended = response[-1] == tokenizer.eos_token_id
        assert row["ended"] is ended and row["length"] == len(response) <= 24
        assert tokenizer.eos_token_id not in response[:-1]
        penalty = 0 if ended else 1
        assert row["reward"] == pytest.approx(scorer(ids).logits.item() - penalty, abs=1e-4)
        assert row["response"] == tokenizer.decode(response, skip_special_tokens=True)
        assert row["gold_reward"] == gold_reward(row["prompt"], row["response"])


def test_a_finished_evaluation_is_not_repeated(world, tmp_path):
    before, folder = read(world), tmp_path / "w"
    assert go(world, folder).returncode == 0
    assert read(folder) == before
    os.utime(folder / "out/p3o/model.safetensors")  # other weights: it answers, and is read by, anew
    rows = before[:12] + before[24:]
    for row in rows:
        row["reward"] = 77.0  # a mark on what must be kept
    marked = [json.dumps(row) for row in [*rows[:12], *before[12:24], *rows[12:]]]
    (folder / "out/evaluation/answers.jsonl").write_text("\n".join(marked) + "\n")
    assert go(world, folder).returncode == 0
    after = read(folder)
    assert {row["policy"] for row in after if row["reward"] != 77.0} == {"p3o"}
    for row, expected in zip(after, before, strict=True):
        assert row["logp"] == pytest.approx(expected["logp"], abs=1e-4)


def test_killed_between_policies_it_goes_on_and_a_new_run_joins(world, tmp_path):
    """One policy at a time gives the same answers as all at once."""
    folder = tmp_path / "w"
    shutil.copytree(world, folder, copy_function=shutil.copy2)
    shutil.rmtree(folder / "out/evaluation")
    assert go(world, folder, "--runs", "out/p3o_again").returncode == 0
    assert {row["policy"] for row in read(folder)} == {"sft", "p3o_again"}
    (folder / "out/evaluation/answers.jsonl.new").write_text('{"policy": "p3')  # of a killed one
    assert go(world, folder).returncode == 0
    for one, other in zip(read(folder), read(world), strict=True):
        assert one["logp"].keys() == other["logp"].keys()
        assert one | {"logp": 0} == other | {"logp": 0}
        assert one["logp"] == pytest.approx(other["logp"], abs=1e-4)


def test_other_settings_replace_answers_only_when_told_to(world, tmp_path):
    folder = tmp_path / "w"
    done = go(world, folder, "--seed", 5)
    assert done.returncode == 2 and "other settings" in done.stderr and "--overwrite" in done.stderr
    assert read(folder) == read(world)
    assert go(world, folder, "--seed", 5, "--overwrite").returncode == 0
    assert [r["response"] for r in read(folder)] != [r["response"] for r in read(world)]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--runs", "out/sft"], "'out/sft' holds no trained policy"),
        (["--runs", "nothere"], "'nothere' holds no trained policy"),
        (["--num_prompts", 0], "--num_prompts 0 is out of range"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--dataset", "nothere"], "cannot read data set 'nothere'"),
        (["--reward_model", "out/sft", "--overwrite"], "'out/sft' is not a whole SequenceClassification"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(world, words, said):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    done = run_script("evaluate.py", *SMALL, *words, cwd=world)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], (
        done.stderr
    )
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_runs_must_agree_on_what_was_not_given(world, tmp_path):
    folder = tmp_path / "w"
    shutil.copytree(world, folder, copy_function=shutil.copy2)
    path = folder / "out/p3o/args.json"
    for name, value in (("temperature", 0.5), ("model", "out/other")):
        record = json.loads((world / "out/p3o/args.json").read_text())
        record["args"][name] = value
        path.write_text(json.dumps(record))
        done = go(world, folder)
        assert done.returncode == 2 and f"differ in their {name}" in done.stderr


def test_nothing_to_evaluate(tmp_path):
    done = run_script("evaluate.py", cwd=tmp_path)
    assert done.returncode == 2 and "run p3o.py first" in done.stderr


def test_the_runs_may_come_first_without_a_flag(world, tmp_path):
    """As a process of its own: python evaluate.py RUN --flags."""
    folder = tmp_path / "w"
    shutil.copytree(world, folder, copy_function=shutil.copy2)
    done = run_script("evaluate.py", "out/p3o", *SMALL, "--output_dir", "out/one", cwd=folder)
    assert done.returncode == 0 and "sft, p3o to 3 prompts" in done.stdout, done.stderr
