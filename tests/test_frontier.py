"""frontier.py against exact enumeration, brute force and textbook formulas, and from answers to report.

The world of the enumeration: at each of P prompts a language model over the responses of at most three
tokens, all 15 of them listed, so that pi*_beta is a sum over a list. Oracles are loops over Python floats.
"""

import argparse
import ast
import itertools
import json
import math
import shutil
import statistics
import sys

import pytest
import torch
from conftest import ROOT, run_script

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


def sample(logp, N, seed):
    """N response numbers at every prompt: (P, N)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.multinomial(doubles(x).exp(), N, True, generator=generator) for x in logp])


def by_prompt(scores, betas, logp, name):
    """A number of the exact optimum at every prompt: (P, G)."""
    curves = [frontier.gibbs_frontier(r, betas, log) for r, log in zip(scores.split(1), logp.split(1))]
    return doubles([[row[name] for row in curve] for curve in curves])


# ------------------------------------------------------------------------------------------------ the optimum
def test_the_responses_are_all_there_are():
    assert len(RESPONSES) == 15
    assert sum(math.exp(log) for log in draw_model(5)) == pytest.approx(1, abs=1e-12)


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


def test_effective_sample_size_and_gold_by_definition():
    reward, gold = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[5.0, -1.0, 2.0]])
    weights = [math.exp(r / 2) for r in (0, 1, 3)]
    weights = [w / sum(weights) for w in weights]
    (row,) = frontier.gibbs_frontier(reward, [2.0], gold=gold)
    assert row["ess"] == pytest.approx(1 / sum(w * w for w in weights), rel=1e-12)
    assert row["gold_reward"] == pytest.approx(sum(w * g for w, g in zip(weights, [5, -1, 2])), rel=1e-12)
    assert set(row) == {"beta", "kl", "reward", "ess", "gold_reward"}
    assert set(frontier.gibbs_frontier(reward, [2.0])[0]) == {"beta", "kl", "reward", "ess"}


@pytest.mark.parametrize("beta", [3.0, 1.0, 0.5])
def test_gibbs_frontier_from_samples_comes_within_its_error(beta):
    logp, reward = draw_world()
    runs = []
    for seed in range(40):
        drawn = doubles(reward).gather(1, sample(logp, 2000, seed))
        runs.append(frontier.gibbs_frontier(drawn, [beta])[0])
    for name, truth in zip(("kl", "reward"), exact_point(logp, reward, beta)):
        values = [run[name] for run in runs]
        bias = 0.005  # of order 1 / ess
        assert abs(statistics.mean(values) - truth) < 4 * statistics.stdev(values) / math.sqrt(40) + bias
        assert statistics.stdev(values) < 0.1


def test_samples_of_several_policies_reach_where_those_of_one_do_not():
    """The even mixture of SFT and policies near the optimum: right where SFT samples alone give out."""
    logp = [[math.log(0.995 / 14)] * 14 + [math.log(0.005)]]  # the best response is rare
    reward = torch.tensor([[0.0] * 14 + [4.0]], dtype=torch.float64)
    policy = [[math.log(0.4 / 14)] * 14 + [math.log(0.6)]]
    drawn = torch.cat([sample(logp, 100, 0), sample(policy, 100, 1)], 1)
    ref, own = doubles(logp).gather(1, drawn), doubles(policy).gather(1, drawn)
    log_ratio = ref - torch.stack([ref, own]).logsumexp(0) + math.log(2)
    inputs = reward.gather(1, drawn), [0.7]
    (mixed,) = frontier.gibbs_frontier(*inputs, log_ratio)
    kl, best = exact_point(logp, reward.tolist(), 0.7)
    assert mixed["ess"] > 50
    assert mixed["kl"] == pytest.approx(kl, abs=0.35) and mixed["reward"] == pytest.approx(best, abs=0.35)
    (wrong,) = frontier.gibbs_frontier(*inputs)  # the same samples taken for samples of SFT
    assert abs(wrong["kl"] - kl) > 1


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


def test_offsets_of_prompts_move_the_curve_up_and_nothing_else():
    reward = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    offset = torch.tensor([[100.0], [-7.0], [0.0], [3.0], [14.0]])
    for a, b in zip(frontier.gibbs_frontier(reward, BETAS), frontier.gibbs_frontier(reward + offset, BETAS)):
        assert b["kl"] == pytest.approx(a["kl"], abs=1e-12)
        assert b["reward"] == pytest.approx(a["reward"] + 22, abs=1e-10)


def exact_curve(logp, reward, steps=400):
    """(kl, reward), (steps,) each, with rising KL."""
    betas = [10 ** (3 - 5 * g / steps) for g in range(steps)]
    points = [exact_point(logp, reward, beta) for beta in betas]
    return torch.tensor(points, dtype=torch.float64).T


def test_no_policy_lies_above_the_exact_curve():
    logp, reward = draw_world()
    curve_kl, curve_reward = exact_curve(logp, reward)
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


def test_the_optimum_is_on_its_own_curve_and_beyond_its_end_there_is_none():
    logp, reward = draw_world()
    kl, value = exact_curve(logp, reward, steps=100)
    for beta in (37.7, 2.34, 0.456):
        x, y = exact_point(logp, reward, beta)
        assert frontier.optimal_reward(doubles(x), kl, value).item() == pytest.approx(y, abs=1e-3)
    curves = [x.repeat(2, 1) for x in (kl, value)]
    inside, beyond = frontier.optimal_reward(torch.tensor([0.0, kl[-1] * 1.01]), *curves)
    assert inside.item() == pytest.approx(value[0].item()) and math.isnan(beyond.item())
    assert frontier.optimal_reward(doubles([1.0, 2.0]), curves[0][:, :1], curves[1][:, :1]).isnan().all()


def test_efficiency_is_one_on_the_curve_half_halfway_and_none_where_nothing_is_known():
    logp, reward = (doubles(x) for x in draw_world(P=8))
    betas = [10 ** (3 - g / 20) for g in range(80)]
    curve = [by_prompt(reward, betas, logp, name) for name in ("kl", "reward")]  # (P, G)
    kl, value = (by_prompt(reward, [0.77], logp, name)[:, 0] for name in ("kl", "reward"))
    sft = (logp.exp() * reward).sum(1)
    on = frontier.efficiency(value, sft, kl, *curve)
    share, low, high = on["frontier_efficiency"]
    assert share == pytest.approx(1, abs=1e-3)
    assert low == pytest.approx(1, abs=5e-3) == high  # of the same prompts: no spread
    assert on["optimal_reward"][0] == pytest.approx(value.mean().item(), abs=1e-3)
    share, low, high = frontier.efficiency((value + sft) / 2, sft, kl, *curve)["frontier_efficiency"]
    assert share == pytest.approx(0.5, abs=1e-3) and low <= 0.5 + 1e-3 and high >= 0.5 - 1e-3
    nothing = [None, None, None]
    assert frontier.efficiency(sft, sft, 0 * kl, *curve)["frontier_efficiency"] == nothing
    assert list(frontier.efficiency(value, sft, kl + 50, *curve).values()) == [nothing, nothing]
    empty = [x[:, :0] for x in curve]
    assert list(frontier.efficiency(value, sft, kl, *empty).values()) == [nothing, nothing]


def test_the_curve_ends_where_the_effective_sample_size_does():
    score = torch.randn(4, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp = torch.zeros(4, 200, 1, dtype=torch.float64)
    rows, curves = frontier.draw_optimum(score, logp)
    assert len(rows) == curves["kl"].shape[1] > 20
    assert min(row["ess"] for row in rows) >= 50 and rows[-1]["ess"] < 70
    assert rows[0]["kl"] < 1e-5 and rows[0]["reward"] == pytest.approx(score.mean().item(), abs=1e-2)
    for row, ess, kl in zip(rows, curves["ess"].T, curves["kl"].T, strict=True):
        assert row["ess_min"] == ess.min().item() <= row["ess"] and row["kl"] == pytest.approx(
            kl.mean().item()
        )
    assert rows[-1]["ess_min"] < 50  # the mean over the prompts decides, and the smallest is told
    rows, curves = frontier.draw_optimum(score[:, :40], logp[:, :40])
    assert rows == [] and curves["kl"].shape == (4, 0)


def test_the_optimum_from_the_samples_of_all_policies_is_exact_on_a_population():
    """Every policy's samples are its distribution, so that the mixture weights must give back pi*_beta."""
    counts, values = (
        {"sft": [50, 10, 20, 120], "a": [10, 10, 170, 10], "b": [100, 80, 10, 10]},
        [0.3, 2.0, -1.0, 0.1],
    )
    gold, logp = (
        [5.0, -3.0, 1.0, 0.0],
        {name: [math.log(n / 200) for n in own] for name, own in counts.items()},
    )
    drawn = [y for own in counts.values() for y in range(4) for _ in range(own[y])]  # 600 response numbers
    pool = [[logp[name][y] for name in counts] for y in drawn]
    inputs = [doubles([[table[y] for y in drawn]]) for table in (values, gold)]
    rows, curves = frontier.draw_optimum(inputs[0], doubles([pool]), inputs[1])
    assert len(rows) > 50
    for g in range(0, len(rows), 7):
        kl, best = exact_point([logp["sft"]], [values], rows[g]["beta"])
        assert rows[g]["kl"] == pytest.approx(kl, abs=1e-12) == curves["kl"][0, g].item()
        assert rows[g]["reward"] == pytest.approx(best, abs=1e-12) == curves["reward"][0, g].item()
        mass = [math.exp(log + v / rows[g]["beta"]) for log, v in zip(logp["sft"], values)]
        expected = sum(m * x for m, x in zip(mass, gold)) / sum(mass)
        assert rows[g]["gold_reward"] == pytest.approx(expected, abs=1e-12)


