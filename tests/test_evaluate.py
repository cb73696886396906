"""evaluate.py against exact enumeration, brute force and textbook formulas, and end to end on a tiny chain.

The world of the enumeration: at each of P prompts a language model over the responses of at most three
tokens, all 15 of them listed, so that pi*_beta is a sum over a list. Oracles are loops over Python floats.
"""

import itertools
import json
import math
import os
import re
import shutil
import statistics

import pytest
import torch
from conftest import run_script

import evaluate
from evaluate import RunError
from p3o import response_logps

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


# ------------------------------------------------------------------------------------------------ the optimum
def test_the_responses_are_all_there_are():
    assert len(RESPONSES) == 15
    assert sum(math.exp(log) for log in draw_model(5)) == pytest.approx(1, abs=1e-12)


def test_gibbs_frontier_is_exact_on_a_population_of_duplicates():
    counts, values = [[5, 1, 2, 12], [1, 1, 17, 1]], [[0.3, 2.0, -1.0, 0.1], [50.0, 51.0, 49.0, 52.5]]
    reward = doubles([sum(([v] * n for v, n in zip(*row)), []) for row in zip(values, counts)])
    logp = [[math.log(n / 20) for n in row] for row in counts]
    for row, beta in zip(evaluate.gibbs_frontier(reward, BETAS), BETAS, strict=True):
        kl, best = exact_point(logp, values, beta)
        assert row["beta"] == beta
        assert row["kl"] == pytest.approx(kl, abs=1e-12) and row["reward"] == pytest.approx(best, abs=1e-12)


def test_gibbs_frontier_is_exact_in_float64_with_weights():
    logp, reward = draw_world()
    log_ratio = doubles(logp) + 7.5  # q even over the 15; a constant must not matter
    for row, beta in zip(evaluate.gibbs_frontier(doubles(reward), BETAS, log_ratio), BETAS, strict=True):
        kl, best = exact_point(logp, reward, beta)
        assert row["kl"] == pytest.approx(kl, abs=1e-12) and row["reward"] == pytest.approx(best, abs=1e-12)


def test_effective_sample_size_and_gold_by_definition():
    reward, gold = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[5.0, -1.0, 2.0]])
    weights = [math.exp(r / 2) for r in (0, 1, 3)]
    weights = [w / sum(weights) for w in weights]
    (row,) = evaluate.gibbs_frontier(reward, [2.0], gold=gold)
    assert row["ess"] == pytest.approx(1 / sum(w * w for w in weights), rel=1e-12)
    assert row["gold_reward"] == pytest.approx(sum(w * g for w, g in zip(weights, [5, -1, 2])), rel=1e-12)
    assert set(row) == {"beta", "kl", "reward", "ess", "gold_reward"}
    assert set(evaluate.gibbs_frontier(reward, [2.0])[0]) == {"beta", "kl", "reward", "ess"}


@pytest.mark.parametrize("beta", [3.0, 1.0, 0.5])
def test_gibbs_frontier_from_samples_comes_within_its_error(beta):
    logp, reward = draw_world()
    runs = []
    for seed in range(40):
        drawn = doubles(reward).gather(1, sample(logp, 2000, seed))
        runs.append(evaluate.gibbs_frontier(drawn, [beta])[0])
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
    (mixed,) = evaluate.gibbs_frontier(*inputs, log_ratio)
    kl, best = exact_point(logp, reward.tolist(), 0.7)
    assert mixed["ess"] > 50
    assert mixed["kl"] == pytest.approx(kl, abs=0.35) and mixed["reward"] == pytest.approx(best, abs=0.35)
    (wrong,) = evaluate.gibbs_frontier(*inputs)  # the same samples taken for samples of SFT
    assert abs(wrong["kl"] - kl) > 1


