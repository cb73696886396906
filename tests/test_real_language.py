"""results/real_language.py: its splits, its arithmetic, its report from made-up logs, and a quick run of all of it."""

import csv
import json
import math
import random
import re
import statistics
import sys

import pytest
import torch
from conftest import ROOT, run_script, word_tokenizer

sys.path.insert(0, str(ROOT / "results"))
import real_language as real


def make_reviews(count, tokenizer):
    rng = random.Random(1)
    words = [word for word in tokenizer.get_vocab() if word.startswith("w")]
    return [
        {"text": " ".join(rng.choices(words, k=rng.randint(6, 24))), "label": i % 2} for i in range(count)
    ]


def test_no_review_is_in_two_splits_and_pairs_are_balanced():
    tokenizer, size = word_tokenizer(300), real.Size(60, 10, 8, 9, 10**6, 6)
    reviews = make_reviews(400, tokenizer)
    label = {review["text"]: review["label"] for review in reviews}
    splits, homes = real.make_splits(reviews, tokenizer, size), {}
    assert [len(splits["sft"][x]) for x in ("train", "validation", "test")] == [60, 10, 9]
    assert [len(splits["prompts"][x]) for x in ("validation", "test")] == [8, 9]
    held_out = {row["prompt"] for x in ("validation", "test") for row in splits["prompts"][x]}
    assert len(held_out) == 17 and not held_out & {row["prompt"] for row in splits["prompts"]["train"]}
    for split, rows in splits["sft"].items():
        for row in rows:
            text = (row["prompt"] + row["completion"]).removeprefix("Review: ")
            assert label.get(text) is not None and len(row["completion"].split()) + 1 <= real.RESPONSE
            homes.setdefault(text, set()).add(("sft", split))
    for name in ("pairs", "judge_pairs"):
        for split, rows in splits[name].items():
            assert len({(row["chosen"], row["rejected"]) for row in rows}) == len(rows) > 0
            for column, wanted in (("chosen", 1), ("rejected", 0)):
                texts = [row[column].strip() for row in rows]
                assert {texts.count(text) for text in texts} == {2} and {label[text] for text in texts} == {
                    wanted
                }
                for text in texts:
                    homes.setdefault(text, set()).add((name, split))
    assert all(len(home) == 1 for home in homes.values())


def test_the_variance_split_finds_what_was_put_in_and_agrees_with_a_plain_loop():
    P, S, rng = 4000, 4, random.Random(0)
    rewards = []
    for _ in range(P):
        offset = rng.gauss(0, 2)
        rewards.append([offset + rng.gauss(0, 3) for _ in range(S)])
    found = real.variance_split(torch.tensor(rewards, dtype=torch.float64))
    within = sum(statistics.variance(own) for own in rewards) / P
    raw = statistics.variance([sum(own) / S for own in rewards])
    assert found["within"] == pytest.approx(within) and found["raw"] == pytest.approx(raw)
    assert found["chance"] == pytest.approx(within / S) and found["between"] == pytest.approx(
        raw - within / S
    )
    assert found["between"] == pytest.approx(4, rel=0.1) and found["within"] == pytest.approx(9, rel=0.05)
    assert found["share_low"] < found["share"] < found["share_high"] and abs(found["share"] - 4 / 13) < 0.03
    nothing = real.variance_split(torch.randn(500, 3, dtype=torch.float64))
    assert abs(nothing["share"]) < 0.1


COIN = [
    0.0,
    1.0,
] * 32  # rewards of the SFT model: its optimum at beta is a coin with P(1) = sigmoid(1 / beta)


