"""The embedded task: a small world of place reviews whose true ("gold") reward is known.

    python toy.py

takes a few seconds on one CPU core and downloads nothing; its last line:
    wrote model and rows (19000 sft, 22000 preferences, 2816 prompts) to data/toy (seed 0)

model/                                      a tokenizer and an untrained GPT-2 of 0.4M parameters
sft/{train,validation,test}.jsonl           {"prompt", "completion"}
preferences/{train,validation,test}.jsonl   {"prompt", "chosen", "rejected"}
prompts/{train,validation,test}.jsonl       {"prompt"}

A prompt asks for a review of a place that mentions one aspect; demonstrators of mixed quality answer. Labels
compare two answers by Bradley-Terry on the gold reward, P(y1 preferred) = sigmoid(gold(y1) - gold(y2)), so a
prompt's offset, P3O's delta(x) (arXiv:2310.00212), never shows. Train, validation and test share no prompt.

gold_reward    the reward that real RLHF can only guess = quality + prompt_offset
quality        the part that labels see: sentiment, relevance and form; SENTENCE is the grammar
prompt_offset  delta(x), the part that they cannot see
demonstrate    one answer of a random demonstrator          make_rows, make_model, build    the files
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, PreTrainedTokenizerFast, logging


@dataclass
class Args:
    output_dir: str = field(default="data/toy", metadata={"help": "folder for the model and the rows"})
    seed: int = field(default=0, metadata={"help": "seed of all random draws, at least 0"})
    overwrite: bool = field(default=False, metadata={"help": "replace what toy.py wrote there before"})


# The world and its gold reward

PLACES = """bakery beach bookshop cafe castle church cinema farm gallery garden gym harbor hotel library
    market museum palace park pub restaurant school station theater tower zoo""".split()
ASPECTS = """atmosphere coffee crowd decor design entrance floor food furniture kitchen lighting location menu
    music parking price service staff terrace view""".split()
ADJECTIVES = [  # positive, neutral, negative; in each list the most frequent word comes first
    """good great nice lovely clean friendly excellent pleasant beautiful charming amazing perfect fantastic
    delightful cheerful enjoyable inviting impressive brilliant superb marvelous""".split(),
    """small big old new quiet simple normal local plain modern large ordinary usual common familiar typical
    average standard""".split(),
    """bad poor boring dirty awful terrible ugly dull nasty gloomy horrible annoying unfriendly disappointing
    unpleasant lousy mediocre dreadful depressing grim dismal miserable""".split(),
]
VERBS = [  # positive, neutral, negative
    "loved liked enjoyed recommended admired appreciated praised adored".split(),
    "visited saw found tried noticed remembered checked".split(),
    "hated disliked avoided regretted mocked despised resented".split(),
]
VALUE = {word: 1.0 for word in ADJECTIVES[0] + VERBS[0]} | {word: -1.0 for word in ADJECTIVES[2] + VERBS[2]}
STRONG, WEAK = "very really truly extremely remarkably".split(), "rather fairly somewhat slightly".split()
MODIFIER = {word: 1.5 for word in STRONG} | {word: 0.5 for word in WEAK} | {"not": -1.0}
CLASSES = {  # the word classes, one letter each, that the grammar is written in
    "D": ["the", "this", "that"],
    "N": PLACES + ASPECTS,
    "C": ["is", "was", "seems", "felt", "looked", "seemed"],
    "M": list(MODIFIER),
    "A": sum(ADJECTIVES, []),
    "P": ["i", "we", "they", "everyone"],
    "V": sum(VERBS, []),
    "O": ["it"],
    "K": ["and", "but"],
    "B": ["because", "while", "although", "so"],
    "T": ["today", "yesterday", "recently", "again"],
    ".": ["."],
}
CLASS = {word: letter for letter, words in CLASSES.items() for word in words}
# that [old] cafe is [very] nice [and [very] clean]; i loved (it or that [old] cafe)
CLAUSE = "(DA?NCM?A(KM?A)?|PV(DA?N|O))"
SENTENCE = re.compile(f"{CLAUSE}([KB]{CLAUSE})?T?")  # clause [because clause] [today], without the full stop
OPENINGS = ["please review the {}", "tell me about the {}", "write about the {}", "describe the {}"]
ENDINGS = ["and mention the {} :", "and note the {} :", "with a word on the {} :"]


def split_words(text: str) -> list[str]:
    """Words and runs of punctuation, cut where the tokenizer cuts."""
    return re.findall(r"\w+|[^\w\s]+", text)


def quality(prompt: str, response: str) -> float:
    """The part of the gold reward that labels see; its spread over the answers to a prompt is about 2.3.

    3 tanh(v) + place + aspect - 1.2 broken - 0.5 repeated - 0.2 max(0, words - 14), where
    v              sums VALUE times the MODIFIER just before (1 if none) over words said for the first time;
    place, aspect  are 1 if the one that the prompt names is named, else 0;
    broken         counts the stretches up to a full stop or the end that are no SENTENCE with its full stop;
    repeated       counts nouns, adjectives and verbs said before;    words counts full stops too, EOS not.
    Broken stretches earn nothing in v, place and aspect. An empty response is one broken stretch.
    """
    words = split_words(response)
    v, broken, repeated, named, said = 0.0, int(not words), 0, set(), set()
    letters = "".join(CLASS.get(word, "?") for word in words)
    start = 0
    while start < len(words):
        stop = letters.find(".", start)
        complete = stop > start and SENTENCE.fullmatch(letters, start, stop) is not None
        stop = len(words) if stop < 0 else stop
        broken += not complete
        for i in range(start, stop):
            word = words[i]
            if word in said:
                repeated += 1
            elif letters[i] in "NAV":
                said.add(word)
                if complete:
                    named.add(word)
                    v += VALUE.get(word, 0.0) * MODIFIER.get(words[i - 1], 1.0)
        start = stop + 1
    asked = named.intersection(split_words(prompt))
    relevance = (not asked.isdisjoint(PLACES)) + (not asked.isdisjoint(ASPECTS))
    score = 3 * math.tanh(v) + relevance
    return score - 1.2 * broken - 0.5 * repeated - 0.2 * max(0, len(words) - 14)


def prompt_offset(prompt: str) -> float:
    """delta(x): a normal draw of standard deviation 7, fixed by the words of the prompt (SHA-256)."""
    digest = hashlib.sha256(" ".join(split_words(prompt)).encode("utf-8", "surrogatepass")).digest()
    return NormalDist(0.0, 7.0).inv_cdf((int.from_bytes(digest[:6], "big") + 0.5) / 2**48)


def gold_reward(prompt: str, response: str) -> float:
    """quality + prompt_offset, for any two strings (the response without special tokens)."""
    return quality(prompt, response) + prompt_offset(prompt)


# Demonstrators like the place, are indifferent or dislike it; 1 in 10 writes badly. Share of the answers;
# chance that a noun is the one asked for; chances of a positive, neutral and negative word; chance that a
# sentence is said twice; chance that it loses, doubles or swaps a word.
DEMONSTRATORS = {
    "positive": (0.32, 0.95, (1, 0, 0), 0.0, 0.0),
    "neutral": (0.32, 0.95, (0, 1, 0), 0.0, 0.0),
    "negative": (0.26, 0.95, (0, 0, 1), 0.0, 0.0),
    "off-topic": (0.04, 0.2, (0.4, 0.3, 0.3), 0.0, 0.0),
    "repetitive": (0.03, 0.9, (0.4, 0.3, 0.3), 0.6, 0.0),
    "careless": (0.03, 0.9, (0.4, 0.3, 0.3), 0.0, 0.7),
}


def frequent(words: list[str], rng: random.Random) -> str:
    """A word by Zipf's law: the r-th of the list with a probability proportional to 1 / r^2."""
    return rng.choices(words, [rank**-2 for rank in range(1, len(words) + 1)])[0]


