"""evaluate.py: what stands in answers.jsonl, against plain transformers row by row, and what is never touched."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_script
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import evaluate
from toy import gold_reward

SMALL = ["--num_prompts", 3, "--samples_per_prompt", 4, "--micro_batch_size", 5, "--sample_batch_size", 8]
TRAIN = "--steps 1 --prompts_per_step 4 --minibatch_size 4 --eval_prompts 2 --learning_rate 1e-2".split()
FOLDERS = {"sft": "out/sft", "p3o": "out/p3o", "again [1]": "out/again [1]"}


@pytest.fixture(scope="module")
def world(chain, tmp_path_factory):
    """A working directory with two trained policies, one of them with brackets in its name, and their evaluation."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(chain, folder, dirs_exist_ok=True)
    for seed, name in enumerate(["p3o", "again [1]"]):
        done = run_script("p3o.py", *TRAIN, "--seed", seed, "--output_dir", f"out/{name}", cwd=folder)
        assert done.returncode == 0, done.stderr
    done = run_script("evaluate.py", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    *means, last = done.stdout.splitlines()[1:]
    assert last == "out/evaluation/answers.jsonl: 36 responses of sft, again [1], p3o to 3 prompts"
    rewards = {name: [row["reward"] for row in read(folder)[1] if row["policy"] == name] for name in FOLDERS}
    gain = (sum(rewards["p3o"]) - sum(rewards["sft"])) / 12
    assert len(means) == 3 and means[2].startswith(f"p3o: gain {gain:.2f} over the SFT model, reward ")
    return folder


def read(folder, name="out/evaluation"):
    """The first line of answers.jsonl and the others."""
    header, *rows = [json.loads(line) for line in (folder / name / "answers.jsonl").read_text().splitlines()]
    return header, rows


def fails(folder, *words, said):
    """evaluate.py ends in one line that says so, and changes nothing."""
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    done = run_script("evaluate.py", *words, *SMALL, cwd=folder)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and said in line, done.stderr
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


# --------------------------------------------------------------------------------------------------- the numbers
def test_every_policy_answers_every_prompt(world):
    header, rows = read(world)
    assert [row["policy"] for row in rows] == ["sft"] * 12 + ["again [1]"] * 12 + ["p3o"] * 12
    assert [row["prompt_id"] for row in rows] == ([0] * 4 + [1] * 4 + [2] * 4) * 3
    assert header["policies"] == {name: folder for name, folder in FOLDERS.items() if name != "sft"}
    expected = {"model": "out/sft", "reward_model": "out/reward_model", "dataset": "data/toy/prompts"}
    expected |= {"num_prompts": 3, "samples_per_prompt": 4, "temperature": 1.0}
    assert header | expected == header and header["settings"]["response_length"] == 24
    lines = (world / "data/toy/prompts/test.jsonl").read_text().splitlines()
    assert all(row["prompt"] == json.loads(lines[row["prompt_id"]])["prompt"] for row in rows)
    assert len({row["response"] for row in rows[:12]}) > 6, "samples, not one answer over and over"
    assert [path.name for path in (world / "out/evaluation").iterdir()] == ["answers.jsonl"]


@torch.no_grad()
def test_the_numbers_of_a_row_are_those_of_plain_transformers(world):
    """One unpadded row at a time: log-probs, exact KL, reward, gold reward, length and end."""
    models = {name: AutoModelForCausalLM.from_pretrained(world / f).eval() for name, f in FOLDERS.items()}
    scorer = AutoModelForSequenceClassification.from_pretrained(world / "out/reward_model").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "out/sft")
    for row in read(world)[1]:
        prompt, response = tokenizer(row["prompt"])["input_ids"], row["response_ids"]
        ids, start = torch.tensor([prompt + response]), len(prompt) - 1
        logs = {name: m(ids).logits[0, start:-1].double().log_softmax(-1) for name, m in models.items()}
        assert set(row["logp"]) == set(models)
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