# -------------------------------------------------------------------------------------------------- best of n
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    generator = torch.Generator().manual_seed(n)
    reward, value = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    by_reward, by_value = [], []
    for row, other in zip(reward.tolist(), value.tolist()):
        for subset in itertools.combinations(range(6), n):
            best = max(subset, key=row.__getitem__)
            by_reward.append(row[best])
            by_value.append(other[best])
    assert frontier.best_of_n(reward, n, reward) == pytest.approx(statistics.mean(by_reward), rel=1e-12)
    assert frontier.best_of_n(reward, n, value) == pytest.approx(statistics.mean(by_value), rel=1e-12)


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


@pytest.mark.parametrize("wins, ties, losses", [(7, 2, 1), (1, 0, 0), (30, 11, 59), (0, 3, 0), (500, 0, 2)])
def test_win_rate_counts_ties_half_within_wilson(wins, ties, losses):
    score_a = torch.tensor([1.0] * wins + [0.5] * ties + [0.0] * losses)
    score_b = torch.tensor([0.0] * wins + [0.5] * ties + [1.0] * losses)
    n = wins + ties + losses
    rate, low, high = frontier.win_rate(score_a, score_b)
    assert rate == pytest.approx((wins + ties / 2) / n, rel=1e-12)
    assert low == pytest.approx(wilson_by_bisection(rate, n, -1), abs=1e-9)
    assert high == pytest.approx(wilson_by_bisection(rate, n, 1), abs=1e-9)
    mirrored = frontier.win_rate(score_b, score_a)
    assert mirrored == pytest.approx((1 - rate, 1 - high, 1 - low), abs=1e-12)