def make_clause(asked: str, on_topic: float, mood: tuple, rng: random.Random) -> list[str]:
    """The words of one random CLAUSE, about the noun asked for with probability on_topic."""

    def pick(words_by_mood: list) -> str:
        return frequent(rng.choices(words_by_mood, mood)[0], rng)

    noun = asked if rng.random() < on_topic else frequent(PLACES if asked in PLACES else ASPECTS, rng)
    noun_phrase = [frequent(CLASSES["D"], rng)] + [pick(ADJECTIVES)] * (rng.random() < 0.05) + [noun]
    if rng.random() < 0.35:
        return [frequent(CLASSES["P"], rng), pick(VERBS)] + (["it"] if rng.random() < 0.2 else noun_phrase)
    words = noun_phrase + [frequent(CLASSES["C"], rng)]
    for link in [[], ["and"]][: 1 + (rng.random() < 0.05)]:
        words += link + [frequent(CLASSES["M"], rng)] * (rng.random() < 0.2) + [pick(ADJECTIVES)]
    return words


def demonstrate(place: str, aspect: str, rng: random.Random) -> str:
    """An answer of 3 to 23 words (4 to 24 tokens with the end of sequence) by a random demonstrator."""
    rows = list(DEMONSTRATORS.values())
    _, on_topic, mood, twice, slip = rng.choices(rows, [row[0] for row in rows])[0]
    words, asked = [], [place, aspect] * 4
    for _ in range(rng.choice([1, 2, 2])):
        sentence = make_clause(asked.pop(0), on_topic, mood, rng)
        if rng.random() < 0.05:
            conjunction = frequent(CLASSES["K"] + CLASSES["B"], rng)
            sentence += [conjunction] + make_clause(asked.pop(0), on_topic, mood, rng)
        sentence += [frequent(CLASSES["T"], rng)] * (rng.random() < 0.1) + ["."]
        sentence *= 1 + (rng.random() < twice)
        if rng.random() < slip:
            i = rng.randrange(len(sentence) - 1)
            a, b = sentence[i : i + 2]
            sentence[i : i + 2] = rng.choice([[b], [a, a, b], [b, a]])
        if len(words) + len(sentence) <= 23:
            words += sentence
    return " ".join(words) if words else demonstrate(place, aspect, rng)


