"""Film reviews as a world for runs: the data, the SFT model, the reward model, and a judge to check it by.

A prompt is the first words of a review. The reward model learns from pairs of a positive and a negative one;
so does the judge, with other reviews and another seed. No prompt is both trained on and tested.
"""

import json
import math
import random
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import lib
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(lib.ROOT))
import evaluate
from frontier import best_of_n_kl

FIRST_WORDS, PROMPT, RESPONSE, WHOLE = 4, 12, 16, 32  # words; tokens of a prompt, a response, a review
SFT, VALIDATION, TEST, PAIRS = 1900, 128, 128, 75  # rows; held-out reviews of each label for the pairs
PROMPTS, RESPONSES, SHOWN = 64, 8, 5  # test prompts, answers to each; prompts with an answer on the page
STAGE = {"learning_rate": 2e-5, "minibatch_size": 16, "prompt_length": PROMPT, "eval_every": 1000}


def read_reviews(name, tokenizer):
    """[{"label", "text", "prompt", "completion", "short"}, ...]; no text stands there twice."""
    file = {"path": "json", "data_files": name} if Path(name).is_file() else {"path": name}
    rows = {row["text"].strip(): row["label"] for row in datasets.load_dataset(**file, split="train")}
    reviews = []
    for text, label in rows.items():
        words = text.split()
        review = {"label": label, "text": " " + text, "prompt": "Review: " + " ".join(words[:FIRST_WORDS])}
        review["completion"] = " " + " ".join(words[FIRST_WORDS:])
        parts = review["prompt"], review["completion"] + tokenizer.eos_token
        prompt, rest = (len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)
        if len(words) > FIRST_WORDS and prompt <= PROMPT and rest <= WHOLE:
            reviews.append(review | {"short": rest <= RESPONSE})
    return reviews


def make_splits(reviews):
    """{data set: {split: rows}}. The held-out prompts come first, and no two of them are alike."""
    rng = random.Random(0)
    rng.shuffle(reviews)
    held_out, begun, rest = [], set(), []
    for review in reviews:
        new = len(held_out) < TEST + VALIDATION and review["short"] and review["prompt"] not in begun
        (held_out if new else rest).append(review)
        begun |= {review["prompt"]} if new else set()
    short = [review for review in rest if review["short"] and review["prompt"] not in begun][: SFT + 100]
    if len(short) < SFT + 100:
        sys.exit(f"error: only {len(short)} short reviews are left for SFT; give a larger --reviews")
    prompts = {review["prompt"]: review for review in short[:SFT]}
    test, validation = held_out[-TEST:], held_out[:VALIDATION]  # the test prompts are the later ones
    splits = {"sft": {"train": short[:SFT], "validation": short[SFT:], "test": test}}
    splits["prompts"] = {"train": list(prompts.values()), "validation": validation, "test": test}
    taken = {review["text"] for review in short}
    rest = [review for review in rest if review["text"] not in taken]
    for number, name in enumerate(("pairs", "judge_pairs")):  # every other review
        labels = [[review for review in rest if review["label"] == label] for label in (1, 0)]
        splits[name] = make_pairs([reviews[number::2] for reviews in labels], rng)
    return splits


def make_pairs(labels, rng):
    """{split: pairs} of [positive, negative] reviews; every review is in two pairs, with other partners."""
    splits, start = {}, 0
    for split, count in (("validation", PAIRS), ("test", 4), ("train", 10**6)):
        count = min(count, *(len(reviews) - start for reviews in labels))
        liked, panned = ([review["text"] for review in reviews[start : start + count]] for reviews in labels)
        partners = [*zip(liked, panned), *zip(liked, panned[1:] + panned[:1])]
        splits[split] = [{"prompt": "Review:", "chosen": x, "rejected": y} for x, y in partners]
        rng.shuffle(splits[split])
        start += count
    return splits