def write(args, name, reward, kl, extra):
    P = 6
    log = {"git_commit": "0123456789", "hardware": "a machine", "minutes": 3.0, "reward": [reward] * P}
    log |= {"judge": [[x / 2 for x in reward]] * P, "kl": [kl] * P, "length": [9.0] * P, "ended": [1.0] * P}
    log["samples"] = [{"prompt": "Review: a|b", "response": f" by {name}", "reward": reward[0]}]
    log["steps"] = {x: [1.0, 3.0, 1.0, 3.0] for x in real.STEPWISE}
    log["steps"]["objective"] = [9.0, 9.0, extra.pop("objective", 1.0), extra.pop("objective2", 1.0)]
    curve = [
        ("step", 0, 9),
        ("eval_reward", 0.5, 0.6),
        ("eval_kl_exact", 0.0, kl),
        ("eval_objective", 0.5, 1.0),
    ]
    log["evaluations"] = [{x: values[i] for x, *values in curve} for i in (0, 1)]
    real.write_log(args, name, log | extra)


def test_the_report_of_logs_with_a_known_optimum(tmp_path, capsys):
    args = real.parse_args(["--plots_only", "--folder", str(tmp_path)])
    real.main(args)
    assert "missing" in (tmp_path / "report.md").read_text()
    write(args, "sft", COIN, 0.0, {})
    low, high = real.Size().rates[0], real.Size().rates[-1]
    best = {"p3o-v2": high, "ppo": low, "online-dpo": high}
    for run in real.plan(args)[0]:
        write(
            args,
            run["name"],
            COIN[:8],
            0.2,
            {"flags": run["flags"], "objective": 3.0 if run["rate"] == best[run["method"]] else 1.0},
        )
    runs, unknown = real.plan(args)
    assert not unknown and {x["method"]: x["rate"] for x in runs if x["part"] == "main"} == best
    p = 1 / (1 + math.exp(-1.0))  # at beta 1: KL to the fair coin, and three quarters of the gain for P3O
    kl, gain = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p), p - 0.5
    for run in [run for run in runs if run["part"] != "tuning"]:
        share = {"p3o-v2": 0.75, "ppo": 0.5, "online-dpo": 0.25}[run["method"]]
        write(args, run["name"], [0.5 + share * gain] * 8, kl, {"flags": run["flags"]})
    real.main(args)
    sft = real.read_log(args, "sft")
    rows, optimum = real.draw_optimum(real.tensor(sft, "reward"), real.tensor(sft, "judge"))
    (first,) = [x for x in runs if x["part"] == "main" and x["method"] == "p3o-v2" and x["seed"] == 1]
    row = real.by_seed(first, real.read_log(args, first["name"]), sft, optimum)
    assert row["efficiency"] == pytest.approx(0.75, abs=0.005) and row["objective"] == pytest.approx(
        0.75 * gain - real.BETA * kl
    )
    assert row["judge's gain"] == pytest.approx(0.75 * gain / 2)
    assert rows[-1]["gold_reward"] == pytest.approx(rows[-1]["reward"] / 2)
    report = (tmp_path / "report.md").read_text()
    assert (
        f"| ppo | 60 | 3 | {0.25 * gain:.3f} [" in report
        and f"| ppo | 180 | 1 | {0.25 * gain:.3f} [" in report
    )
    ends = [line.split(" | ")[-1] for line in report.splitlines() if line.startswith("| online-dpo | 60 |")]
    assert ends == ["0.500 [0.500, 0.500] |"], "of the optimum's gain, three quarters less a quarter"
    assert f"| p3o-v2 | {high:g} | 60 | 1, 2, 3 | {0.75 * gain:.3f} [" in report
    assert f"| p3o-v2 | {high / 3:.2g} | 180 | 1 | {0.75 * gain:.3f} [" in report
    two, N = 1 - math.comb(32, 2) / math.comb(64, 2) - 0.5, math.log(2) - 0.5  # best of two sides of the coin
    assert f"| best of 2 (KL: at most) | {two:.3f} [{two:.3f}, {two:.3f}] | {N:.3f} [" in report
    assert (
        f"| optimum | {gain:.3f} [" in report
        and f"| {gain - kl:.3f} [{gain - kl:.3f}, {gain - kl:.3f}] | {gain / 2:.3f} [" in report
    )
    assert f"| p3o-v2 | {high:g} | 2.000 +- 1.000 | 2.000 +- 1.000 | 2.000 +- 1.000 | yes |" in report
    # a constant answer between the coin's two sides beats one half of its answers; more reward beats less
    assert (
        "| reward model | p3o-v2 | sft | 0.500 [" in report and "| judge | p3o-v2 | ppo | 1.000 [" in report
    )
    assert "| ppo | 4 | 2.000 |" in report and "a\\|b |  by sft (0.00)" in report
    assert "missing: splits, sft_model, reward_model, judge\n" in report
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    (tmp_path / "logs" / f"{first['name']}.json").unlink()
    real.main(args)
    assert f"missing: {first['name']}, splits" in (tmp_path / "report.md").read_text()