# Files

SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}  # shares of the distinct prompts
ROWS = {"sft": (18000, 500, 500), "preferences": (20000, 1000, 1000), "prompts": (2048, 256, 512)}


def make_rows(kind: str, requests: list[tuple], count: int, rng: random.Random) -> list[dict]:
    """count rows of the kind for (prompt, place, aspect) requests; "prompts" takes each at most once."""
    if kind == "prompts":
        return [{"prompt": prompt} for prompt, _, _ in rng.sample(requests, count)]
    rows = []
    while len(rows) < count:
        prompt, place, aspect = rng.choice(requests)
        first, second = demonstrate(place, aspect, rng), demonstrate(place, aspect, rng)
        if kind == "sft":
            rows.append({"prompt": prompt, "completion": first})
        elif first != second:
            probability = 1 / (1 + math.exp(gold_reward(prompt, second) - gold_reward(prompt, first)))
            chosen, rejected = (first, second) if rng.random() < probability else (second, first)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def make_model() -> tuple[PreTrainedTokenizerFast, GPT2Config]:
    """The tokenizer, one token a word, and the config of the policy."""
    texts = [" ".join(OPENINGS + ENDINGS).replace("{}", "")] + [" ".join(words) for words in CLASSES.values()]
    vocabulary = ["<pad>", "<eos>", "<unk>"] + sorted({word for text in texts for word in split_words(text)})
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **special)
    sizes = dict(vocab_size=len(vocabulary), n_positions=64, n_embd=128, n_layer=2, n_head=4)
    dropouts = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0)
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    fused = dict(activation_function="gelu_pytorch_tanh")  # GPT-2's own, in one operation for eight
    # With the default range of 0.02, so narrow a model takes far longer to learn to copy from the prompt.
    return tokenizer, GPT2Config(**sizes, **dropouts, **ids, **fused, initializer_range=0.06)


