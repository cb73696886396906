"""frontier.py against exact enumeration, brute force and textbook formulas, and from answers to report.

The world of the enumeration: at each of P prompts a language model over the responses of at most three
tokens, all 15 of them listed, so that pi*_beta is a sum over a list. Oracles are loops over Python floats.
"""

import argparse
import itertools
import json
import math
import statistics

import pytest
import torch
from conftest import run_script

import frontier

PREFIXES = [prefix for length in range(3) for prefix in itertools.product((0, 1), repeat=length)]  # 7
RESPONSES = [y for prefix in PREFIXES for y in ((*prefix, t) for t in range(3)) if y[-1] == 2 or len(y) == 3]
BETAS = [100.0, 3.0, 1.0, 0.3, 0.1]


def draw_model(seed, spread=1.0):
    """log pi(y) of the 15 responses under random next-token logits, EOS = 2 included; a list of floats."""
    generator = torch.Generator().manual_seed(seed)
    table = (spread * torch.randn(7, 3, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return [sum(table[PREFIXES.index(y[:t]), y[t]].item() for t in range(len(y))) for y in RESPONSES]


def draw_world(P=3, seed=0):
    """(log pi_SFT, reward), lists of P lists of 15 floats; rewards carry an offset per prompt."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(P, 15, generator=generator, dtype=torch.float64)
    reward += 3 * torch.randn(P, 1, generator=generator, dtype=torch.float64)
    return [draw_model(100 * seed + p) for p in range(P)], reward.tolist()


def doubles(x):
    return torch.tensor(x, dtype=torch.float64)


def exact_point(logp, reward, beta):
    """(KL, reward) of pi*_beta, means over prompts, by the definition."""
    kls, rewards = [], []
    for logs, values in zip(logp, reward, strict=True):
        top = max(values)
        mass = [math.exp(log + (value - top) / beta) for log, value in zip(logs, values, strict=True)]
        optimum = [m / sum(mass) for m in mass]
        kls.append(sum(o * (math.log(o) - log) for o, log in zip(optimum, logs, strict=True) if o > 0))
        rewards.append(sum(o * value for o, value in zip(optimum, values, strict=True)))
    return statistics.mean(kls), statistics.mean(rewards)


# ------------------------------------------------------------------------------------------------ the optimum
def test_gibbs_frontier_is_exact_on_a_population_of_duplicates():
    counts, values = [[5, 1, 2, 12], [1, 1, 17, 1]], [[0.3, 2.0, -1.0, 0.1], [50.0, 51.0, 49.0, 52.5]]
    reward = doubles([sum(([v] * n for v, n in zip(*row)), []) for row in zip(values, counts)])
    logp = [[math.log(n / 20) for n in row] for row in counts]
    for row, beta in zip(frontier.gibbs_frontier(reward, BETAS), BETAS, strict=True):
        kl, best = exact_point(logp, values, beta)
        assert row["beta"] == beta
        assert row["kl"] == pytest.approx(kl, abs=1e-12) and row["reward"] == pytest.approx(best, abs=1e-12)


def test_gibbs_frontier_is_exact_in_float64_with_weights():
    logp, reward = draw_world()
    log_ratio = doubles(logp) + 7.5  # q even over the 15; a constant must not matter
    for row, beta in zip(frontier.gibbs_frontier(doubles(reward), BETAS, log_ratio), BETAS, strict=True):
        kl, best = exact_point(logp, reward, beta)
        assert row["kl"] == pytest.approx(kl, abs=1e-12) and row["reward"] == pytest.approx(best, abs=1e-12)


def test_effective_sample_size_by_definition():
    weights = [math.exp(r / 2) for r in (0, 1, 3)]
    (row,) = frontier.gibbs_frontier(torch.tensor([[0.0, 1.0, 3.0]]), [2.0])
    assert row["ess"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights), rel=1e-12)


def test_extremes_are_finite_and_right():
    generator = torch.Generator().manual_seed(0)
    reward = 1e4 * torch.randn(4, 64, generator=generator, dtype=torch.float64)
    low, high = frontier.gibbs_frontier(reward, [1e-6, 1e12])
    assert low["reward"] == pytest.approx(reward.amax(1).mean().item(), rel=1e-12)
    assert low["kl"] == pytest.approx(math.log(64), rel=1e-12) and low["ess"] == pytest.approx(1)
    assert high["reward"] == pytest.approx(reward.mean().item(), abs=1e-3)
    assert high["kl"] == pytest.approx(0, abs=1e-12) and high["ess"] == pytest.approx(64)
    for rows in (frontier.gibbs_frontier(-reward.float(), [1e-6, 1.0, 1e6]), [low, high]):
        assert all(math.isfinite(value) for row in rows for value in row.values())


def test_no_policy_lies_above_the_exact_curve():
    logp, reward = draw_world()
    points = [exact_point(logp, reward, 10 ** (3 - g / 80)) for g in range(400)]
    curve_kl, curve_reward = doubles(points).T
    closest = math.inf
    for seed in range(500):
        policy = [draw_model(7000 + 3 * seed + p, spread=0.3 + seed / 150) for p in range(3)]
        kl = value = 0.0
        for logs, refs, values in zip(policy, logp, reward):
            kl += sum(math.exp(a) * (a - b) for a, b in zip(logs, refs)) / 3
            value += sum(math.exp(a) * r for a, r in zip(logs, values)) / 3
        best = frontier.optimal_reward(doubles(kl), curve_kl, curve_reward).item()
        if math.isnan(best):  # beyond the end of the curve only the largest reward bounds it
            best = statistics.mean(max(values) for values in reward)
        assert value <= best + 1e-9
        closest = min(closest, best - value)
    assert closest < 0.5  # the bound is not idle


def test_efficiency_is_one_on_the_curve_half_halfway_and_none_where_nothing_is_known():
    betas, world = [*(10 ** (3 - g / 20) for g in range(80)), 0.77], draw_world(P=8)
    points = doubles(
        [[exact_point([log], [r], beta) for beta in betas] for log, r in zip(*world)]
    )  # (P, G, 2)
    curve, (kl, value) = [*points[:, :-1].movedim(2, 0)], points[:, -1].T
    sft = (doubles(world[0]).exp() * doubles(world[1])).sum(1)
    on = frontier.efficiency(value, sft, kl, *curve)
    share, low, high = on["frontier_efficiency"]
    assert share == pytest.approx(1, abs=1e-3)
    assert low == pytest.approx(1, abs=5e-3) == high  # of the same prompts: no spread
    assert on["optimal_reward"][0] == pytest.approx(value.mean().item(), abs=1e-3)
    share, low, high = frontier.efficiency((value + sft) / 2, sft, kl, *curve)["frontier_efficiency"]
    assert share == pytest.approx(0.5, abs=1e-3) and low <= 0.5 + 1e-3 and high >= 0.5 - 1e-3
    nothing = [None, None, None]
    assert frontier.efficiency(sft, sft, 0 * kl, *curve)["frontier_efficiency"] == nothing
    for far, points in ((50, curve), (0, [x[:, :1] for x in curve]), (0, [x[:, :0] for x in curve])):
        assert list(frontier.efficiency(value, sft, kl + far, *points).values()) == [nothing, nothing]


def test_the_curve_ends_where_the_effective_sample_size_does():
    score = torch.randn(4, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp = torch.zeros(4, 200, 1, dtype=torch.float64)
    rows, curves = frontier.draw_optimum(score, logp)
    assert len(rows) == curves["kl"].shape[1] > 20
    assert min(row["ess"] for row in rows) >= 50 and rows[-1]["ess"] < 70
    assert rows[-1]["ess_min"] == curves["ess"][:, -1].min().item() < 50  # the mean over prompts decides
    rows, curves = frontier.draw_optimum(score[:, :40], logp[:, :40])
    assert rows == [] and curves["kl"].shape == (4, 0)


def test_the_optimum_from_the_samples_of_all_policies_is_exact_on_a_population():
    """Every policy's samples are its distribution, so the mixture weights must give back pi*_beta."""
    counts, values = {"sft": [50, 10, 20, 120], "a": [10, 10, 170, 10]}, [0.3, 2.0, -1.0, 0.1]
    logp = {name: [math.log(n / 200) for n in own] for name, own in counts.items()}
    drawn = [y for own in counts.values() for y in range(4) for _ in range(own[y])]  # 400 response numbers
    pool = [[logp[name][y] for name in counts] for y in drawn]
    rows, curves = frontier.draw_optimum(doubles([[values[y] for y in drawn]]), doubles([pool]))
    assert len(rows) > 50
    for g in range(0, len(rows), 7):
        kl, best = exact_point([logp["sft"]], [values], rows[g]["beta"])
        assert rows[g]["kl"] == pytest.approx(kl, abs=1e-12) == curves["kl"][0, g].item()
        assert rows[g]["reward"] == pytest.approx(best, abs=1e-12) == curves["reward"][0, g].item()


# -------------------------------------------------------------------------------------------------- best of n
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    reward, value = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found = []
    for row, other in zip(reward.tolist(), value.tolist()):
        found += [other[max(subset, key=row.__getitem__)] for subset in itertools.combinations(range(6), n)]
    assert frontier.best_of_n(reward, n, value) == pytest.approx(statistics.mean(found), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_best_of_n_kl_is_the_integral_over_the_quantile(n):
    steps = 200_000  # the best of n has density n u^(n-1) in the reward's quantile u
    middles = ((i + 0.5) / steps for i in range(steps))
    densities = (n * u ** (n - 1) for u in middles)
    integral = sum(d * math.log(d) for d in densities if d > 0) / steps
    assert frontier.best_of_n_kl(n) == pytest.approx(integral, abs=1e-6)


# ------------------------------------------------------------------------------------------------- statistics
def wilson_by_bisection(rate, n, side):
    """The p at which |rate - p| is 1.96 standard errors of p itself, below (side -1) or above rate (1)."""
    inside, outside = rate, 0.0 if side < 0 else 1.0
    for _ in range(200):
        p = (inside + outside) / 2
        within = (rate - p) ** 2 <= 1.959963984540054**2 * p * (1 - p) / n
        inside, outside = (p, outside) if within else (inside, p)
    return inside


@pytest.mark.parametrize("wins, ties, losses", [(7, 2, 1), (1, 0, 0), (0, 3, 0), (500, 0, 2)])
def test_win_rate_counts_ties_half_within_wilson(wins, ties, losses):
    score_a = torch.tensor([1.0] * wins + [0.5] * ties + [0.0] * losses)
    score_b = torch.tensor([0.0] * wins + [0.5] * ties + [1.0] * losses)
    n = wins + ties + losses
    rate, low, high = frontier.win_rate(score_a, score_b)
    assert rate == pytest.approx((wins + ties / 2) / n, rel=1e-12)
    assert low == pytest.approx(wilson_by_bisection(rate, n, -1), abs=1e-9)
    assert high == pytest.approx(wilson_by_bisection(rate, n, 1), abs=1e-9)
    assert frontier.win_rate(score_b, score_a) == pytest.approx((1 - rate, 1 - high, 1 - low), abs=1e-12)


def naive_wins(a, b):
    """(win rate, tie rate) of one prompt's scores, two lists, over all pairs."""
    pairs = list(itertools.product(a, b))
    wins, ties = sum(x > y for x, y in pairs), sum(x == y for x, y in pairs)
    return (wins + ties / 2) / len(pairs), ties / len(pairs)


def test_the_bootstrap_by_a_loop_over_the_same_prompts():
    values = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = torch.randint(6, (1000, 6), generator=torch.Generator().manual_seed(0)).tolist()
    means = sorted(statistics.mean(values[i].item() for i in row) for row in rows)

    def at(q):
        below = int(q * 999)
        return means[below] + (q * 999 - below) * (means[below + 1] - means[below])

    expected = statistics.mean(values.tolist()), at(0.025), at(0.975)
    assert frontier.bootstrap(lambda share: share @ values, 6) == pytest.approx(expected, abs=1e-12)


# --------------------------------------------------------------------------------------- from answers to report
def make_rows(policies=("sft", "a", "b"), P=5, S=12, gold=True, seed=0):
    """Rows as evaluate.py writes them, of policies that drift from the SFT model to better rewards."""
    generator, rows = torch.Generator().manual_seed(seed), []
    words = ["one", "two", "three", "four", "|five", "`six`\n", "<b>"]
    for strength, name in enumerate(policies):
        for p, _ in itertools.product(range(P), range(S)):
            x, y, z = torch.randn(3, generator=generator, dtype=torch.float64).tolist()
            length = 2 + int(torch.randint(6, (1,), generator=generator))
            picks = torch.randint(len(words), (length - 1,), generator=generator).tolist()
            logp = {other: -2.0 * length + (0.3 * k - 0.1) * x for k, other in enumerate(policies)}
            rows.append({"policy": name, "prompt_id": p, "prompt": f"prompt {p}", "length": length})
            rows[-1] |= {"response": " ".join(words[i] for i in picks), "reward": round(x + strength / 2, 1)}
            rows[-1] |= {"logp": logp, "kl_exact": strength * (0.3 * strength / 2 + 0.02 * z), "ended": y < 1}
            rows[-1] |= {"gold_reward": round(x + y)} if gold else {}
    return rows


def write_answers(folder, rows, S=12):
    """answers.jsonl as evaluate.py writes it: the settings, then the responses."""
    names = dict.fromkeys(row["policy"] for row in rows)
    header = {"policies": {name: f"out/{name}" for name in names if name != "sft"}}
    header |= {"num_prompts": 1 + max(row["prompt_id"] for row in rows), "samples_per_prompt": S}
    header["settings"] = {"model": "out/sft", "samples_per_prompt": S}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    return folder


def run_main(folder):
    frontier.main(argparse.Namespace(input_dir=str(folder)))


def read_summary(folder):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads((folder / "summary.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, rows, summary, what was printed) of a run of the script, in a folder with brackets in its name."""
    rows = make_rows(S=24)
    folder = write_answers(tmp_path_factory.mktemp("done") / "a [1] b", rows, 24)
    before = (folder / "answers.jsonl").read_bytes()
    run = run_script("frontier.py", "--input_dir", folder, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert (folder / "answers.jsonl").read_bytes() == before
    return folder, rows, read_summary(folder), run.stdout


@pytest.mark.parametrize("name", ["sft", "a", "b"])
def test_the_numbers_of_a_policy_once_more_by_hand(done, name):
    _, rows, summary, _ = done
    x, own = summary["policies"][name], [row for row in rows if row["policy"] == name]
    sft = [row for row in rows if row["policy"] == "sft"]
    keys = {"reward": "reward", "gold_reward": "gold_reward", "kl": "kl_exact"}
    keys |= {"response_length": "length", "eos_rate": "ended"}
    expected = {key: statistics.mean(row[column] for row in own) for key, column in keys.items()}
    expected["kl_sampled"] = statistics.mean(row["logp"][name] - row["logp"]["sft"] for row in own)
    for gain, key in (("reward_gain", "reward"), ("gold_gain", "gold_reward")):
        expected[gain] = expected[key] - statistics.mean(row[key] for row in sft)
    total = sum(row["length"] for row in own)
    expected["perplexity"] = math.exp(-sum(row["logp"]["sft"] for row in own) / total)
    pairs = [pair for row in own for pair in itertools.pairwise(row["response"].split())]
    expected["distinct_2"] = len(set(pairs)) / len(pairs)
    assert {key: x[key] for key in expected} == pytest.approx(expected, rel=1e-12, abs=1e-12)
    for key in ("reward", "reward_gain", "gold_reward", "gold_gain", "kl", "kl_sampled"):
        assert x[f"{key}_low"] <= x[key] <= x[f"{key}_high"]
    gaps = {}
    for row in own:
        gap = row["logp"][name] - row["logp"]["sft"] - row["kl_exact"]
        gaps.setdefault(row["prompt_id"], []).append(gap)
    gaps = [statistics.mean(values) for values in gaps.values()]
    error = statistics.pstdev(gaps) / math.sqrt(len(gaps))
    assert x["kl_difference"] == pytest.approx(statistics.mean(gaps) / error if name != "sft" else 0)


@pytest.mark.parametrize("key, of", [("", "reward"), ("gold_", "gold_reward")])
def test_win_rates_over_all_pairs_of_responses_to_the_same_prompt(done, key, of):
    _, rows, summary, _ = done
    for a, b in itertools.permutations(["sft", "a", "b"], 2):
        scores = {}
        for row in rows:
            scores.setdefault((row["policy"], row["prompt_id"]), []).append(row[of])
        rates, ties = zip(*[naive_wins(scores[a, p], scores[b, p]) for p in range(5)])
        rate, low, high = summary["policies"][a][f"{key}win_rate_vs"][b]
        assert rate == pytest.approx(statistics.mean(rates), abs=1e-12)
        assert min(rates) <= low <= rate <= high <= max(rates)
        found = summary["policies"][a][f"{key}tie_rate_vs"][b]
        assert found == pytest.approx(statistics.mean(ties), abs=1e-12) and found > 0


def test_the_optimum_and_best_of_n_once_more_by_hand(done):
    _, rows, summary, _ = done
    points = []
    for row in summary["optimal_frontier"]:
        kl = reward = gold = 0.0
        for p in range(5):
            own = [row for row in rows if row["prompt_id"] == p]
            base = [math.exp(y["logp"]["sft"]) / sum(map(math.exp, y["logp"].values())) for y in own]
            mass = [b * math.exp(y["reward"] / row["beta"]) for b, y in zip(base, own)]
            w, w0 = ([m / sum(ms) for m in ms] for ms in (mass, base))
            kl += sum(x * math.log(x / x0) for x, x0 in zip(w, w0)) / 5
            reward += sum(x * y["reward"] for x, y in zip(w, own)) / 5
            gold += sum(x * y["gold_reward"] for x, y in zip(w, own)) / 5
        assert [row["kl"], row["reward"], row["gold_reward"]] == pytest.approx([kl, reward, gold], abs=1e-9)
        points.append((kl, reward))
    a, sft = summary["policies"]["a"], summary["policies"]["sft"]
    right = next(i for i, point in enumerate(points) if point[0] > a["kl"])
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    part = (math.sqrt(a["kl"]) - math.sqrt(x0)) / (math.sqrt(x1) - math.sqrt(x0))
    assert a["optimal_reward"] == pytest.approx(y0 + part * (y1 - y0), abs=1e-9)
    share = (a["reward"] - sft["reward"]) / (a["optimal_reward"] - sft["reward"])
    assert a["frontier_efficiency"] == pytest.approx(share, abs=1e-9)
    best = summary["best_of_n"]
    assert [row["n"] for row in best] == [1, 2, 4, 8] and best[2]["kl"] == math.log(4) - 3 / 4
    assert best[0]["reward"] == pytest.approx(sft["reward"])
    assert best[0]["gold_reward"] == pytest.approx(sft["gold_reward"])


def test_the_report_holds_the_numbers_and_no_response_breaks_it(done):
    folder, rows, summary, printed = done
    report, a = (folder / "report.md").read_text(), summary["policies"]["a"]
    assert f"| a | {a['reward']:.3f} [{a['reward_low']:.3f}, {a['reward_high']:.3f}] |" in report
    assert all(f"- {line}" in report for line in printed.splitlines()[:-1])
    assert f"a: gain {a['reward_gain']:.2f}" in printed and f"{a['frontier_efficiency']:.0%} of" in printed
    table = report.split("and their rewards\n\n")[1].split("\n\n")[0].splitlines()
    first = next(row for row in rows if row["policy"] == "b")
    plain = first["response"].replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    assert len(table) == 2 + 5 and table[2].endswith(f" | {plain} ({first['reward']:.2f}) |")
    assert all(line.replace("\\|", "").count("|") == 5 for line in table)
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("with_gold", [0, 60])  # of none, of the SFT model's alone
def test_without_gold_reward_of_all_nothing_speaks_of_it(tmp_path, with_gold):
    rows = make_rows()[:with_gold] + make_rows(gold=False)[with_gold:]
    folder = write_answers(tmp_path / "x", rows)
    run_main(folder)
    assert "gold" not in (folder / "summary.json").read_text() + (folder / "report.md").read_text()


def test_what_is_not_known_is_null_and_what_cannot_be_is_warned_of(tmp_path, capsys):
    rows = make_rows(policies=("sft", "far", "off", "above", "twin"), S=24)
    wrong = {"far": 40.0, "off": 3.0, "above": 1e-3, "twin": 0.0}  # off: not the KL that the samples show
    for row in rows:
        row["kl_exact"] = wrong.get(row["policy"], row["kl_exact"])
    folder = write_answers(tmp_path / "x", rows, 24)
    run_main(folder)
    policies, printed = read_summary(folder)["policies"], capsys.readouterr().out
    assert policies["far"]["optimal_reward"] is policies["far"]["frontier_efficiency"] is None
    assert policies["twin"]["frontier_efficiency"] is None is not policies["twin"]["optimal_reward"]
    assert "not known how much is possible at its KL, 40.00 nats/response" in printed.split("far: gain")[1]
    assert "WARNING: above is above the optimum" in printed and "WARNING: twin is" not in printed
    assert "WARNING: off: exact and sampled KL are" in printed and "WARNING: sft" not in printed


def test_one_prompt_and_one_response_are_enough(tmp_path):
    folder = write_answers(tmp_path / "x", make_rows(P=1, S=1), 1)
    run_main(folder)
    summary = read_summary(folder)
    assert "The optimum is not known." in (folder / "report.md").read_text()
    assert summary["optimal_frontier"] == [] and [row["n"] for row in summary["best_of_n"]] == [1]
    assert summary["policies"]["a"]["optimal_reward"] is None


# ---------------------------------------------------------------------------------------------- wrong inputs
def refused(folder, said):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as error:
        run_main(folder)
    line = error.value.code
    assert line.startswith("error: ") and said in line and "\n" not in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


DAMAGES = {  # of 180 rows: 60 of each policy, 12 to each prompt
    "a policy is missing": lambda rows: rows[:120],
    "a line is missing": lambda rows: rows[:70] + rows[71:],
    "a line stands twice": lambda rows: rows[:70] + [rows[70], *rows[70:]],
    "prompts in another order": lambda rows: rows[:60] + rows[72:84] + rows[60:72] + rows[84:],
    "no sft": lambda rows: rows[60:],
    "a policy that is not named": lambda rows: [rows[0] | {"policy": "c"}, *rows[1:]],
    "no policy": lambda rows: [{"prompt_id": 0}, *rows[1:]],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_answers_end_in_one_line(tmp_path, damage):
    path = write_answers(tmp_path, make_rows()) / "answers.jsonl"
    header = path.read_text().splitlines()[0]
    path.write_text("\n".join([header, *map(json.dumps, DAMAGES[damage](make_rows()))]) + "\n")
    refused(tmp_path, "lacks a line, or has one twice; make it again with evaluate.py --overwrite")


def test_other_files_and_numbers_end_in_one_line_too(tmp_path):
    refused(tmp_path, "answers.jsonl does not exist; run evaluate.py first, or give another --input_dir")
    text = (write_answers(tmp_path, make_rows()) / "answers.jsonl").read_bytes()
    for damaged in (b"", text[:-40], text.split(b"\n", 1)[1], b"\xff\xfe{}", b"[]\n", b"3\n", text + b"\n"):
        (tmp_path / "answers.jsonl").write_bytes(damaged)
        refused(tmp_path, "make it again with evaluate.py --overwrite")
    for key, value in (("reward", math.nan), ("kl_exact", math.inf), ("gold_reward", -math.inf)):
        rows = make_rows()
        rows[70][key] = value
        write_answers(tmp_path, rows)
        refused(tmp_path, "a number of a is not finite; run evaluate.py --overwrite without")