def test_extremes_are_finite_and_right():
    generator = torch.Generator().manual_seed(0)
    reward = 1e4 * torch.randn(4, 64, generator=generator, dtype=torch.float64)
    low, high = evaluate.gibbs_frontier(reward, [1e-6, 1e12])
    assert low["reward"] == pytest.approx(reward.amax(1).mean().item(), rel=1e-12)
    assert low["kl"] == pytest.approx(math.log(64), rel=1e-12) and low["ess"] == pytest.approx(1)
    assert high["reward"] == pytest.approx(reward.mean().item(), abs=1e-3)
    assert high["kl"] == pytest.approx(0, abs=1e-12) and high["ess"] == pytest.approx(64)
    for rows in (evaluate.gibbs_frontier(-reward.float(), [1e-6, 1.0, 1e6]), [low, high]):
        assert all(math.isfinite(value) for row in rows for value in row.values())


def test_offsets_of_prompts_move_the_curve_up_and_nothing_else():
    reward = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    offset = torch.tensor([[100.0], [-7.0], [0.0], [3.0], [14.0]])
    for a, b in zip(evaluate.gibbs_frontier(reward, BETAS), evaluate.gibbs_frontier(reward + offset, BETAS)):
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
    for seed in range(1000):
        policy = [draw_model(7000 + 3 * seed + p, spread=0.3 + seed / 300) for p in range(3)]
        kl = value = 0.0
        for logs, refs, values in zip(policy, logp, reward):
            kl += sum(math.exp(a) * (a - b) for a, b in zip(logs, refs)) / 3
            value += sum(math.exp(a) * r for a, r in zip(logs, values)) / 3
        best = evaluate.optimal_reward(doubles(kl), curve_kl, curve_reward).item()
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
        assert evaluate.optimal_reward(doubles(x), kl, value).item() == pytest.approx(y, abs=1e-3)
    inside, beyond = evaluate.optimal_reward(
        torch.tensor([0.0, kl[-1] * 1.01]), *(x.repeat(2, 1) for x in (kl, value))
    )
    assert inside.item() == pytest.approx(value[0].item()) and math.isnan(beyond.item())


def test_efficiency_is_one_on_the_curve_half_halfway_and_null_where_nothing_is_known():
    logp, reward = draw_world(P=8)
    scores = doubles(reward)
    points = evaluate.gibbs_points(scores, [10 ** (3 - g / 20) for g in range(80)], doubles(logp))
    policy = evaluate.gibbs_points(scores, [0.77], doubles(logp))
    sft = (doubles(logp).exp() * scores).sum(1)
    kl, value = policy["kl"][:, 0], policy["reward"][:, 0]
    on = evaluate.efficiency(value, sft, kl, points)
    assert on["frontier_efficiency"] == pytest.approx(1, abs=1e-3)
    assert on["frontier_efficiency_low"] == pytest.approx(1, abs=5e-3)  # of the same prompts: no spread
    assert on["optimal_reward"] == pytest.approx(value.mean().item(), abs=1e-3)
    half = evaluate.efficiency((value + sft) / 2, sft, kl, points)
    assert half["frontier_efficiency"] == pytest.approx(0.5, abs=1e-3)
    assert half["frontier_efficiency_low"] <= 0.5 + 1e-3 and half["frontier_efficiency_high"] >= 0.5 - 1e-3
    assert evaluate.efficiency(sft, sft, 0 * kl, points)["frontier_efficiency"] is None
    beyond = evaluate.efficiency(value, sft, kl + 50, points)
    assert set(beyond.values()) == {None}
    empty = {name: x[:, :0] for name, x in points.items()}
    assert set(evaluate.efficiency(value, sft, kl, empty).values()) == {None}