def build(folder: Path, seed: int) -> None:
    """Writes every file of the task into an empty folder; args.json lists them."""
    tokenizer, config = make_model()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(seed)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")  # with random weights
    asked = [(place, aspect) for place in PLACES for aspect in ASPECTS]
    templates = [f"{opening} {ending}" for opening in OPENINGS for ending in ENDINGS]
    requests = [(template.format(*pair), *pair) for pair in asked for template in templates]
    random.Random(f"{seed} requests").shuffle(requests)
    end = 0
    for i, (split, share) in enumerate(SPLITS.items()):
        start, end = end, end + round(share * len(requests))
        for kind, counts in ROWS.items():
            rows = make_rows(kind, requests[start:end], counts[i], random.Random(f"{seed} {kind} {split}"))
            (folder / kind).mkdir(exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / kind / f"{split}.jsonl").write_text(lines, newline="\n")
    files = sorted(list_files(folder) | {"args.json"})
    (folder / "args.json").write_text(
        json.dumps({"script": "toy.py", "seed": seed, "files": files}, indent=2) + "\n"
    )


def list_files(folder: Path) -> set[str]:
    """Relative paths of everything in the folder that is not itself a folder."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {path.relative_to(folder).as_posix() for path in paths}


def read_written(folder: Path) -> dict:
    """Returns args.json of a folder in which toy.py wrote every file, and {} for any other folder."""
    try:
        written = json.loads((folder / "args.json").read_text())
        known = written["script"] == "toy.py" and list_files(folder) <= set(written["files"])
        return written if known else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def move_up(beside: Path) -> None:
    """Moves all files of a folder to the folder above it, one by one, and args.json last.

    An old or a new file stands in its place at every moment. After a kill, a second call moves the others.
    """
    for name in sorted(list_files(beside), key=lambda name: name == "args.json"):
        target = beside.parent / name
        target.parent.mkdir(exist_ok=True)
        os.replace(beside / name, target)
    shutil.rmtree(beside)


def check(condition, message):
    """Ends the program with a one-line error message if the condition does not hold."""
    if not condition:
        sys.exit(f"error: {message}")


def main(args: Args) -> None:
    check(args.seed >= 0, f"--seed is {args.seed}; give 0 or more")
    folder = Path(args.output_dir)
    check(folder.is_dir() or not os.path.lexists(folder), f"{folder} is no folder; give another --output_dir")
    beside = folder / ".toy.py_writes_here"
    try:
        if read_written(beside):  # a run was killed while it moved its files
            move_up(beside)
        shutil.rmtree(beside, ignore_errors=True)
        found, written = list_files(folder), read_written(folder)
        check(
            written or not found, f"{folder} holds files that toy.py did not write; give another --output_dir"
        )
        if found and not args.overwrite:
            complete = written["seed"] == args.seed and found == set(written["files"])
            check(complete, f"{folder} is incomplete or of another seed ({written['seed']}); add --overwrite")
            print(f"nothing to do: {folder} already holds this data (seed {args.seed})")
            return
        logging.disable_progress_bar()  # transformers would show one for the model
        build(beside, args.seed)
        for name in found - list_files(beside):  # an older toy.py wrote them
            (folder / name).unlink()
        move_up(beside)
    except OSError as error:
        sys.exit(f"error: cannot write {folder} ({error.strerror}); give another --output_dir")
    rows = ", ".join(f"{sum(counts)} {kind}" for kind, counts in ROWS.items())
    print(f"wrote model and rows ({rows}) to {folder} (seed {args.seed})")


if __name__ == "__main__":
    parser = HfArgumentParser(Args, usage="python toy.py [--flag value ...]", allow_abbrev=False)
    main(Args(**vars(parser.parse_args())))