def use_eager_attention(folder):
    """Whoever loads this model gets it: on a CPU in bfloat16 the default is slow backwards."""
    config = json.loads((folder / "config.json").read_text()) | {"attn_implementation": "eager"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


class FilmReviews:
    """What the runs on film reviews start from, made once in out/results/film_reviews, and their measure."""

    options = {
        "model": {"default": "HuggingFaceTB/SmolLM2-135M-Instruct", "help": "hub name or folder"},
        "reviews": {"default": "cornell-movie-review-data/rotten_tomatoes", "help": "hub name or .jsonl"},
        "device": {"default": "cpu", "help": "where to train"},
    }

    def prepare(self, args):
        base, self.judge_folder = lib.OUT / "film_reviews", lib.OUT / "film_reviews/judge"
        self.flags, self.dtype = {"device": args.device}, {"dtype": "bfloat16"}
        if not (base / "data").exists():
            splits = make_splits(read_reviews(args.reviews, AutoTokenizer.from_pretrained(args.model)))
            shutil.rmtree(base / "new", ignore_errors=True)
            for name, split, rows in [(x, y, z) for x, parts in splits.items() for y, z in parts.items()]:
                lib.write_lines(base / "rows" / name / f"{split}.jsonl", rows)
            for name in splits:
                flags = {"dataset": base / "rows" / name, "output_dir": base / "new" / name}
                lib.call("data.py", model=args.model, **flags)
            (base / "new").rename(base / "data")  # once, when all of it is there
        more = STAGE | self.flags | self.dtype
        flags = more | {"model": args.model, "dataset": base / "data/sft", "response_length": RESPONSE}
        lib.train("sft.py", base / "sft", args.reviews, epochs=1, **flags)
        use_eager_attention(base / "sft")
        pairs = more | {"model": base / "sft", "response_length": PROMPT + WHOLE, "minibatch_size": 32}
        for name, data, seed in (("reward_model", "pairs", 0), ("judge", "judge_pairs", 1)):
            lib.train("reward_model.py", base / name, dataset=base / "data" / data, seed=seed, **pairs)
            use_eager_attention(base / name)
        paths = {"model": base / "sft", "reward_model": base / "reward_model"}
        return paths | {"prompts": base / "data/prompts"}

    def measure(self, folder, paths):
        """The SFT model's line and the run's: reward and judge's score of every answer, and the curves."""
        flags = {"dataset": paths["prompts"], "num_prompts": PROMPTS, "samples_per_prompt": RESPONSES}
        policies, lines = lib.answers(f"{folder}.answers", [folder], **flags, **self.flags, **self.dtype), []
        for rows in (policies["sft"], policies[folder.name]):
            by_prompt = [slice(i, i + RESPONSES) for i in range(0, len(rows), RESPONSES)]
            columns = {"reward": [row["reward"] for row in rows], "judge": self.judge(rows)}
            line = {x: [[round(z, 3) for z in y[some]] for some in by_prompt] for x, y in columns.items()}
            line["kl"] = [round(statistics.fmean(row["kl_exact"] for row in rows[x]), 4) for x in by_prompt]
            line |= {x: round(statistics.fmean(row[x] for row in rows), 4) for x in ("length", "ended")}
            first = rows[: SHOWN * RESPONSES : RESPONSES]
            lines.append(line | {"first_answers": [[row["prompt"], row["response"]] for row in first]})
        lines[1]["curve"] = self.curve(folder)
        return lines

    def curve(self, folder):
        """What the run's evaluations on the validation prompts say: a dict for each of them."""
        points, start = [], None
        for row in [row for row in lib.read_lines(folder / "metrics.jsonl") if "eval_reward" in row]:
            answers = lib.read_lines(folder / f"samples_{row['step']}.jsonl")
            judged = self.judge(answers)
            start = start or judged  # at step 0 the policy is the SFT model
            wins = statistics.fmean((x > y) + (x == y) / 2 for x, y in zip(judged, start))
            names = "reward", "kl", "response_length", "eos_rate"
            point = {"step": row["step"]} | {x: row[f"eval_{x}"] for x in names}
            points.append(point | {"judge": statistics.fmean(judged), "preferred": wins})
        return [{x: round(y, 4) for x, y in point.items()} for point in points]

    def judge(self, rows):
        """The judge's score of every answer, which it reads as a finished review."""
        args = SimpleNamespace(prompt_length=PROMPT, response_length=2 * RESPONSE, **self.flags, **self.dtype)
        tokenizer, scores = AutoTokenizer.from_pretrained(self.judge_folder), []
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        options = AutoModelForSequenceClassification, self.judge_folder, tokenizer, args
        model = evaluate.load_model(*options, num_labels=1)
        for part in (rows[first : first + 64] for first in range(0, len(rows), 64)):
            texts = [row["prompt"] for row in part], [row["response"] + tokenizer.eos_token for row in part]
            ids = [tokenizer(list(x), add_special_tokens=False)["input_ids"] for x in texts]
            with torch.no_grad(), evaluate.autocast(args):
                scores += evaluate.read_score(model, **evaluate.pad_rows(*ids, tokenizer, args)).tolist()
        return scores

    def complete(self, point, found):
        return point  # the tables need the values of every prompt


# ------------------------------------------------------------------------ values by prompt, for the tables
GAINS = {"gain": "reward", "judge's gain": "judge"}


def by_prompt(line, sft):
    """{value: (P,)} of a run, at every prompt: gain, KL, the judge's gain, and how often it prefers it."""
    tensors = {x: torch.tensor(line[x], dtype=torch.float64) for x in ("reward", "judge", "kl")}
    sft = {x: torch.tensor(sft[x], dtype=torch.float64) for x in ("reward", "judge")}
    gains = {x: tensors[y].mean(1) - sft[y].mean(1) for x, y in GAINS.items()}
    ours, theirs = tensors["judge"].unsqueeze(2), sft["judge"].unsqueeze(1)  # all pairs: (P, S, S)
    wins = (ours > theirs).double() + (ours == theirs).double() / 2
    return gains | {"KL": tensors["kl"], "preferred by the judge": wins.mean((1, 2))}


def best_of_n(sft, counts):
    """{n: values by prompt} of the best of n of the SFT model's answers, by the reward model's choice."""
    reward, judge = (torch.tensor(sft[x], dtype=torch.float64) for x in ("reward", "judge"))
    values, N = {}, reward.shape[1]
    ranked = judge.gather(1, reward.argsort(1))  # the judge's scores, from the least reward to the most
    wins = (ranked.unsqueeze(2) > ranked.unsqueeze(1)).double()
    wins += (ranked.unsqueeze(2) == ranked.unsqueeze(1)).double() / 2  # of answer i over answer j
    for n in counts:  # over all subsets of n: the i-th smallest of N is the largest of C(i - 1, n - 1)
        share = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
        apart = [  # i is the largest of a subset, and j is not in it
            [(i != j) * math.comb(i - (j < i), n - 1) / math.comb(N, n) / (N - n) for j in range(N)]
            for i in range(N)
        ]
        share, apart = (torch.tensor(x, dtype=torch.float64) for x in (share, apart))
        gain, judged = reward.sort(1)[0] @ share - reward.mean(1), ranked @ share - judge.mean(1)
        values[n] = {"gain": gain, "KL": torch.full_like(gain, best_of_n_kl(n)), "judge's gain": judged}
        values[n]["preferred by the judge"] = (wins * apart).sum((1, 2))
    return values


def bootstrap(statistic, num_prompts, resamples=1000):
    """(value, low, high) of a statistic of the prompts, with its 95% percentile bootstrap over prompts.

    statistic: from share (M, P), the weights of the prompts in M samples of them, to (M,).
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(num_prompts, (resamples, num_prompts), generator=generator)
    rows = torch.cat([torch.arange(num_prompts).unsqueeze(0), rows])  # first every prompt once: the value
    share = torch.zeros(rows.shape, dtype=torch.float64)
    values = statistic(share.scatter_add(1, rows, share + 1 / num_prompts))
    return values[0].item(), *values[1:].quantile(values.new_tensor([0.025, 0.975])).tolist()
