"""frontier.py against exact enumeration, brute force and textbook formulas, and from answers to report."""

import argparse
import itertools
import json
import math
import statistics

import pytest
import torch
from conftest import run_script

import frontier

BETAS = [100.0, 3.0, 1.0, 0.3, 0.1]


def normals(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_world(P=3):
    """(log pi_SFT, reward) of all 15 responses to each of P prompts; rewards carry an offset per prompt."""
    return normals(0, P, 15).log_softmax(1), normals(1, P, 15) + 3 * normals(2, P, 1)


def exact_point(logp, *rewards, beta):
    """[KL, reward, ...] of pi*_beta for the first of the rewards, means over prompts, by the definition."""
    logp_optimum = (logp + rewards[0] / beta).log_softmax(1)
    values = [logp_optimum - logp, *rewards]
    return [(logp_optimum.exp() * value).sum(1).mean().item() for value in values]


def assert_exact(rows, logp, *rewards):
    for row in rows:
        found = [row[key] for key in ("kl", "reward", "gold_reward")[: 1 + len(rewards)]]
        assert found == pytest.approx(exact_point(logp, *rewards, beta=row["beta"]), abs=1e-12)


def test_gibbs_frontier_is_exact_on_a_population_of_duplicates():
    counts, values = [[5, 1, 2, 12], [1, 1, 17, 1]], [[0.3, 2.0, -1.0, 0.1], [50.0, 51.0, 49.0, 52.5]]
    counts, values = torch.tensor(counts), torch.tensor(values, dtype=torch.float64)
    reward = torch.stack([row.repeat_interleave(n) for row, n in zip(values, counts)])
    rows = frontier.gibbs_frontier(reward, BETAS)
    assert [row["beta"] for row in rows] == BETAS
    assert_exact(rows, (counts.double() / 20).log(), values)
    logp, reward = draw_world()  # weights, of q even over the 15; a constant must not matter
    assert_exact(frontier.gibbs_frontier(reward, BETAS, logp + 7.5), logp, reward)


def test_extremes_are_finite_and_right():
    reward = 1e4 * normals(0, 4, 64)
    low, high = frontier.gibbs_frontier(reward, [1e-6, 1e12])
    assert low["reward"] == pytest.approx(reward.amax(1).mean().item(), rel=1e-12)
    assert low["kl"] == pytest.approx(math.log(64), rel=1e-12) and low["ess"] == pytest.approx(1)
    assert high["reward"] == pytest.approx(reward.mean().item(), abs=1e-3)
    assert high["kl"] == pytest.approx(0, abs=1e-12) and high["ess"] == pytest.approx(64)
    rows = [low, high, *frontier.gibbs_frontier(-reward.float(), [1e-6, 1.0, 1e6])]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    (row,), weights = frontier.gibbs_frontier(reward[:1, :9], [2e3]), (reward[0, :9] / 2e3).exp()
    assert row["ess"] == pytest.approx((weights.sum() ** 2 / (weights**2).sum()).item(), rel=1e-12)


def test_no_policy_lies_above_the_exact_curve():
    logp, reward = draw_world()
    points = [exact_point(logp, reward, beta=10 ** (3 - g / 80)) for g in range(400)]
    curve, closest = torch.tensor(points, dtype=torch.float64).T, math.inf
    for seed in range(500):
        policy = ((0.3 + seed / 150) * normals(7000 + seed, 3, 15)).log_softmax(1)
        kl, value = [(policy.exp() * x).sum(1).mean() for x in (policy - logp, reward)]
        best = frontier.optimal_reward(kl, *curve).item()
        if math.isnan(best):  # beyond the end of the curve only the largest reward bounds it
            best = reward.amax(1).mean().item()
        assert value <= best + 1e-9
        closest = min(closest, best - value.item())
    assert closest < 0.5  # the bound is not idle


def test_efficiency_is_one_on_the_curve_half_halfway_and_none_where_nothing_is_known():
    betas, (logp, reward) = [*(10 ** (3 - g / 20) for g in range(80)), 0.77], draw_world(P=8)
    points = [[exact_point(logp[[p]], reward[[p]], beta=beta) for beta in betas] for p in range(8)]
    points = torch.tensor(points, dtype=torch.float64)  # (P, G, 2)
    curve, (kl, value), sft = [*points[:, :-1].movedim(2, 0)], points[:, -1].T, (logp.exp() * reward).sum(1)
    on = frontier.efficiency(value, sft, kl, *curve)
    assert on["frontier_efficiency"] == pytest.approx([1, 1, 1], abs=5e-3)  # of the same prompts: no spread
    assert on["optimal_reward"][0] == pytest.approx(value.mean().item(), abs=1e-3)
    share, low, high = frontier.efficiency((value + sft) / 2, sft, kl, *curve)["frontier_efficiency"]
    assert share == pytest.approx(0.5, abs=1e-3) and low <= 0.5 + 1e-3 and high >= 0.5 - 1e-3
    nothing = [None, None, None]
    assert frontier.efficiency(sft, sft, 0 * kl, *curve)["frontier_efficiency"] == nothing
    for far, points in ((50, curve), (0, [x[:, :1] for x in curve]), (0, [x[:, :0] for x in curve])):
        assert list(frontier.efficiency(value, sft, kl + far, *points).values()) == [nothing, nothing]


def test_the_curve_ends_where_the_effective_sample_size_does():
    score, logp = normals(0, 4, 200), torch.zeros(4, 200, 1, dtype=torch.float64)
    rows, curves = frontier.draw_optimum(score, logp)
    assert len(rows) == curves["kl"].shape[1] > 20
    assert min(row["ess"] for row in rows) >= 50 and rows[-1]["ess"] < 70
    assert rows[-1]["ess_min"] == curves["ess"][:, -1].min().item() < 50  # the mean over prompts decides
    rows, curves = frontier.draw_optimum(score[:, :40], logp[:, :40])
    assert rows == [] and curves["kl"].shape == (4, 0)


def test_the_optimum_from_the_samples_of_all_policies_is_exact_on_a_population():
    counts, values = (
        torch.tensor([[50, 10, 20, 120], [10, 10, 170, 10]]),
        torch.tensor([[0.3, 2.0, -1.0, 0.1]]),
    )
    logp, values = (counts.double() / 200).log(), values.double()
    drawn = torch.arange(4).repeat(2).repeat_interleave(counts.flatten())  # 400 response numbers
    rows, curves = frontier.draw_optimum(values[:, drawn], logp.T[drawn].unsqueeze(0))
    assert len(rows) > 50
    assert_exact(rows, logp[:1], values)
    for key in ("kl", "reward"):
        assert [row[key] for row in rows] == curves[key][0].tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    (reward, value), found = normals(n, 2, 3, 6), []
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


@pytest.mark.parametrize("wins, ties, losses", [(7, 2, 1), (1, 0, 0), (0, 3, 0), (500, 0, 2)])
def test_win_rate_counts_ties_half_within_wilson(wins, ties, losses):
    score_a = torch.tensor([1.0] * wins + [0.5] * ties + [0.0] * losses)
    score_b = torch.tensor([0.0] * wins + [0.5] * ties + [1.0] * losses)
    n = wins + ties + losses
    rate, low, high = frontier.win_rate(score_a, score_b)
    assert rate == pytest.approx((wins + ties / 2) / n, rel=1e-12) and low < high and low <= rate <= high
    for p in (low, high):  # Wilson: the rate is 1.96 standard errors of the bound itself away from it
        assert (rate - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / n, abs=1e-9)
    assert frontier.win_rate(score_b, score_a) == pytest.approx((1 - rate, 1 - high, 1 - low), abs=1e-12)


def test_the_bootstrap_by_a_loop_over_the_same_prompts():
    values = normals(3, 6)
    rows = torch.randint(6, (1000, 6), generator=torch.Generator().manual_seed(0)).tolist()
    means = [statistics.mean(values[i].item() for i in row) for row in rows]
    low, *_, high = statistics.quantiles(means, n=40, method="inclusive")
    expected = statistics.mean(values.tolist()), low, high
    assert frontier.bootstrap(lambda share: share @ values, 6) == pytest.approx(expected, abs=1e-12)


def make_rows(policies=("sft", "a", "b"), P=5, S=12, gold=True, seed=0):
    """Rows as evaluate.py writes them, of policies that drift from the SFT model to better rewards."""
    generator, rows = torch.Generator().manual_seed(seed), []
    words = ["one", "two", "three", "four", "|five", "`six`\n", "<b>"]
    for (strength, name), p, _ in itertools.product(enumerate(policies), range(P), range(S)):
        x, y, z = torch.randn(3, generator=generator, dtype=torch.float64).tolist()
        length = 2 + int(torch.randint(6, (1,), generator=generator))
        picks = torch.randint(len(words), (length - 1,), generator=generator).tolist()
        logp = {other: -2.0 * length + (0.3 * k - 0.1) * x for k, other in enumerate(policies)}
        rows.append({"policy": name, "prompt_id": p, "prompt": f"prompt {p}", "length": length, "logp": logp})
        rows[-1] |= {"response": " ".join(words[i] for i in picks), "reward": round(x + strength / 2, 1)}
        rows[-1] |= {"kl_exact": strength * (0.3 * strength / 2 + 0.02 * z), "ended": y < 1}
        rows[-1] |= {"gold_reward": round(x + y)} if gold else {}
    return rows


def write_answers(folder, rows, S=12):
    names = dict.fromkeys(row["policy"] for row in rows)
    header = {"policies": {name: f"out/{name}" for name in names if name != "sft"}}
    header |= {"num_prompts": 1 + max(row["prompt_id"] for row in rows), "samples_per_prompt": S}
    header["settings"] = {"model": "out/sft", "samples_per_prompt": S}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    return folder


def run_main(folder):
    frontier.main(argparse.Namespace(input_dir=str(folder)))


def read_summary(folder):  # 1 / 0: neither NaN nor Infinity is JSON
    return json.loads((folder / "summary.json").read_text(), parse_constant=lambda name: 1 / 0)


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
    scores = {}
    for row in rows:
        scores.setdefault(row["policy"], {}).setdefault(row["prompt_id"], []).append(row[of])
    for a, b in itertools.permutations(scores, 2):
        pairs = [[(x > y) + (x == y) / 2 for x in scores[a][p] for y in scores[b][p]] for p in range(5)]
        rates, ties = zip(*[(statistics.mean(one), one.count(0.5) / len(one)) for one in pairs])
        rate, low, high = summary["policies"][a][f"{key}win_rate_vs"][b]
        assert rate == pytest.approx(statistics.mean(rates), abs=1e-12)
        assert min(rates) <= low <= rate <= high <= max(rates)
        found = summary["policies"][a][f"{key}tie_rate_vs"][b]
        assert found == pytest.approx(statistics.mean(ties), abs=1e-12) and found > 0


def test_the_optimum_and_best_of_n_once_more_by_hand(done):
    _, rows, summary, _ = done
    by_prompt = [[row for row in rows if row["prompt_id"] == p] for p in range(5)]
    keys = ("reward", "gold_reward")
    scores = [
        torch.tensor([[row[key] for row in own] for own in by_prompt], dtype=torch.float64) for key in keys
    ]
    logp = torch.tensor([[[*row["logp"].values()] for row in own] for own in by_prompt], dtype=torch.float64)
    share = logp[..., 0].exp() / logp.exp().sum(-1)  # of the mixture of the policies
    assert_exact(summary["optimal_frontier"], (share / share.sum(1, keepdim=True)).log(), *scores)
    a, sft = summary["policies"]["a"], summary["policies"]["sft"]
    points = [(row["kl"], row["reward"]) for row in summary["optimal_frontier"]]
    right = next(i for i, point in enumerate(points) if point[0] > a["kl"])
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    part = (math.sqrt(a["kl"]) - math.sqrt(x0)) / (math.sqrt(x1) - math.sqrt(x0))
    assert a["optimal_reward"] == pytest.approx(y0 + part * (y1 - y0), abs=1e-9)
    share = (a["reward"] - sft["reward"]) / (a["optimal_reward"] - sft["reward"])
    assert a["frontier_efficiency"] == pytest.approx(share, abs=1e-9)
    best = summary["best_of_n"]
    assert [row["n"] for row in best] == [1, 2, 4, 8] and best[2]["kl"] == math.log(4) - 3 / 4
    for key in ("reward", "gold_reward"):
        assert best[0][key] == pytest.approx(sft[key])


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


def test_without_gold_reward_of_all_nothing_speaks_of_it(tmp_path):
    for gold in (0, 60):  # of none, of the SFT model's alone
        run_main(write_answers(tmp_path, make_rows()[:gold] + make_rows(gold=False)[gold:]))
        assert "gold" not in (tmp_path / "summary.json").read_text() + (tmp_path / "report.md").read_text()


def test_what_is_not_known_is_null_and_what_cannot_be_is_warned_of(tmp_path, capsys):
    rows = make_rows(policies=("sft", "far", "off", "above", "twin"), S=24)
    wrong = {"far": 40.0, "off": 3.0, "above": 1e-3, "twin": 0.0}  # off: not the KL that the samples show
    for row in rows:
        row["kl_exact"] = wrong.get(row["policy"], row["kl_exact"])
    run_main(write_answers(tmp_path, rows, 24))
    policies, printed = read_summary(tmp_path)["policies"], capsys.readouterr().out
    assert policies["far"]["optimal_reward"] is policies["far"]["frontier_efficiency"] is None
    assert policies["twin"]["frontier_efficiency"] is None is not policies["twin"]["optimal_reward"]
    assert "not known how much is possible at its KL, 40.00 nats/response" in printed.split("far: gain")[1]
    assert "WARNING: above is above the optimum" in printed and "WARNING: twin is" not in printed
    assert "WARNING: off: exact and sampled KL are" in printed and "WARNING: sft" not in printed


def test_one_prompt_and_one_response_are_enough(tmp_path):
    run_main(write_answers(tmp_path, make_rows(P=1, S=1), 1))
    summary = read_summary(tmp_path)
    assert "The optimum is not known." in (tmp_path / "report.md").read_text()
    assert summary["optimal_frontier"] == [] and [row["n"] for row in summary["best_of_n"]] == [1]
    assert summary["policies"]["a"]["optimal_reward"] is None


def refused(folder, said):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit, match=rf"^error: [^\n]*{said}[^\n]*\Z"):
        run_main(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_damaged_answers_end_in_one_line(tmp_path):
    refused(tmp_path, "answers.jsonl does not exist; run evaluate.py first, or give another --input_dir")
    text = (write_answers(tmp_path, make_rows()) / "answers.jsonl").read_bytes()
    head, *rows = text.splitlines(keepends=True)  # 180 rows: 60 of each policy, 12 to each prompt
    damages = [rows[:120], rows[60:], rows[:70] + rows[71:], rows[:70] + [rows[70], *rows[70:]]]
    damages += [rows[:60] + rows[72:84] + rows[60:72] + rows[84:]]  # prompts in another order
    damages += [[rows[0].replace(b'"sft"', b'"c"', 1), *rows[1:]], [b'{"prompt_id": 0}\n', *rows[1:]]]
    for damaged in damages:
        (tmp_path / "answers.jsonl").write_bytes(b"".join([head, *damaged]))
        refused(tmp_path, "lacks a line, or has one twice; make it again with evaluate.py --overwrite")
    for damaged in (b"", text[:-40], text.split(b"\n", 1)[1], b"\xff\xfe{}", b"[]\n", b"3\n", text + b"\n"):
        (tmp_path / "answers.jsonl").write_bytes(damaged)
        refused(tmp_path, "make it again with evaluate.py --overwrite")
    for key, value in (("reward", math.nan), ("kl_exact", math.inf), ("gold_reward", -math.inf)):
        rows = make_rows()
        rows[70][key] = value
        write_answers(tmp_path, rows)
        refused(tmp_path, "a number of a is not finite; run evaluate.py --overwrite without")