def test_win_rate_known_values():
    rate, low, high = frontier.win_rate(torch.zeros(10), torch.ones(10))
    assert (rate, low) == (0.0, 0.0) and high == pytest.approx(0.27753, abs=1e-5)  # z^2 / (n + z^2)
    with pytest.raises(ValueError):
        frontier.win_rate(torch.zeros(0), torch.zeros(0))


def naive_wins(a, b):
    """(win rate, tie rate) of one prompt's scores, two lists, over all pairs."""
    pairs = list(itertools.product(a, b))
    wins, ties = sum(x > y for x, y in pairs), sum(x == y for x, y in pairs)
    return (wins + ties / 2) / len(pairs), ties / len(pairs)


def test_cross_wins_counts_every_pair_at_a_prompt():
    a, b = torch.randint(4, (2, 5, 7), generator=torch.Generator().manual_seed(0)).double()
    rates, ties = frontier.cross_wins(a, b)
    for p in range(5):
        assert (rates[p], ties[p]) == pytest.approx(naive_wins(a[p].tolist(), b[p].tolist()), abs=1e-15)


def test_the_bootstrap_by_a_loop_over_the_same_prompts():
    values = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = torch.randint(6, (1000, 6), generator=torch.Generator().manual_seed(0)).tolist()
    means = sorted(statistics.mean(values[i].item() for i in row) for row in rows)

    def at(q):
        below = int(q * 999)
        return means[below] + (q * 999 - below) * (means[below + 1] - means[below])

    expected = statistics.mean(values.tolist()), at(0.025), at(0.975)
    assert frontier.bootstrap(lambda share: share @ values, 6) == pytest.approx(expected, abs=1e-12)