def test_all_of_it_with_a_tiny_model(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer(300)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "bos_token_id": 1,
    }
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    reviews = make_reviews(250, tokenizer)
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    pairs = [
        {"prompt": row["text"], "chosen": f" w5 w6 w{i}", "rejected": " w7"}
        for i, row in enumerate(reviews[:60])
    ]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    asked = []

    def call(script, flags):
        asked.append((script, flags.get("measure") or flags["output_dir"]))
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        script, *more = script.split()
        done = run_script(script, *more, *words, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return True

    monkeypatch.setattr(real, "call", call)
    words = [
        "--quick",
        "--model",
        tmp_path / "model",
        "--reviews",
        tmp_path / "reviews.jsonl",
        "--hh",
        tmp_path / "hh.jsonl",
    ]
    words += ["--folder", tmp_path / "kept", "--processes", 1]
    args = real.parse_args([str(word) for word in words])
    real.main(args)
    report = (tmp_path / "kept" / "report.md").read_text()
    assert "missing:" not in report and "| ppo | 1e-05 | 1 |" in report and "| hh | 4 | 2 |" in report
    kept = [*(tmp_path / "kept/logs").iterdir(), *(tmp_path / "kept").glob("*.*")]
    kept = [path for path in kept if path.suffix in (".json", ".md", ".csv")]
    assert len(kept) > 25 and not any(str(tmp_path) in path.read_text() for path in kept)
    assert not list((tmp_path / "kept").rglob("checkpoint.pt"))
    weights = [path.parent.name for path in (tmp_path / "kept").rglob("model.safetensors")]
    assert len(weights) == 7 and not any("shift" in name or "steps1" in name for name in weights)
    first, asked[:] = len(asked), []
    real.main(args)  # nothing is repeated
    assert first == 28 and not asked
    (tmp_path / "kept/logs" / "sft.json").unlink()
    (tmp_path / "kept/judge/model.safetensors").unlink()
    with pytest.raises(SystemExit):  # what remains was not measured with the judge that would be trained
        real.main(args)
    assert not asked


def test_a_folder_belongs_to_one_setting(tmp_path, capsys):
    """Whoever asks for another model, other data or sizes gets neither a mixture nor the loss of what is there."""
    words = ["--folder", str(tmp_path / "a"), "--model", "one", "--reviews", "some"]
    args = real.parse_args(words)
    real.write_log(args, "setting", real.setting_of(args))
    real.setting_of(args)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/theirs.txt").write_text("theirs")
    others = (["--quick"], ["--model", "two"], ["--reviews", "more"], ["--folder", str(tmp_path / "b")])
    for other in (*others, ["--folder", str(ROOT / "results/real_language")]):
        with pytest.raises(SystemExit) as stopped:
            real.main(real.parse_args(words + other))
        assert stopped.value.code == 2 and "give another --folder" in capsys.readouterr().err, other
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["theirs.txt"]
    assert [path.name for path in (tmp_path / "a").rglob("*.*")] == ["setting.json"]


@pytest.mark.parametrize("wrong", ["reviews", "label", "hh", "absent"])
def test_wrong_data_end_it_before_the_first_training(wrong, tmp_path, monkeypatch, capsys):
    reviews = make_reviews(250, word_tokenizer(300))
    reviews = [{"text": row["text"]} for row in reviews] if wrong == "reviews" else reviews
    reviews += [{"text": "w1 w2 w3", "label": "1"}] if wrong == "label" else []
    for name, rows in {"reviews": reviews, "hh": [{"chosen": "w1", "rejected": "w2"}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(real, "call", lambda script, flags: script.startswith("data.py"))  # or it fails
    monkeypatch.setattr(real.evaluate, "load_tokenizer", lambda name: word_tokenizer(300))
    hh = {"hh": tmp_path / "hh.jsonl", "absent": tmp_path / "nowhere.jsonl"}.get(wrong)
    words = ["--quick", "--reviews", tmp_path / "reviews.jsonl", "--folder", tmp_path / "kept"]
    words += ["--hh", hh] if hh else []
    with pytest.raises(SystemExit) as stopped:
        real.main(real.parse_args([str(word) for word in words]))
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1, message
    assert ("0 nor 1" if wrong == "label" else "cannot read") in message
    assert not (tmp_path / "kept").exists(), "the mended command would be refused"


NUMBER = r"(?<![\w.])-?\d+\.\d+(?![\w.])"


def test_the_numbers_of_the_readme_are_those_of_the_committed_tables():
    section = (ROOT / "README.md").read_text().split("## On a real language model")[1].split("\n## ")[0]
    text = " ".join(section.split())
    known = (ROOT / "results/real_language/report.md").read_text()
    known += (ROOT / "results/real_language/first_setting.md").read_text()
    numbers = re.findall(NUMBER, section)
    assert len(numbers) > 10 and not set(numbers) - set(re.findall(NUMBER, known))
    table = list(csv.DictReader(open(ROOT / "results/real_language/methods.csv")))
    untrained = ROOT / "results/real_language/untrained.csv"
    names = {"p3o-v2": "P3O", "ppo": "PPO", "online-dpo": "online DPO"}
    for row in [row for row in table if row["steps"] == "60"]:  # whose number is whose
        told = f"| {names[row['method']]} | {row['gain']} | {row['kl']} | {row['objective']} [{row['objective_low']}, "
        assert told in text, told
    (best,) = [row for row in csv.DictReader(open(untrained)) if row["policy"].startswith("best of 2")]
    told = f"| {best['gain']} | {best['kl']} at most | {best['objective']} [{best['objective_low']}, "
    assert told in text, told


def test_the_committed_report_is_what_the_committed_logs_say(tmp_path):
    (tmp_path / "logs").symlink_to(ROOT / "results/real_language/logs")
    real.main(real.parse_args(["--plots_only", "--folder", str(tmp_path)]))
    for path in (ROOT / "results/real_language").glob("*.*"):
        kept = path.suffix == ".png" or path.name == "first_setting.md"
        assert kept or (tmp_path / path.name).read_text() == path.read_text(), path.name


def test_offsets_changed_nothing_that_p3o_logged():
    """The committed runs on real text, in bfloat16: P3O with offsets and without, and PPO, whose did change."""
    logs = {
        path.stem: json.loads(path.read_text()) for path in (ROOT / "results/real_language/logs").iterdir()
    }
    shifted = {name: log for name, log in logs.items() if "_shift" in name}
    assert shifted
    for name, log in shifted.items():
        plain = logs[re.sub("_shift[0-9.]+", "", name)]
        assert log["flags"].pop("reward_shift") > 2 and log["flags"] == plain["flags"]
        steps = [x for x in log["steps"] if not x.startswith(("seconds", "tokens"))]
        same = [log["steps"][x] == plain["steps"][x] for x in steps]
        same += [log[x] == plain[x] for x in ("reward", "kl", "length")]
        pairs = zip(log["evaluations"], plain["evaluations"])  # later runs have metrics more
        same.append(all(a[x] == b[x] for a, b in pairs for x in set(a) & set(b)))
        assert len(same) == 8 and set(same) == {name.startswith("p3o")}, name