def test_exact_kl_by_a_loop():
    """Uneven masks; in float64 by the definition, token by token."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 4, 5, generator=generator).log_softmax(-1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    for n, value in enumerate(evaluate.exact_kl(p, q, mask).tolist()):
        naive = 0.0
        for t in range(int(mask[n].sum())):
            naive += sum(math.exp(a) * (a - b) for a, b in zip(p[n, t].tolist(), q[n, t].tolist()))
        assert value == pytest.approx(naive, abs=1e-5) and value > 0


@torch.no_grad()
def test_a_response_without_eos_is_penalised_and_a_temperature_divides_the_logits(world):
    """At most 2 tokens, so that nothing ends; rewards and log-probs once more by plain transformers."""
    words = "--response_length 2 --temperature 2 --missing_eos_penalty 7 --output_dir out/short".split()
    done = run_script("evaluate.py", "out/p3o", *SMALL, *words, cwd=world)
    assert done.returncode == 0, done.stderr
    scorer = AutoModelForSequenceClassification.from_pretrained(world / "out/reward_model").eval()
    model = AutoModelForCausalLM.from_pretrained(world / "out/p3o").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "out/sft")
    rows = read(world, "out/short")[1]
    assert any(not row["ended"] for row in rows)
    for row in rows:
        prompt, response = tokenizer(row["prompt"])["input_ids"], row["response_ids"]
        ids = torch.tensor([prompt + response])
        log = (model(ids).logits[0, len(prompt) - 1 : -1] / 2).log_softmax(-1)
        naive = sum(log[t, token].item() for t, token in enumerate(response))
        assert row["logp"]["p3o"] == pytest.approx(naive, abs=1e-4)
        assert row["reward"] == pytest.approx(scorer(ids).logits.item() - 7 * (not row["ended"]), abs=1e-4)


def test_it_samples_in_chunks_and_never_more(world, monkeypatch):
    """12 responses in chunks of 8, read 5 at a time; one policy at a time is loaded beside the SFT model."""
    chunks, loaded = [], []
    sample, load = evaluate.sample_batch, evaluate.load_model
    monkeypatch.setattr(evaluate, "sample_batch", lambda p, x, *a: chunks.append(len(x)) or sample(p, x, *a))
    monkeypatch.setattr(evaluate, "load_model", lambda x, y, *a, **k: loaded.append(y) or load(x, y, *a, **k))
    monkeypatch.chdir(world)
    options = {word.removeprefix("--"): value for word, value in zip(SMALL[::2], SMALL[1::2])}
    evaluate.main(["out/p3o"], evaluate.Args(output_dir="out/chunks", device="cpu", **options))
    assert chunks == [8, 4] * 2
    assert loaded == ["out/sft", "out/reward_model", "out/sft", "out/p3o", "out/sft", "out/p3o"]


def test_a_reward_that_is_no_number_ends_in_one_line(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(evaluate, "load_reward", lambda *_: lambda batch: [math.nan] * len(batch["response"]))
    with pytest.raises(SystemExit, match="error: the reward of the response .* is nan"):
        evaluate.main(["out/p3o"], evaluate.Args(output_dir="out/nan", device="cpu", num_prompts=1))
    assert not list((world / "out/nan").iterdir())


# ------------------------------------------------------------------------------------------------ the output folder
def test_answers_are_replaced_only_when_told_to_and_never_reused(world, tmp_path):
    folder = tmp_path / "w"
    shutil.copytree(world, folder)
    path = folder / "out/evaluation/answers.jsonl"
    fails(folder, said="out/evaluation holds answers; --overwrite them")
    path.write_text(path.read_text().replace('"reward": ', '"reward": 77'))
    path.with_name("answers.jsonl.new").write_text('{"policy": "p3')  # a kill left this
    path.with_name("report.md").write_text("of frontier.py")
    done = run_script("evaluate.py", "--overwrite", *SMALL, cwd=folder)
    assert done.returncode == 0 and read(folder)[1] == read(world)[1], done.stderr
    assert {path.name for path in path.parent.iterdir()} == {"answers.jsonl", "report.md"}


def test_a_kill_leaves_the_old_answers_or_the_new(tmp_path):
    """kill -9 at ten moments around the writing, of evaluations with other seeds."""
    (tmp_path / "loop.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluate\n"
        "for i in range(10**6): evaluate.write_answers({'seed': i}, [{'seed': i}] * 3000, 'out')"
    )
    (tmp_path / "out").mkdir()
    process = subprocess.Popen([sys.executable, tmp_path / "loop.py"], cwd=tmp_path)
    path = tmp_path / "out/answers.jsonl"
    while not path.exists():
        time.sleep(0.05)
    for _ in range(10):
        time.sleep(0.013)
        os.kill(process.pid, signal.SIGSTOP)  # what a kill here would leave
        seeds = [json.loads(line)["seed"] for line in path.read_text().splitlines()]
        assert len(seeds) == 3001 and len(set(seeds)) == 1
        os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.wait()


def test_what_is_no_folder_for_answers_is_refused_before_any_model_is_loaded(world, tmp_path):
    os.mkfifo(world / "out/fifo")
    (world / "out/link").symlink_to("nowhere")
    (world / "out/mixed").mkdir()
    for name in ("answers.jsonl", "args.json"):  # a run's folder, into which someone has put answers
        (world / "out/mixed" / name).write_text("{}")
    for place, said in (
        ("out/p3o", "holds files of something else"),
        ("out/mixed", "holds files of something else"),
        ("out/p3o/config.json", "is no folder"),
        ("out/fifo", "is no folder"),
        ("out/link", "is no folder"),
        ("out/fifo/below", "cannot write into out/fifo/below"),
    ):  # this SFT model does not exist: the folder is looked at first
        fails(world, "--overwrite", "--model", "no-model", "--output_dir", place, said=said)
    (world / "out/fifo").unlink()
    (world / "out/link").unlink()
    shutil.rmtree(world / "out/mixed")


# --------------------------------------------------------------------------------------------- runs and their settings
def test_bad_input_is_one_line_and_changes_nothing(world):
    for words, said in (
        (["out/sft"], "out/sft holds no policy"),
        (["nothere"], "nothere holds no policy"),
        (["--num_prompts", 0], "--num_prompts 0 is out of range"),
        (["--temperature", "nan"], "--temperature nan is out of range"),
        (["--dataset", "nothere"], "nothere"),
        (["--reward_model", "nothere"], "nothere"),
    ):
        done = run_script("evaluate.py", *SMALL, *words, "--output_dir", "out/none", cwd=world)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and line.startswith("error: ") and said in line
        assert not list((world / "out").glob("none/*"))


def test_runs_must_agree_on_what_is_not_given():
    runs = [{"temperature": 1.0, "model": "out/sft"}, {"temperature": 0.5, "model": "./out/sft/"}]
    others = {"reward_model": "r", "prompt_length": 8, "response_length": 8, "missing_eos_penalty": 0.0}
    with pytest.raises(SystemExit, match="the runs must have one temperature, but have .*give --temperature"):
        evaluate.take_settings(runs, evaluate.Args(**others))
    args = evaluate.Args(**others, temperature=1.0)
    evaluate.take_settings(runs, args)
    assert args.model == "out/sft" and args.missing_eos_penalty == 0.0
    runs[0]["reward_model"] = None  # offline DPO may have none
    args.reward_model = None
    with pytest.raises(SystemExit, match=r"must have one reward_model, but have \[\]; give --reward_model"):
        evaluate.take_settings(runs, args)
    evaluate.take_settings([*runs, {"reward_model": "out/rm"}], args)
    assert args.reward_model == "out/rm"


def test_names_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="run p3o.py first"):
        evaluate.find_runs([])
    for name, arguments in {
        "a/p3o": {"beta": 1},
        "b/p3o": {"beta": 1},
        "out/sft": {"beta": 1},
        "out/x": {},
    }.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "args.json").write_text(json.dumps({"args": arguments}))
        (tmp_path / name / "model.safetensors").touch()
    folders = evaluate.find_runs(["a/p3o", "b/p3o/", "./a/p3o"])[0]
    assert folders == {"a/p3o": "a/p3o", "b/p3o": "b/p3o"}
    assert evaluate.find_runs([])[0] == {"out/sft": "out/sft"}  # "sft" is the SFT model
    assert evaluate.find_runs(["a/p3o"]) == ({"p3o": "a/p3o"}, {"a/p3o": {"beta": 1}})
    (tmp_path / "a/p3o/model.safetensors").unlink()  # a run that has saved nothing yet
    with pytest.raises(SystemExit, match="a/p3o holds no policy"):
        evaluate.find_runs(["a/p3o"])