def test_the_curve_ends_where_the_effective_sample_size_does():
    score = torch.randn(4, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pool = {"score": score, "log_ratio": torch.zeros_like(score)}
    frontier, points = evaluate.draw_frontier(pool, {"score": score})
    assert len(frontier) == points["kl"].shape[1] > 20
    assert min(row["ess"] for row in frontier) >= 50 and frontier[-1]["ess"] < 70
    assert frontier[0]["kl"] < 1e-5 and frontier[0]["reward"] == pytest.approx(score.mean().item(), abs=1e-2)
    few = {name: x[:, :40] for name, x in pool.items()}
    assert evaluate.draw_frontier(few, few)[0] == []


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
    assert evaluate.best_of_n(reward, n) == pytest.approx(statistics.mean(by_reward), rel=1e-12)
    assert evaluate.best_of_n(reward, n, value) == pytest.approx(statistics.mean(by_value), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_best_of_n_kl_is_the_integral_over_the_quantile(n):
    steps = 200_000  # the best of n has density n u^(n-1) in the reward's quantile u
    middles = ((i + 0.5) / steps for i in range(steps))
    densities = (n * u ** (n - 1) for u in middles)
    integral = sum(d * math.log(d) for d in densities if d > 0) / steps
    assert evaluate.best_of_n_kl(n) == pytest.approx(integral, abs=1e-6)


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
    rate, low, high = evaluate.win_rate(score_a, score_b)
    assert rate == pytest.approx((wins + ties / 2) / n, rel=1e-12)
    assert low == pytest.approx(wilson_by_bisection(rate, n, -1), abs=1e-9)
    assert high == pytest.approx(wilson_by_bisection(rate, n, 1), abs=1e-9)
    mirrored = evaluate.win_rate(score_b, score_a)
    assert mirrored == pytest.approx((1 - rate, 1 - high, 1 - low), abs=1e-12)


def test_win_rate_known_values():
    rate, low, high = evaluate.win_rate(torch.zeros(10), torch.ones(10))
    assert (rate, low) == (0.0, 0.0) and high == pytest.approx(0.27753, abs=1e-5)  # z^2 / (n + z^2)
    with pytest.raises(ValueError):
        evaluate.win_rate(torch.zeros(0), torch.zeros(0))


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        low, high = evaluate.interval(2 + 3 * torch.randn(50, generator=generator, dtype=torch.float64))
        covered += low < 2 < high
        assert 0.8 < (high - low) / (2 * 1.96 * 3 / math.sqrt(50)) < 1.3 or covered < 300
    assert 0.90 <= covered / 300 <= 0.98  # 95%, less a little at 50 prompts


def test_distinct_2_by_hand():
    assert evaluate.distinct_2([[1, 2, 1, 2], [2, 1], [3]]) == pytest.approx(2 / 4)  # 12 21 12 / 21
    assert evaluate.distinct_2([[1, 2, 3], [3, 2, 1]]) == 1.0
    assert evaluate.distinct_2([[1], []]) == 0.0


def test_labels_are_moved_apart_and_keep_their_order():
    heights = [0.5, 0.1, 0.52, 0.51, 0.9]
    placed = evaluate.spread_labels(heights, 0.1)
    assert sorted(range(5), key=heights.__getitem__) == sorted(range(5), key=placed.__getitem__)
    assert all(b - a > 0.099 for a, b in itertools.pairwise(sorted(placed)))
    assert evaluate.spread_labels([0.0, 1.0], 0.1) == [0.0, 1.0]


# ------------------------------------------------------------------------------------------------- end to end
SMALL = ["--num_prompts", 6, "--samples_per_prompt", 16]
NUMBERS = """reward reward_low reward_high gold_reward kl kl_low kl_high response_length eos_rate perplexity
    distinct_2 optimal_reward frontier_efficiency win_rate_vs""".split()


def copy_run(source, folder, **changes):
    """The run of a folder once more, with other recorded arguments."""
    shutil.copytree(source, folder)
    record = json.loads((folder / "args.json").read_text())
    record["args"] |= changes
    (folder / "args.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def world(chain, tmp_path_factory):
    """The chain's folder with out/p3o of two large steps, and out/twin, the SFT model under another name."""
    folder = tmp_path_factory.mktemp("world") / "chain"
    shutil.copytree(chain, folder)
    small = ["--steps", 2, "--prompts_per_step", 16, "--minibatch_size", 8, "--eval_prompts", 8]
    done = run_script("p3o.py", *small, "--learning_rate", 3e-3, cwd=folder)
    assert done.returncode == 0, done.stderr
    copy_run(folder / "out/p3o", folder / "out/twin")
    shutil.copy(folder / "out/sft/model.safetensors", folder / "out/twin")
    return folder


@pytest.fixture(scope="module")
def evaluated(world):
    done = run_script("evaluate.py", *SMALL, "--device", "cpu", cwd=world)
    assert done.returncode == 0, done.stderr
    return world / "out/evaluation", done.stdout


@pytest.fixture
def here(world, evaluated, monkeypatch):
    monkeypatch.chdir(world)
    return world


def run_main(tmp_path, *runs, **options):
    """main on few samples, into a folder of its own; the summary."""
    defaults = {
        "num_prompts": 4,
        "samples_per_prompt": 8,
        "device": "cpu",
        "output_dir": str(tmp_path / "evaluation"),
    }
    args = evaluate.Args(runs=list(runs), **(defaults | options))
    evaluate.main(args)
    return json.loads((tmp_path / "evaluation/summary.json").read_text())


def test_everything_promised_is_written(evaluated):
    folder, printed = evaluated
    assert sorted(path.name for path in folder.iterdir()) == ["frontier.png", "report.md", "summary.json"]
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["policies"]) == {"sft", "p3o", "twin"}
    for name, numbers in summary["policies"].items():
        assert set(NUMBERS) <= set(numbers)
        assert set(numbers["win_rate_vs"]) == {"sft", "p3o", "twin"} - {name}
        assert all(low <= rate <= high for rate, low, high in numbers["win_rate_vs"].values())
        assert numbers["reward_low"] <= numbers["reward"] <= numbers["reward_high"]
        assert numbers["kl_low"] <= numbers["kl"] <= numbers["kl_high"]
    assert summary["judge"] is None
    assert [row["n"] for row in summary["best_of_n"]] == [1, 2, 4, 8]
    assert all(set(row) == {"n", "kl", "reward", "gold_reward"} for row in summary["best_of_n"])
    assert all(
        set(row) == {"beta", "kl", "reward", "ess", "gold_reward"} for row in summary["optimal_frontier"]
    )
    assert printed.splitlines()[-1].startswith("out/evaluation: ")
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_tells_what_the_summary_holds(evaluated):
    folder, _ = evaluated
    report, summary = (folder / "report.md").read_text(), json.loads((folder / "summary.json").read_text())
    for name, numbers in summary["policies"].items():
        assert f"| {name} | {numbers['reward']:.3f} [" in report
    for heading in ("Win rates by the reward model", "Win rates by the gold reward", "Responses, unselected"):
        assert f"## {heading}" in report
    assert "![reward against KL](frontier.png)" in report and "Sampled and exact KL differ" in report


def test_the_same_model_gives_the_same_answers(evaluated):
    policies = json.loads((evaluated[0] / "summary.json").read_text())["policies"]
    sft, twin = policies["sft"], policies["twin"]
    assert sft["kl"] == 0 == sft["reward_gain"] and abs(twin["kl"]) < 1e-6
    for name in ("reward", "gold_reward", "response_length", "perplexity", "distinct_2"):
        assert sft[name] == pytest.approx(twin[name], rel=1e-6)
    assert twin["win_rate_vs"]["sft"][0] == 0.5 == twin["gold_win_rate_vs"]["sft"][0]
    assert twin["frontier_efficiency"] is None
    assert policies["p3o"]["kl"] > 0.01


def test_evaluating_again_gives_the_same_and_replaces_only_when_told(here):
    before = json.loads((here / "out/evaluation/summary.json").read_text())
    again = run_script("evaluate.py", *SMALL, "--device", "cpu", cwd=here)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "--overwrite" in again.stderr
    assert again.stderr.count("\n") == 1
    again = run_script(
        "evaluate.py", "out/p3o", "out/twin", *SMALL, "--device", "cpu", "--overwrite", cwd=here
    )
    assert again.returncode == 0, again.stderr
    after = json.loads((here / "out/evaluation/summary.json").read_text())
    assert after["policies"] == before["policies"] and after["optimal_frontier"] == before["optimal_frontier"]


def test_without_matplotlib_all_else_is_written(here, tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "matplotlib.py").write_text("raise ImportError('not here')\n")
    options = ["out/p3o", *SMALL, "--output_dir", tmp_path / "evaluation"]
    done = run_script("evaluate.py", *options, cwd=here, env=os.environ | {"PYTHONPATH": str(stub)})
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == ["report.md", "summary.json"]
    told = [line for line in done.stdout.splitlines() if "pip install matplotlib" in line]
    assert len(told) == 1 and told[0] in (tmp_path / "evaluation/report.md").read_text()


def test_data_without_gold_reward(here, tmp_path):
    shutil.copytree("data/toy/prompts", tmp_path / "data/prompts")
    summary = run_main(tmp_path, "out/p3o", dataset=str(tmp_path / "data/prompts"))
    report = (tmp_path / "evaluation/report.md").read_text()
    assert "| gain |" in report and not re.search(r"\| gold|the gold reward", report)
    assert not any("gold" in name for numbers in summary["policies"].values() for name in numbers)
    assert not any("gold_reward" in row for row in summary["optimal_frontier"] + summary["best_of_n"])
    with_gold = run_main(tmp_path, "out/p3o", overwrite=True)
    for name, numbers in summary["policies"].items():
        assert {key: with_gold["policies"][name][key] for key in numbers} == numbers


def test_numbers_of_a_policy_by_hand(here, tmp_path):
    """Reward, gold reward, length and win rates once more from the responses and a naive loop."""
    caught = {}

    def catch(policies, *rest):
        caught.update(policies)
        return original(policies, *rest)

    original, evaluate.compare = evaluate.compare, catch
    try:
        numbers = run_main(tmp_path, "out/p3o")["policies"]["p3o"]
    finally:
        evaluate.compare = original
    from toy import gold_reward

    rows = [json.loads(line)["prompt"] for line in open("data/toy/prompts/test.jsonl")][:4]
    texts = caught["p3o"]["text"]
    golds = [gold_reward(rows[i // 8], text) for i, text in enumerate(texts)]
    assert numbers["gold_reward"] == pytest.approx(statistics.mean(golds), rel=1e-9)
    lengths = [len(ids) for ids in caught["p3o"]["ids"]]
    assert numbers["response_length"] == statistics.mean(lengths)
    pairs = list(zip(caught["p3o"]["score"].flatten().tolist(), caught["sft"]["score"].flatten().tolist()))
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert numbers["win_rate_vs"]["sft"][0] == pytest.approx(wins, rel=1e-12)
    total = sum(caught["p3o"]["logp_ref"].flatten().tolist())
    assert numbers["perplexity"] == pytest.approx(math.exp(-total / sum(lengths)), rel=1e-9)


def test_the_pool_holds_log_pi_sft_less_log_of_the_mixture(here):
    """Against every response read alone, without padding, by every model."""
    args = evaluate.Args(
        samples_per_prompt=4, temperature=0.7, prompt_length=32, response_length=24, missing_eos_penalty=1.0,
        device="cpu", micro_batch_size=3,
    )  # fmt: skip
    tokenizer = evaluate.load_tokenizer("out/sft")
    examples, eos_id = evaluate.read_examples("data/toy/prompts", ["test"], 0, tokenizer, args, 3)
    folders = {"sft": "out/sft", "p3o": "out/p3o", "twin": "out/twin"}
    load = (evaluate.load_model(evaluate.AutoModelForCausalLM, f, tokenizer, args) for f in folders.values())
    models = dict(zip(folders, load))
    scorer = evaluate.load_reward_model("out/reward_model", tokenizer, args)
    policies = {
        name: evaluate.answer(name, (model, models["sft"], *scorer), examples, eos_id, None, tokenizer, args)
        for name, model in models.items()
    }
    trained = {name: folder for name, folder in folders.items() if name != "sft"}
    pool = evaluate.pool_samples(policies, trained, examples, tokenizer, args)
    assert pool["score"].shape == pool["log_ratio"].shape == (3, 12)
    for column, name in enumerate(folders):
        for row in range(12):
            p, s = divmod(row, 4)
            prompt = torch.tensor([examples[p]["prompt_ids"]])
            response = torch.tensor([policies[name]["ids"][row]])
            batch = prompt, torch.ones_like(prompt).bool(), response, torch.ones_like(response).bool()
            with torch.no_grad():
                logps = [response_logps(m, *batch, 0.7).double().sum().item() for m in models.values()]
            expected = logps[0] - math.log(sum(map(math.exp, logps)) / 3)
            assert pool["log_ratio"][p, 4 * column + s].item() == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------------------------------- wrong inputs
def refused(here, tmp_path, *runs, **options):
    with pytest.raises(RunError) as error:
        run_main(tmp_path, *runs, **options)
    assert error.value.status == 2 and "\n" not in str(error.value)
    assert not (tmp_path / "evaluation").exists()
    return str(error.value)


def test_runs_with_different_sft_models_are_refused_in_one_line(here, tmp_path):
    copy_run(here / "out/p3o", tmp_path / "other", model="out/reward_model")
    done = run_script("evaluate.py", "out/p3o", tmp_path / "other", "--output_dir", tmp_path / "e", cwd=here)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(
        "error: runs differ in their model .*p3o: out/sft, other: out/reward_model.*; ", done.stderr
    )
    assert not (tmp_path / "e").exists()


def test_runs_with_another_tokenizer_are_refused(here, tmp_path):
    folder = copy_run(here / "out/p3o", tmp_path / "other")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"bakery"', '"brewery"'))
    assert "other has another tokenizer" in refused(here, tmp_path, "out/p3o", str(folder))


def test_settings_that_differ_are_refused_unless_given(here, tmp_path):
    folder = str(copy_run(here / "out/p3o", tmp_path / "other", temperature=0.5))
    assert "give --temperature" in refused(here, tmp_path, "out/p3o", folder)
    summary = run_main(tmp_path, "out/p3o", folder, temperature=0.8)
    assert summary["args"]["temperature"] == 0.8 and set(summary["policies"]) == {"sft", "p3o", "other"}
    folder = str(copy_run(here / "out/p3o", tmp_path / "third", reward_model="out/elsewhere"))
    (tmp_path / "evaluation/summary.json").unlink()
    shutil.rmtree(tmp_path / "evaluation")
    assert "give --reward_model" in refused(here, tmp_path, "out/p3o", folder)


def test_wrong_folders_are_refused(here, tmp_path):
    assert "holds no trained policy" in refused(here, tmp_path, "out/reward_model")
    assert "holds no trained policy" in refused(here, tmp_path, "out/nowhere")
    assert "--num_prompts 0" in refused(here, tmp_path, num_prompts=0)
    assert "judge" in refused(here, tmp_path, judge_model="some-model")
    assert "does not exist" in refused(here, tmp_path, "out/p3o", dataset="data/nowhere")
    assert "holds a run" in str(
        pytest.raises(RunError, run_main, tmp_path, "out/p3o", output_dir="out/p3o").value
    )


def test_the_sft_model_may_be_named_and_equal_names_become_paths(here, tmp_path):
    other = str(copy_run(here / "out/p3o", tmp_path / "p3o"))
    runs = evaluate.find_runs(evaluate.Args(runs=["out/sft", "out/p3o/", other]))
    assert set(runs) == {"out/p3o", other}
    assert evaluate.name_runs(["out/p3o", "--seed", "1"]) == ["--runs", "out/p3o", "--seed", "1"]
    assert evaluate.name_runs(["--seed", "1"]) == ["--seed", "1"] and evaluate.name_runs([]) == []


def test_without_runs_it_says_what_to_do(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain)
    with pytest.raises(RunError, match="no trained policy in out/; run p3o.py first"):
        run_main(tmp_path)