def test_the_bootstrap_knows_no_interval_where_a_sample_has_no_value():
    values = doubles([1.0, 2.0, 3.0])
    value, low, high = frontier.bootstrap(lambda share: (share @ values).where(share[:, 0] > 0, math.nan), 3)
    assert value == pytest.approx(2) and low is None and high is None
    assert frontier.bootstrap(lambda share: share @ values * math.nan, 3) == [None, None, None]


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered, widths = 0, []
    for _ in range(200):
        values = 2 + 3 * torch.randn(50, generator=generator, dtype=torch.float64)
        _, low, high = frontier.bootstrap(lambda share: share @ values, 50)
        covered += low < 2 < high
        widths.append((high - low) / (2 * 1.96 * 3 / math.sqrt(50)))
    assert 0.90 <= covered / 200 <= 0.98  # 95%, less a little at 50 prompts
    assert 0.95 < statistics.mean(widths) < 1.02


def test_the_win_rate_interval_covers_also_where_prompts_differ_and_draws_are_shared():
    """Prompts differ in the lead of a; response s of a and of b come from the same random numbers."""
    P, S, runs, generator = 40, 8, 200, torch.Generator().manual_seed(1)
    truth = statistics.NormalDist(0, math.sqrt(3)).cdf(0.3)  # of independent responses to a new prompt
    bootstrap = wilson = 0
    for _ in range(runs):
        lead, noise = 0.3 + torch.randn(P, 1, generator=generator), torch.randn(P, S, generator=generator)
        wins, _ = frontier.cross_wins(lead + noise, noise)
        _, low, high = frontier.bootstrap(lambda share: share @ wins, P)
        bootstrap += low < truth < high
        _, low, high = frontier.win_rate((lead + noise).flatten(), noise.flatten())
        wilson += low < truth < high
    assert 0.90 <= bootstrap / runs <= 0.98  # 93% in 1500 runs
    assert wilson / runs < 0.6  # of response s against response s, as if all were independent


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


