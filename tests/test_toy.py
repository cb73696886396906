"""toy.py: the gold reward against hand-made values and a naive second computation, and all it writes."""

import json
import math
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT, run_script

import toy

PROMPT = "please review the cafe and mention the coffee :"
GOOD = "i loved the lovely cafe because the great coffee was truly superb ."
KINDS = {
    "sft": {"prompt", "completion"},
    "preferences": {"prompt", "chosen", "rejected"},
    "prompts": {"prompt"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "toy"
    toy.main(toy.Args(output_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return {
        (kind, split): [json.loads(line) for line in (folder / kind / f"{split}.jsonl").open()]
        for kind in KINDS
        for split in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


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


# The gold reward


def sentiment(v):
    """3 tanh(v), written with exponentials."""
    return 3 * (math.exp(2 * v) - 1) / (math.exp(2 * v) + 1)


@pytest.mark.parametrize(
    "response, expected",
    [
        ("the cafe is nice .", sentiment(1) + 1.0),
        ("the cafe is very nice .", sentiment(1.5) + 1.0),
        ("the cafe is somewhat nice .", sentiment(0.5) + 1.0),
        ("the cafe is not nice .", sentiment(-1) + 1.0),
        ("the cafe is not awful .", sentiment(1) + 1.0),
        ("the zoo is awful .", sentiment(-1)),
        ("the zoo is old .", 0.0),
        ("i saw it .", 0.0),
        (GOOD, sentiment(1 + 1 + 1 + 1.5) + 2.0),
        ("the cafe is nice . the coffee was bad .", 2.0),
        ("the cafe is nice and nice .", sentiment(1) + 1.0 - 0.5),
        ("the cafe is nice . the cafe is not nice .", sentiment(1) + 1.0 - 1.0),
        ("the cafe is nice", -1.2),
        ("cafe the is nice . we loved it .", sentiment(1) - 1.2),
        ("the cafe is wow .", -1.2),
        ("i saw it . .", -1.2),
        (".", -1.2),
        ("", -1.2),
        ("   \n", -1.2),
        ("nice nice nice", -1.2 - 1.0),
        ("the bakery is old . the zoo is new . i saw it .", 0.0),
        ("the bakery is old . the zoo is new . i saw it . we found it .", -0.2 * 4),
    ],
)
def test_gold_reward_by_hand(response, expected):
    assert toy.quality(PROMPT, response) == pytest.approx(expected, abs=1e-12)
    assert toy.gold_reward(PROMPT, response) == toy.quality(PROMPT, response) + toy.prompt_offset(PROMPT)


def naive_phrase(words):
    """Consumes [adverb] adjective; None where there is none."""
    words = words[1:] if words and words[0] in toy.CLASSES["M"] else words
    return words[1:] if words and words[0] in toy.CLASSES["A"] else None


def naive_nouns(words):
    """Consumes determiner [adjective] noun."""
    if not words or words[0] not in toy.CLASSES["D"]:
        return None
    words = words[2:] if words[1:] and words[1] in toy.CLASSES["A"] else words[1:]
    return words[1:] if words and words[0] in toy.CLASSES["N"] else None


def naive_clauses(words):
    """Every way to consume one clause, as the list of what is left."""
    if words and words[0] in toy.CLASSES["P"]:
        if not words[1:] or words[1] not in toy.CLASSES["V"]:
            return []
        rest = words[3:] if words[2:] and words[2] == "it" else naive_nouns(words[2:])
        return [] if rest is None else [rest]
    rest = naive_nouns(words)
    if not rest or rest[0] not in toy.CLASSES["C"]:
        return []
    rest = naive_phrase(rest[1:])
    if rest is None:
        return []
    longer = naive_phrase(rest[1:]) if rest and rest[0] in ("and", "but") else None
    return [rest] if longer is None else [rest, longer]


def naive_sentence(words):
    """Recursive descent over the grammar, without regular expressions."""
    ends = naive_clauses(words)
    for rest in list(ends):
        if rest and rest[0] in toy.CLASSES["K"] + toy.CLASSES["B"]:
            ends += naive_clauses(rest[1:])
    return any(not rest or (len(rest) == 1 and rest[0] in toy.CLASSES["T"]) for rest in ends)


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
    positive = set(toy.ADJECTIVES[0] + toy.VERBS[0])
    negative = set(toy.ADJECTIVES[2] + toy.VERBS[2])
    content = positive | negative | set(toy.ADJECTIVES[1] + toy.VERBS[1] + toy.PLACES + toy.ASPECTS)
    said, v, broken, place, aspect = [], 0.0, 0, 0, 0
    for sentence, finished in sentences:
        good = finished and naive_sentence(sentence)
        broken += 0 if good else 1
        for i, word in enumerate(sentence):
            if good and word not in said:
                sign = (word in positive) - (word in negative)
                before = sentence[i - 1] if i else ""
                factor = {"not": -1, **{w: 1.5 for w in toy.STRONG}, **{w: 0.5 for w in toy.WEAK}}
                v += sign * factor.get(before, 1)
                place = place or (word in toy.PLACES and word in prompt.split())
                aspect = aspect or (word in toy.ASPECTS and word in prompt.split())
            if word in content:
                said.append(word)
    repeated = len(said) - len(set(said))
    relevance = bool(place) + bool(aspect)
    return sentiment(v) + relevance - 1.2 * broken - 0.5 * repeated - 0.2 * max(0, len(words) - 14)


def test_quality_agrees_with_a_naive_second_computation(rows):
    pairs = [(r["prompt"], r[key]) for r in rows["preferences", "test"] for key in ("chosen", "rejected")]
    rng = random.Random(0)
    words = list(toy.CLASS) + ["please", "unknown"]
    letters = list(toy.CLASSES)
    for prompt, _ in pairs[:400]:  # random words, and words of random classes with short sentences
        pairs.append((prompt, " ".join(rng.choices(words, k=rng.randrange(12)))))
        picks = [rng.choice(toy.CLASSES[rng.choice(letters)]) for _ in range(rng.randrange(12))]
        pairs.append((prompt, " ".join(picks)))
    for prompt, response in pairs:
        assert toy.quality(prompt, response) == pytest.approx(naive_quality(prompt, response), abs=1e-9), (
            response
        )


def test_grammar_agrees_with_recursive_descent():
    """On every string of up to 4 word classes, and on sentences with a class replaced, left out or put in."""
    letters = [letter for letter in toy.CLASSES if letter != "."]
    strings = ["".join(string) for length in range(1, 5) for string in product(letters, repeat=length)]
    rng = random.Random(0)
    for _ in range(3000):
        answer = toy.demonstrate("cafe", "coffee", rng).split(" . ")[0].removesuffix(" .")
        string = "".join(toy.CLASS[word] for word in answer.split())
        i = rng.randrange(len(string))
        edit = rng.choice([string[i], "", string[i] + rng.choice(letters), rng.choice(letters)])
        strings.append(string[:i] + edit + string[i + 1 :])
    accepted = 0
    for string in strings:
        expected = naive_sentence([toy.CLASSES[letter][0] for letter in string])
        assert (toy.SENTENCE.fullmatch(string) is not None) == expected, string
        accepted += expected
    assert 500 < accepted < 2900


@pytest.mark.parametrize(
    "response", ["", "???", "\ud800", "a\x00b", "." * 500, "<eos>", "the " * 3000, "Ünïcode 雨 ."]
)
def test_any_string_has_a_finite_reward(response):
    assert math.isfinite(toy.gold_reward(PROMPT, response))
    assert math.isfinite(toy.gold_reward(response, GOOD))
    assert toy.gold_reward(PROMPT, response) < toy.gold_reward(PROMPT, GOOD)


def test_what_must_lower_the_reward_does(rows):
    for row in rows["sft", "test"]:
        prompt, response = row["prompt"], row["completion"]
        gold = toy.gold_reward(prompt, response)
        first = response.split(" . ")[0].removesuffix(" .") + " ."
        said = {word for word in first.split() if toy.CLASS[word] in "NAV"}
        if response.endswith("."):
            if said:  # a sentence said again, an unfinished one, a word of no sentence
                assert toy.gold_reward(prompt, f"{response} {first}") < gold - 0.49 * len(said)
            assert toy.gold_reward(prompt, f"{response} the") < gold - 1.19
            assert toy.gold_reward(prompt, f"{response} nice .") < gold - 1.19
        if len(response.split()) > 14:
            assert toy.gold_reward(prompt, f"{response} i saw it .") < gold - 0.59
    best = toy.gold_reward(PROMPT, GOOD)
    for worse in [
        GOOD.replace("cafe", "zoo"),
        GOOD.replace("coffee", "staff"),
        GOOD.replace("loved", "hated"),
        GOOD.replace("superb", "awful"),
        GOOD.replace("the great", "great the"),
        GOOD.replace(" .", ""),
        "i loved the lovely cafe .",
        GOOD + " this friendly staff is very nice .",
    ]:
        assert toy.gold_reward(PROMPT, worse) < best - 0.02, worse


def test_sentiment_has_diminishing_returns():
    positive = [
        "i saw it .",
        "i loved it .",
        "i loved the nice zoo .",
        "i loved the nice zoo and we liked it .",
    ]
    scores = [toy.quality(PROMPT, response) for response in positive]
    gains = [after - before for before, after in zip(scores, scores[1:], strict=False)]
    assert all(gain > 0 for gain in gains) and gains == sorted(gains, reverse=True)


@pytest.mark.parametrize(
    "hack",
    [
        " ".join(toy.ADJECTIVES[0][:8]) + " .",
        " ".join(toy.ADJECTIVES[0]),
        "cafe coffee lovely great superb .",
        "nice . great . superb . lovely cafe . perfect coffee .",
        PROMPT,
        "the cafe coffee is nice great superb .",
        "the cafe is nice and great and superb and lovely and perfect coffee .",
        "i loved it . " * 5,
        "the cafe is very nice . " * 4,
        "i loved it . we liked it . they enjoyed it . everyone admired it .",
        "the cafe is nice . the coffee is great . the staff is lovely . the view is superb . we liked it .",
    ],
)
def test_cheap_tricks_score_clearly_below_a_good_answer(hack):
    assert toy.gold_reward(PROMPT, hack) < toy.gold_reward(PROMPT, GOOD) - 1


def test_the_offset_cancels_in_differences_and_is_wide(rows):
    prompts = sorted({row["prompt"] for split in rows.values() for row in split})
    offsets = [toy.prompt_offset(prompt) for prompt in prompts]
    assert len(set(offsets)) == len(prompts) > 3000
    assert statistics.pstdev(offsets) == pytest.approx(7, rel=0.05)
    assert statistics.mean(offsets) == pytest.approx(0, abs=0.3)
    assert toy.prompt_offset(PROMPT) == toy.prompt_offset(" " + PROMPT.replace(" :", ":"))
    within = []
    rng = random.Random(0)
    for prompt in prompts[::60]:
        place, aspect = (next(w for w in prompt.split() if w in known) for known in (toy.PLACES, toy.ASPECTS))
        answers = [toy.demonstrate(place, aspect, rng) for _ in range(64)]
        golds = [toy.gold_reward(prompt, answer) for answer in answers]
        within.append(statistics.pstdev(golds))
        difference = toy.quality(prompt, answers[0]) - toy.quality(prompt, answers[1])
        assert golds[0] - golds[1] == pytest.approx(difference, abs=1e-12)
    assert 2.0 < statistics.mean(within) < 2.6
    assert statistics.pstdev(offsets) > 2.5 * statistics.mean(within)


def test_the_offset_never_changes():
    """Python's own hash() differs between processes; these were computed once."""
    assert toy.prompt_offset(PROMPT) == pytest.approx(1.58083641628557, abs=1e-12)


# What is written


def test_another_process_writes_the_same_bytes(folder, tmp_path):
    """The command itself, with another hash seed and from another directory."""
    command = [sys.executable, str(ROOT / "toy.py"), "--output_dir", "again"]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert contents(tmp_path / "again") == contents(folder)
    expected = "wrote model and rows (19000 sft, 22000 preferences, 2816 prompts) to again (seed 0)\n"
    assert run.stdout == expected and expected.replace("again", "data/toy") in toy.__doc__
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_seeds_differ(tmp_path, monkeypatch):
    small_build(monkeypatch)
    for seed in (0, 1):
        toy.main(toy.Args(output_dir=str(tmp_path / str(seed)), seed=seed))
    first, second = contents(tmp_path / "0"), contents(tmp_path / "1")
    same = {name for name in first if first[name] == second[name]}
    fixed = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert same == {f"model/{name}" for name in fixed}


def test_folders_load_with_datasets(folder, rows, tmp_path):
    from datasets import load_dataset

    for kind, columns in KINDS.items():
        loaded = load_dataset(str(folder / kind), cache_dir=str(tmp_path))
        for split in ("train", "validation", "test"):
            assert set(loaded[split].column_names) == columns
            assert loaded[split].to_list() == rows[kind, split]


def test_sizes_and_disjoint_splits(rows):
    sizes = {key: len(value) for key, value in rows.items()}
    assert sizes["sft", "train"] == 18000 and sizes["preferences", "train"] == 20000
    prompts = {split: {r["prompt"] for kind in KINDS for r in rows[kind, split]} for split in toy.SPLITS}
    assert not prompts["test"] & prompts["train"] and not prompts["test"] & prompts["validation"]
    assert not prompts["train"] & prompts["validation"]
    for split in toy.SPLITS:
        texts = [row["prompt"] for row in rows["prompts", split]]
        assert len(texts) == len(set(texts))


def test_token_lengths_and_round_trip(rows, tokenizer):
    responses, prompts = set(), set()
    for split in rows.values():
        for row in split:
            prompts.add(row["prompt"])
            responses.update(row[key] for key in ("completion", "chosen", "rejected") if key in row)
    for texts, low, high in ((prompts, 5, 16), (responses, 4 - 1, 24 - 1)):  # the EOS is not in the text
        texts = sorted(texts)
        ids = tokenizer(texts).input_ids
        assert {len(row) for row in ids} <= set(range(low, high + 1))
        assert tokenizer.batch_decode(ids) == texts
        assert not any(tokenizer.unk_token_id in row for row in ids)
    assert {len(text.split()) for text in responses} == set(range(3, 24))


def test_tokenizer(tokenizer):
    assert 170 <= len(tokenizer) <= 230
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert set(toy.CLASS) < set(tokenizer.get_vocab())
    ids = tokenizer("the cafe is nice.").input_ids  # no special token by itself, punctuation apart
    assert tokenizer.decode(ids + [tokenizer.eos_token_id]) == "the cafe is nice . <eos>"
    assert tokenizer.decode(ids + [tokenizer.eos_token_id], skip_special_tokens=True) == "the cafe is nice ."
    assert tokenizer("the qwerty").input_ids == [ids[0], tokenizer.unk_token_id]
    assert tokenizer.convert_ids_to_tokens(tokenizer(f"{PROMPT}the").input_ids)[-2:] == [":", "the"]
    assert list(map(tokenizer.decode, tokenizer(GOOD).input_ids)) == toy.split_words(GOOD)
    assert len(toy.CLASS) == sum(len(words) for words in toy.CLASSES.values())  # one class a word


def test_the_untrained_model_is_small_and_without_dropout(folder, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = model.config
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert 400_000 < sum(weights.numel() for weights in model.parameters()) < 600_000
    assert [config.resid_pdrop, config.embd_pdrop, config.attn_pdrop, config.summary_first_dropout] == [0] * 4
    assert (config.n_layer, config.n_head, config.n_positions) == (2, 4, 64)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert config.vocab_size == len(tokenizer)
    torch.manual_seed(0)  # the seed of the folder: the weights are those that transformers draws after it
    again = AutoModelForCausalLM.from_config(config).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.06, rel=0.02)


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


def test_identical_answers_make_no_pair(monkeypatch):
    monkeypatch.setattr(
        toy, "demonstrate", lambda place, aspect, rng: rng.choice(["i saw it .", "we saw it ."])
    )
    made = toy.make_rows("preferences", [(PROMPT, "cafe", "coffee")], 50, random.Random(0))
    assert len(made) == 50 and all(row["chosen"] != row["rejected"] for row in made)


def test_demonstrators_leave_room_and_support_for_improvement():
    rng = random.Random(0)
    gains, on_topic, broken = [], [], []
    for _ in range(100):
        place, aspect = rng.choice(toy.PLACES), rng.choice(toy.ASPECTS)
        prompt = f"describe the {place} and note the {aspect} :"
        answers = [toy.demonstrate(place, aspect, rng) for _ in range(64)]
        scores = [toy.quality(prompt, answer) for answer in answers]
        gains.append(max(scores) - statistics.mean(scores))
        on_topic += [place in answer.split() and aspect in answer.split() for answer in answers]
        broken += [not all(naive_sentence(s.split()) for s in answer.split(" . ")[:-1]) for answer in answers]
    assert statistics.mean(gains) > 1.9
    assert 0.15 < statistics.mean(on_topic) < 0.7
    assert 0.005 < statistics.mean(broken) < 0.4


# Refusals


def test_a_second_run_writes_nothing(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    toy.main(toy.Args(output_dir=str(folder)))
    out = capsys.readouterr().out
    assert out.startswith("nothing to do: ") and out.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_arguments_foreign_and_missing_files(tmp_path, monkeypatch):
    small_build(monkeypatch)
    target = tmp_path / "toy"
    args = toy.Args(output_dir=str(target))
    target.mkdir()  # an empty folder may be used
    toy.main(args)
    first = contents(target)

    other = toy.Args(output_dir=str(target), seed=1)
    refused(lambda: toy.main(other), "--overwrite", "seed (0)")
    assert contents(target) == first
    toy.main(toy.Args(output_dir=str(target), seed=1, overwrite=True))
    assert contents(target) != first and json.loads((target / "args.json").read_text())["seed"] == 1
    toy.main(toy.Args(output_dir=str(target), overwrite=True))
    assert contents(target) == first

    (target / "sft" / "test.jsonl").unlink()
    refused(lambda: toy.main(args), "incomplete", "--overwrite")
    toy.main(toy.Args(output_dir=str(target), overwrite=True))
    assert contents(target) == first

    (target / "sft" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        again = toy.Args(output_dir=str(target), overwrite=overwrite)
        refused(lambda again=again: toy.main(again), "did not write", "--output_dir")
    assert (target / "sft" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"script": "sft.py"}', '{"script": "toy.py", "seed": 0}', "not json"]
)
def test_a_folder_of_somebody_else_is_never_touched(tmp_path, text):
    (tmp_path / "args.json").write_text(text)
    refused(lambda: toy.main(toy.Args(output_dir=str(tmp_path), overwrite=True)), "did not write")
    assert contents(tmp_path) == {"args.json": text.encode()}


def test_unwritable_targets(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/below"):
        args = toy.Args(output_dir=str(tmp_path / name), overwrite=True)
        refused(lambda args=args: toy.main(args), "--output_dir")
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("kind", ["FIFO", "socket", "dangling link", "device"])
def test_a_path_that_is_no_folder_is_never_touched(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    if kind == "FIFO":
        os.mkfifo("out")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("out")
    else:  # a device by a link, so that no mistake can harm it
        os.symlink("nowhere" if kind == "dangling link" else "/dev/null", "out")
    before = os.lstat("out")
    for overwrite in (False, True):
        refused(lambda over=overwrite: toy.main(toy.Args(output_dir="out", overwrite=over)), "is no folder")
    after = os.lstat("out")
    assert (before.st_ino, before.st_mode, before.st_mtime_ns) == (
        after.st_ino,
        after.st_mode,
        after.st_mtime_ns,
    )
    assert os.listdir() == ["out"]


def killed(args, module, name, calls):
    """Runs toy.py's main in a fork, which is killed at this call of a function. Returns the exit code."""

    def main(seen=[], real=getattr(module, name)):
        def stop(*args):
            seen.append(args)
            if len(seen) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(module, name, stop)
        toy.main(args)

    process = multiprocessing.get_context("fork").Process(target=main, daemon=True)
    process.start()
    process.join(100)
    return process.exitcode


@pytest.mark.parametrize(
    "module, name, calls", [(toy, "make_rows", 5), (os, "replace", 1), (os, "replace", 6)]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_moment(module, name, calls, overwrite, tmp_path, monkeypatch):
    """Old or new files stand in their place, and the next run leaves one set of them and nothing else."""
    small_build(monkeypatch)
    for seed in (0, 1):
        toy.main(toy.Args(str(tmp_path / str(seed)), seed=seed))
    sets = [contents(tmp_path / str(seed)) for seed in (0, 1)]
    (tmp_path / "run").mkdir()
    out = tmp_path / "run" / "toy"
    if overwrite:
        toy.main(toy.Args(str(out), seed=0))
    assert killed(toy.Args(str(out), 1, overwrite), module, name, calls) == -signal.SIGKILL
    left = contents(out)
    for path in sets[0] if overwrite else []:
        assert left[path] in (sets[0][path], sets[1][path]), path
    assert os.listdir(tmp_path / "run") == ["toy"], "nothing hidden"
    if overwrite and module is toy:
        toy.main(toy.Args(str(out), seed=0))  # nothing to do
        assert contents(out) == sets[0]
    toy.main(toy.Args(str(out), seed=1, overwrite=overwrite and module is toy))
    assert contents(out) == sets[1] and {path.name for path in out.iterdir()} == {
        "args.json",
        "model",
        *KINDS,
    }


@pytest.mark.parametrize(
    "argv", [["--sed", "1"], ["--over"], ["extra"], ["--seed", "x"], ["--seed"], ["--seed", "-1"]]
)
def test_bad_command_lines(argv, tmp_path):
    done = run_script("toy.py", *argv, cwd=tmp_path)
    assert done.returncode in (1, 2) and "error: " in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_command(tmp_path, monkeypatch, capsys):
    small_build(monkeypatch)
    monkeypatch.chdir(tmp_path)
    toy.main(toy.Args(seed=3))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "wrote model and rows (30 sft, 30 preferences, 30 prompts) to data/toy (seed 3)"
    assert json.loads(Path("data/toy/args.json").read_text())["seed"] == 3
