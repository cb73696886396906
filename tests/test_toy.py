"""toy.py: the gold reward against hand-made values and a naive second computation, and all it writes."""

import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import toy

PROMPT = "please review the cafe and mention the coffee :"
GOOD = "i loved the lovely cafe because the great coffee was truly superb ."
KINDS = {
    "sft": ["prompt", "completion"],
    "preferences": ["prompt", "chosen", "rejected"],
    "prompts": ["prompt"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "toy"
    toy.main(toy.Args(output_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    places = [(kind, split) for kind in KINDS for split in toy.SPLITS]
    return {x: [json.loads(line) for line in (folder / x[0] / f"{x[1]}.jsonl").open()] for x in places}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small_build(monkeypatch):
    monkeypatch.setattr(toy, "ROWS", {kind: (20, 5, 5) for kind in toy.ROWS})


def refused(action, *words):
    with pytest.raises(SystemExit) as exit_info:
        action()
    error = exit_info.value.code
    assert error.startswith("error: ") and "\n" not in error and "; " in error
    assert all(word in error for word in words), error


def sentiment(v):
    return 3 * (math.exp(2 * v) - 1) / (math.exp(2 * v) + 1)


PHRASES, NOUNS = ["A", "MA"], ["DN", "DAN"]
CLAUSES = ["PV" + object for object in [*NOUNS, "O"]]
CLAUSES += [noun + "C" + phrase + more for noun in NOUNS for phrase in PHRASES for more in ["", "KA", "KMA"]]
PAIRS = [first + link + second for first in CLAUSES for link in "KB" for second in CLAUSES]
SENTENCES = {words + end for words in CLAUSES + PAIRS for end in ["", "T"]}  # all 930, in word classes


def naive_quality(prompt, response):
    words = response.split()
    sentences, current = [], []
    for word in words + [None]:
        if word in (".", None):
            if word == "." or current or not words:
                sentences.append((current, word == "."))
            current = []
        else:
            current.append(word)
    positive, negative = (set(toy.ADJECTIVES[i] + toy.VERBS[i]) for i in (0, 2))
    content = positive | negative | set(toy.ADJECTIVES[1] + toy.VERBS[1] + toy.PLACES + toy.ASPECTS)
    factors = {"not": -1} | dict.fromkeys(toy.STRONG, 1.5) | dict.fromkeys(toy.WEAK, 0.5)
    said, v, broken, topics = [], 0.0, 0, set()
    for sentence, finished in sentences:
        good = finished and "".join(toy.CLASS.get(word, "?") for word in sentence) in SENTENCES
        broken += 0 if good else 1
        for before, word in zip(["", *sentence], sentence):
            if good and word not in said:
                v += ((word in positive) - (word in negative)) * factors.get(before, 1)
                asked = word in prompt.split()
                topics |= {name for name in ("PLACES", "ASPECTS") if asked and word in getattr(toy, name)}
            if word in content:
                said.append(word)
    repeated, relevance = len(said) - len(set(said)), len(topics)
    return sentiment(v) + relevance - 1.2 * broken - 0.5 * repeated - 0.2 * max(0, len(words) - 14)


def test_quality_agrees_with_a_naive_second_computation(rows):
    """On written rows, random words, and words of random classes with short sentences; a few by hand."""
    assert toy.quality(PROMPT, "the cafe is not nice .") == pytest.approx(sentiment(-1) + 1.0)
    assert toy.quality(PROMPT, GOOD) == pytest.approx(sentiment(1 + 1 + 1 + 1.5) + 2.0)
    assert toy.quality(PROMPT, "nice nice nice") == pytest.approx(-1.2 - 1.0)
    assert toy.gold_reward(PROMPT, GOOD) == toy.quality(PROMPT, GOOD) + toy.prompt_offset(PROMPT)
    pairs = [(r["prompt"], r[key]) for r in rows["preferences", "test"] for key in ("chosen", "rejected")]
    pairs += [(PROMPT, "   \n"), (PROMPT, "the cafe is nice and nice ."), (PROMPT, "cafe the is nice .")]
    rng = random.Random(0)
    words, letters = [*toy.CLASS, "please", "unknown"], list(toy.CLASSES)
    for prompt, _ in pairs[:400]:
        pairs.append((prompt, " ".join(rng.choices(words, k=rng.randrange(12)))))
        picks = [rng.choice(toy.CLASSES[rng.choice(letters)]) for _ in range(rng.randrange(12))]
        pairs.append((prompt, " ".join(picks)))
    for pair in pairs:
        assert toy.quality(*pair) == pytest.approx(naive_quality(*pair), abs=1e-9), pair


def test_grammar():
    """No other string of up to 4 word classes is a sentence, and none where one is put in, left out or replaced."""
    letters = [letter for letter in toy.CLASSES if letter != "."]
    strings = {"".join(s) for n in range(1, 5) for s in itertools.product(letters, repeat=n)}
    edits = [(s[:i], s[j:]) for s in SENTENCES for i in range(len(s)) for j in (i, i + 1)]
    strings |= {before + new + after for before, after in edits for new in ["", *letters]}
    assert {s for s in strings if toy.SENTENCE.fullmatch(s)} == SENTENCES and len(SENTENCES) == 930


def test_any_string_has_a_finite_reward_and_cheap_tricks_a_low_one():
    for response in ["", "???", "\ud800", "a\x00b", "." * 500, "<eos>", "the " * 3000, "Ünïcode 雨 ."]:
        assert math.isfinite(toy.gold_reward(response, GOOD))
        assert -math.inf < toy.gold_reward(PROMPT, response) < toy.gold_reward(PROMPT, GOOD)
    tricks = " ".join(toy.ADJECTIVES[0][:8]) + " .", PROMPT, "the cafe is very nice . " * 4
    tricks += ("nice . great . superb . lovely cafe . perfect coffee .",)
    tricks += ("i loved it . we liked it . they enjoyed it . everyone admired it .",)
    for trick in tricks:
        assert toy.gold_reward(PROMPT, trick) < toy.gold_reward(PROMPT, GOOD) - 1, trick


def test_the_offset_is_wide(rows):
    """And fixed: Python's own hash() differs between processes; the number was computed once."""
    assert toy.prompt_offset(PROMPT) == pytest.approx(1.58083641628557, abs=1e-12)
    assert toy.prompt_offset(PROMPT) == toy.prompt_offset(" " + PROMPT.replace(" :", ":"))
    prompts = sorted({row["prompt"] for split in rows.values() for row in split})
    offsets = [toy.prompt_offset(prompt) for prompt in prompts]
    assert len(set(offsets)) == len(prompts) > 3000
    assert statistics.pstdev(offsets) == pytest.approx(7, rel=0.05)
    assert statistics.mean(offsets) == pytest.approx(0, abs=0.3)


def test_another_process_writes_the_same_bytes(folder, tmp_path):
    """The command itself, with another hash seed and from another directory."""
    command = [sys.executable, str(ROOT / "toy.py"), "--output_dir", "again"]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert contents(tmp_path / "again") == contents(folder)
    expected = "wrote model and rows (19000 sft, 22000 preferences, 2816 prompts) to again (seed 0)\n"
    assert run.stdout == expected and expected.replace("again", "data/toy") in toy.__doc__
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_rows(folder, rows, tmp_path):
    """load_dataset reads them; the splits share no prompt; each text becomes tokens and back."""
    for kind, columns in KINDS.items():
        loaded = load_dataset(str(folder / kind), cache_dir=str(tmp_path))
        for split in toy.SPLITS:
            assert loaded[split].column_names == columns and loaded[split].to_list() == rows[kind, split]
    prompts = [{r["prompt"] for kind in KINDS for r in rows[kind, split]} for split in toy.SPLITS]
    assert len(set.union(*prompts)) == sum(map(len, prompts))
    responses = {text for split in rows.values() for r in split for key, text in r.items() if key != "prompt"}
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for texts, low, high in ((set.union(*prompts), 5, 16), (responses, 3, 23)):  # EOS is not in the text
        ids = tokenizer(sorted(texts)).input_ids
        assert low <= min(map(len, ids)) and max(map(len, ids)) <= high
        assert tokenizer.batch_decode(ids) == sorted(texts)
        assert not any(tokenizer.unk_token_id in row for row in ids)


def test_model(folder):
    """The words of the grammar have a token and a class each; the model is small, untrained and without dropout."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("the cafe is nice.").input_ids  # no special token by itself, punctuation apart
    assert tokenizer.decode(ids + [tokenizer.eos_token_id], skip_special_tokens=True) == "the cafe is nice ."
    assert tokenizer("the qwerty").input_ids == [ids[0], tokenizer.unk_token_id]
    assert set(toy.CLASS) < set(tokenizer.get_vocab())
    assert len(toy.CLASS) == sum(len(words) for words in toy.CLASSES.values())
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = model.config
    assert 400_000 < sum(weights.numel() for weights in model.parameters()) < 600_000
    assert [config.resid_pdrop, config.embd_pdrop, config.attn_pdrop, config.summary_first_dropout] == [0] * 4
    ids = tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id, config.vocab_size) == ids and len(set(ids)) == 3
    torch.manual_seed(0)  # the seed of the folder: the weights are those that transformers draws after it
    again = AutoModelForCausalLM.from_config(config).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_labels_are_bradley_terry_on_the_gold_reward(rows):
    """In each bin of the gold difference, the labels' frequency agrees within 4 standard errors."""
    bins, total = {}, 0.0
    for split in toy.SPLITS:
        for row in rows["preferences", split]:
            assert row["chosen"] != row["rejected"]
            a, b = sorted([row["chosen"], row["rejected"]])  # an order that knows nothing of the label
            difference = toy.gold_reward(row["prompt"], a) - toy.gold_reward(row["prompt"], b)
            probability = 1 / (1 + math.exp(-difference))
            bins.setdefault(math.floor(probability * 10), []).append((probability, row["chosen"] == a))
            total += max(probability, 1 - probability)
    assert len(bins) == 10
    for pairs in bins.values():
        expected = statistics.mean(probability for probability, _ in pairs)
        error = math.sqrt(sum(p * (1 - p) for p, _ in pairs)) / len(pairs)
        assert abs(statistics.mean(won for _, won in pairs) - expected) < 4 * error
        assert len(pairs) < 100 or error < 0.05
    assert 0.65 < total / 22000 < 0.85  # noisy labels: what a perfect judge agrees with


def test_second_runs_other_arguments_foreign_and_missing_files(tmp_path, monkeypatch, capsys):
    small_build(monkeypatch)
    target = tmp_path / "toy"

    def run(seed=0, overwrite=False):
        toy.main(toy.Args(str(target), seed, overwrite))

    target.mkdir()  # an empty folder may be used
    run()
    first, times = contents(target), {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    run()
    assert "nothing to do: " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == times
    refused(lambda: run(seed=1), "--overwrite", "seed (0)")
    run(seed=1, overwrite=True)
    assert contents(target) != first
    (target / "sft" / "test.jsonl").unlink()
    refused(lambda: run(seed=1), "incomplete", "--overwrite")
    run(overwrite=True)
    assert contents(target) == first
    (target / "sft" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        refused(lambda over=overwrite: run(overwrite=over), "did not write", "--output_dir")
    assert contents(target) == first | {"sft/notes.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_what_somebody_else_wrote_is_never_touched(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for text in ("", "[]", '{"script": "sft.py"}', '{"script": "toy.py", "seed": 0}'):
        (tmp_path / "args.json").write_text(text)
        for name, words in (("", "did not write"), ("args.json", "is no folder"), ("link", "is no folder")):
            refused(lambda at=name: toy.main(toy.Args(str(tmp_path / at), overwrite=True)), words)
        assert contents(tmp_path) == {"args.json": text.encode()} and os.path.lexists(tmp_path / "link")


@pytest.mark.parametrize(
    "module, name, calls", [(toy, "make_rows", 5), (os, "replace", 1), (os, "replace", 6)]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_moment(module, name, calls, overwrite, tmp_path, monkeypatch):
    """Old or new files stand in their place, and the next run leaves one set of them and nothing else."""
    small_build(monkeypatch)
    for seed in (0, 1):
        toy.main(toy.Args(str(tmp_path / str(seed)), seed=seed))
    old, new = (contents(tmp_path / str(seed)) for seed in (0, 1))
    out = tmp_path / "run" / "toy"
    if overwrite:
        toy.main(toy.Args(str(out), seed=0))

    def killed(count=itertools.count(1), real=getattr(module, name)):
        kill = functools.partial(os.kill, os.getpid(), 9)
        setattr(module, name, lambda *args: real(*args) if next(count) < calls else kill())
        toy.main(toy.Args(str(out), 1, overwrite))

    process = multiprocessing.get_context("fork").Process(target=killed, daemon=True)
    process.start()
    process.join(100)
    assert process.exitcode == -9 and os.listdir(tmp_path / "run") == ["toy"], "nothing hidden"
    left = contents(out)
    assert not overwrite or all(left[path] in (old[path], new[path]) for path in old)
    assert not overwrite or module is os or all(left[path] == old[path] for path in old)
    toy.main(toy.Args(str(out), seed=1, overwrite=overwrite and module is toy))
    assert contents(out) == new and set(os.listdir(out)) == {"args.json", "model", *KINDS}