def write_answers(folder, rows, samples_per_prompt=12):
    """answers.jsonl as evaluate.py writes it: the settings, then the responses."""
    names = dict.fromkeys(row["policy"] for row in rows)
    header = {"policies": {name: f"out/{name}" for name in names if name != "sft"}}
    header |= {
        "num_prompts": 1 + max(row["prompt_id"] for row in rows),
        "samples_per_prompt": samples_per_prompt,
    }
    header["settings"] = {"model": "out/sft", "dataset": "data/x", "samples_per_prompt": samples_per_prompt}
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
    """(folder, rows, summary, what was printed) of a run of the script."""
    rows = make_rows(S=24)
    folder = write_answers(tmp_path_factory.mktemp("done") / "evaluation", rows, 24)
    before = (folder / "answers.jsonl").read_bytes()
    run = run_script("frontier.py", "--input_dir", folder, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert (folder / "answers.jsonl").read_bytes() == before
    return folder, rows, read_summary(folder), run.stdout


def test_it_writes_three_files_and_says_so(done):
    folder, _, summary, printed = done
    files = {"answers.jsonl", "summary.json", "report.md", "frontier.png"}
    assert {path.name for path in folder.iterdir()} == files
    assert printed.splitlines()[-1] == f"{folder}: summary.json, report.md, frontier.png"
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert set(summary) == {"policies", "optimal_frontier", "best_of_n", "settings"}
    assert list(summary["policies"]) == ["sft", "a", "b"]
    a, end = summary["policies"]["a"], summary["optimal_frontier"][-1]
    said = f"a: gain {a['reward_gain']:.2f} over the SFT model, {a['frontier_efficiency']:.0%} of what is possible"
    assert f"{said} at its KL, {a['kl']:.2f} nats/response; reward {a['reward']:.3f}\n" in printed
    sizes = f"{end['kl']:.2f} nats/response. There the effective sample size is {end['ess']:.0f}, and"
    assert f"up to KL {sizes} {end['ess_min']:.0f} at the worst prompt." in printed and "sft:" not in printed


def mean_of(rows, name, number):
    return statistics.mean(number(row) for row in rows if row["policy"] == name)


@pytest.mark.parametrize("name", ["sft", "a", "b"])
def test_the_numbers_of_a_policy_once_more_by_hand(done, name):
    _, rows, summary, _ = done
    x, own = summary["policies"][name], [row for row in rows if row["policy"] == name]
    expected = {
        "reward": mean_of(rows, name, lambda row: row["reward"]),
        "gold_reward": mean_of(rows, name, lambda row: row["gold_reward"]),
        "kl": mean_of(rows, name, lambda row: row["kl_exact"]),
        "kl_sampled": mean_of(rows, name, lambda row: row["logp"][name] - row["logp"]["sft"]),
        "response_length": mean_of(rows, name, lambda row: row["length"]),
        "eos_rate": mean_of(rows, name, lambda row: row["ended"]),
    }
    expected["reward_gain"] = expected["reward"] - mean_of(rows, "sft", lambda row: row["reward"])
    expected["gold_gain"] = expected["gold_reward"] - mean_of(rows, "sft", lambda row: row["gold_reward"])
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
        by_prompt = [naive_wins(scores[a, p], scores[b, p]) for p in range(5)]
        rate, low, high = summary["policies"][a][f"{key}win_rate_vs"][b]
        assert rate == pytest.approx(statistics.mean(wins for wins, _ in by_prompt), abs=1e-12)
        assert min(wins for wins, _ in by_prompt) <= low <= rate <= high <= max(wins for wins, _ in by_prompt)
        ties = summary["policies"][a][f"{key}tie_rate_vs"][b]
        assert ties == pytest.approx(statistics.mean(tie for _, tie in by_prompt), abs=1e-12) and ties > 0
        mirrored = summary["policies"][b][f"{key}win_rate_vs"][a]
        assert mirrored == pytest.approx([1 - rate, 1 - high, 1 - low], abs=1e-9)


def test_the_optimum_and_best_of_n_once_more_by_hand(done):
    _, rows, summary, _ = done
    points = []
    for row in summary["optimal_frontier"]:
        kls, rewards, golds = [], [], []
        for p in range(5):
            own = [row for row in rows if row["prompt_id"] == p]
            base = [math.exp(y["logp"]["sft"]) / sum(map(math.exp, y["logp"].values())) for y in own]
            mass = [b * math.exp(y["reward"] / row["beta"]) for b, y in zip(base, own)]
            w, w0 = ([m / sum(ms) for m in ms] for ms in (mass, base))
            kls.append(sum(x * math.log(x / x0) for x, x0 in zip(w, w0)))
            rewards.append(sum(x * y["reward"] for x, y in zip(w, own)))
            golds.append(sum(x * y["gold_reward"] for x, y in zip(w, own)))
        points.append([statistics.mean(x) for x in (kls, rewards, golds)])
        assert [row["kl"], row["reward"], row["gold_reward"]] == pytest.approx(points[-1], abs=1e-9)
    assert len(points) > 30 and summary["optimal_frontier"][-1]["ess_min"] > 0
    a = summary["policies"]["a"]
    right = next(i for i, point in enumerate(points) if point[0] > a["kl"])
    (x0, y0, _), (x1, y1, _) = points[right - 1 : right + 1]
    part = (math.sqrt(a["kl"]) - math.sqrt(x0)) / (math.sqrt(x1) - math.sqrt(x0))
    assert a["optimal_reward"] == pytest.approx(y0 + part * (y1 - y0), abs=1e-9)
    sft = summary["policies"]["sft"]["reward"]
    share = (a["reward"] - sft) / (a["optimal_reward"] - sft)
    assert a["frontier_efficiency"] == pytest.approx(share, abs=1e-9)
    assert [row["n"] for row in summary["best_of_n"]] == [1, 2, 4, 8]
    assert summary["best_of_n"][0]["reward"] == pytest.approx(sft)
    assert summary["best_of_n"][0]["gold_reward"] == pytest.approx(summary["policies"]["sft"]["gold_reward"])
    assert summary["best_of_n"][2]["kl"] == math.log(4) - 3 / 4


def test_the_report_holds_the_numbers_and_no_response_breaks_it(done):
    folder, rows, summary, printed = done
    report = (folder / "report.md").read_text()
    for name, x in summary["policies"].items():
        assert f"| {name} | {x['reward']:.3f} [{x['reward_low']:.3f}, {x['reward_high']:.3f}] |" in report
    assert "- model: out/sft\n- dataset: data/x\n- samples_per_prompt: 24\n" in report
    assert all(f"- {line}" in report for line in printed.splitlines()[:-1])
    rate, low, high = summary["policies"]["a"]["gold_win_rate_vs"]["sft"]
    assert f"{rate:.3f} [{low:.3f}, {high:.3f}], ties" in report.split("## Win rates by the gold reward")[1]
    table = report.split("and their rewards\n\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 2 + 5 and table[0] == "| prompt | sft | a | b |"
    first = next(row for row in rows if row["policy"] == "b")
    plain = first["response"].replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    assert table[2].endswith(f" | {plain} ({first['reward']:.2f}) |")
    assert all(line.replace("\\|", "").count("|") == 5 for line in table)


def test_a_second_run_replaces_its_files_by_the_same(done):
    folder = done[0]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "report.md").write_text("old")
    run_main(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


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
def spoil(rows, case):
    """The rows with one thing wrong."""
    return {
        "a policy is missing": rows[: len(rows) * 2 // 3],
        "the last line is missing": rows[:-1],
        "a line is missing": rows[:70] + rows[71:],
        "a line stands twice": rows[:70] + [rows[70], *rows[70:]],
        "one prompt instead of another": rows[:70] + [rows[14] | {"policy": "a"}, *rows[71:]],
        "prompts in another order": rows[:60] + rows[72:84] + rows[60:72] + rows[84:],
        "no sft": rows[60:],
        "a policy that is not named": [rows[0] | {"policy": "c"}, *rows[1:]],
        "no policy": [{"prompt_id": 0}, *rows[1:]],
    }[case]


CASES = """a policy is missing, the last line is missing, a line is missing, a line stands twice, one prompt instead of
another, prompts in another order, no sft, a policy that is not named, no policy""".replace("\n", " ").split(
    ", "
)


@pytest.mark.parametrize("case", CASES)
def test_damaged_answers_end_in_one_line_with_advice_that_helps(tmp_path, case):
    rows = make_rows()
    folder = write_answers(tmp_path, rows)
    path = folder / "answers.jsonl"
    header = path.read_text().splitlines()[0]
    path.write_text("\n".join([header, *map(json.dumps, spoil(rows, case))]) + "\n")
    refused(folder, "lacks a line, or has one twice; make it again with evaluate.py --overwrite")


def refused(folder, said):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as error:
        run_main(folder)
    assert (
        error.value.code.startswith("error: ") and said in error.value.code and "\n" not in error.value.code
    )
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_other_files_end_in_one_line_too(tmp_path):
    refused(tmp_path, "answers.jsonl does not exist; run evaluate.py first, or give another --input_dir")
    text = (write_answers(tmp_path / "x", make_rows()) / "answers.jsonl").read_bytes()
    for damaged in (b"", text[:-40], text.split(b"\n", 1)[1], b"\xff\xfe{}", b"[]\n", b"3\n", text + b"\n"):
        (tmp_path / "x/answers.jsonl").write_bytes(damaged)
        refused(tmp_path / "x", "make it again with evaluate.py --overwrite")


@pytest.mark.parametrize(
    "key, value", [("reward", math.nan), ("kl_exact", math.inf), ("gold_reward", -math.inf)]
)
def test_a_number_that_is_not_finite_ends_in_one_line(tmp_path, key, value):
    rows = make_rows()
    rows[70][key] = value
    refused(write_answers(tmp_path, rows), "a number of a is not finite; run evaluate.py --overwrite without")


def test_the_advice_helps(chain, tmp_path):
    """A line is lost, evaluate.py --overwrite makes the answers again, and frontier.py reads them."""
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    train = "--steps 1 --prompts_per_step 4 --minibatch_size 4 --eval_prompts 2".split()
    assert run_script("p3o.py", *train, cwd=tmp_path).returncode == 0
    small = ["--num_prompts", 2, "--samples_per_prompt", 3]
    assert run_script("evaluate.py", *small, cwd=tmp_path).returncode == 0
    path = tmp_path / "out/evaluation/answers.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "evaluate.py --overwrite" in run_script("frontier.py", cwd=tmp_path).stderr
    assert run_script("evaluate.py", *small, "--overwrite", cwd=tmp_path).returncode == 0
    done = run_script("frontier.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-2].startswith("p3o: gain "), done.stderr


def test_a_folder_in_brackets(tmp_path):
    write_answers(tmp_path / "a [1] b", make_rows())
    done = run_script("frontier.py", "--input_dir", "a [1] b", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("a [1] b: summary.json, report.md, frontier.png\n")


# ------------------------------------------------------------------------------------------------- copied out
def test_what_is_promised_runs_alone():
    """Its source in an empty namespace with torch and math."""
    source = (ROOT / "frontier.py").read_text()
    functions = {x.name: x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)}
    found = {}
    for name in ("gibbs_frontier", "best_of_n_kl", "win_rate"):
        alone = {"torch": torch, "math": math}
        exec(ast.get_source_segment(source, functions[name]), alone)
        found[name] = alone[name]
    reward, log_ratio = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    inputs = reward, BETAS, log_ratio, -reward
    assert found["gibbs_frontier"](*inputs) == frontier.gibbs_frontier(*inputs)
    assert found["best_of_n_kl"](8) == frontier.best_of_n_kl(8)
    assert found["win_rate"](reward[0], log_ratio[0]) == frontier.win_rate(reward[0], log_ratio[0])


def test_it_needs_torch_and_matplotlib_only():
    tree = ast.parse((ROOT / "frontier.py").read_text())
    names = [x.module for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)]
    names += [alias.name for x in ast.walk(tree) if isinstance(x, ast.Import) for alias in x.names]
    others = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others == {"torch", "matplotlib"}
