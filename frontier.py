"""Compares each policy with the best that any policy can reach at the same KL to the SFT model.

More reward can always be bought with more KL. The optimum of E[r] - beta KL(pi || pi_SFT) is known in closed
form. Its reward against its KL, drawn for all beta, is a curve that no policy exceeds.

    python evaluate.py && python frontier.py      # frontier.py loads no model and takes seconds; it ends with
    p3o: gain 2.13 over the SFT model, 96% of what is possible at its KL, 1.28 nats/response; reward 2.139
    out/evaluation: summary.json, report.md, frontier.png

    optimum       pi*(y|x) ~ pi_SFT(y|x) exp(r(x, y) / beta)  [Ziegler et al. 2019]    gibbs_frontier
    efficiency    (reward - SFT's) / (optimal reward at this KL - SFT's)               efficiency
    best of n     the response with the largest reward among n                         best_of_n, best_of_n_kl
    win rate      how often a response of one policy has the larger reward             win_rate, cross_wins

The optimum is estimated from the responses of all policies together, because the SFT model alone samples
hardly any response that is good enough. It is trusted while its effective sample size, the mean over prompts,
is at least 50. Beyond that, efficiencies are null. All intervals are 95% bootstraps over prompts.

Read gibbs_frontier and draw_optimum first.

Notation: P prompts, A policies with the SFT model as the first, S responses of each policy to each prompt,
N = A * S responses to each prompt, G values of beta. KL and log-probs are in nats per response.
"""

import argparse
import json
import math
import sys
from itertools import permutations, product, takewhile
from pathlib import Path

import torch
from matplotlib.figure import Figure

TRUSTED_ESS = 50
RESAMPLES = 1000
GAINS = {"reward": "reward_gain", "gold_reward": "gold_gain"}  # each of them minus the SFT model's


# ------------------------------------------------------------------------------------------- the mathematics
def gibbs_frontier(reward, betas, log_ratio=None, gold=None):
    """The KL and the reward of pi*(y|x) ~ pi_SFT(y|x) exp(r / beta), for each beta [Ziegler et al. 2019].

    The N responses y_n to each prompt are samples of q(y|x). The importance weights of pi* and of pi_SFT are
    w = softmax(log_ratio + r / beta) and w0 = softmax(log_ratio), so that
        reward = sum w r        kl = sum w log(w / w0), in nats per response        ess = 1 / sum w^2
    The effective sample size ess lies between 1 and N. The weights sum to 1, which biases by about 1 / ess.

    reward is r(x, y_n), (P, N), and betas are above 0. log_ratio is log pi_SFT - log q, (P, N), up to a
    constant per prompt, or None if q is pi_SFT. gold (P, N) is another reward to average under the same pi*.
    Returns [{"beta", "ess", "kl", "reward"[, "gold_reward"]}, ...], means over the P prompts in float64.
    """
    reward = reward.double()
    base = torch.zeros_like(reward) if log_ratio is None else log_ratio.double()
    log_w0, below_best, rows = base.log_softmax(1), reward - reward.amax(1, keepdim=True), []
    for beta in betas:
        log_w = (below_best / beta + base).log_softmax(1)  # (P, N)
        w = log_w.exp()
        terms = {"kl": w * (log_w - log_w0), "reward": w * reward}
        if gold is not None:
            terms["gold_reward"] = w * gold
        row = {"beta": float(beta), "ess": (1 / (w * w).sum(1)).mean().item()}
        rows.append(row | {name: term.sum(1).mean().item() for name, term in terms.items()})
    return rows


def optimal_reward(kl, curve_kl, curve_reward):
    """The optimum's reward at a KL (...), read from curves (..., G) with rising KL. NaN beyond their end.

    Between two points it is linear in sqrt(KL), because a Gibbs curve starts out like that.
    """
    if curve_kl.shape[-1] < 2:
        return torch.full_like(kl, math.nan)
    root, x = curve_kl.clamp(min=0).sqrt(), kl.clamp(min=0).sqrt().unsqueeze(-1)
    right = torch.searchsorted(root.contiguous(), x).clamp(1, root.shape[-1] - 1)
    (x0, y0), (x1, y1) = ((root.gather(-1, i), curve_reward.gather(-1, i)) for i in (right - 1, right))
    y = y0 + (y1 - y0) * ((x - x0) / (x1 - x0)).clamp(min=0)
    return y.masked_fill(x > root[..., -1:], math.nan).squeeze(-1)


def efficiency(reward, reward_sft, kl, curve_kl, curve_reward):
    """The optimum's reward at the KL of a policy, and the policy's gain as a share of the optimum's gain.

    reward, reward_sft and kl are (P,). curve_kl and curve_reward are (P, G), and their means over prompts
    are the curve. Returns {"optimal_reward", "frontier_efficiency"}, [value, low, high] each. They are None
    beyond the end of the curve, and the share is None at KL 0.
    """

    def optimum(share):
        return optimal_reward(share @ kl, share @ curve_kl, share @ curve_reward)

    def gain(share):
        ratio = share @ (reward - reward_sft) / (optimum(share) - share @ reward_sft)
        return ratio.masked_fill(share @ kl < 1e-6, math.nan)

    return {"optimal_reward": bootstrap(optimum, len(kl)), "frontier_efficiency": bootstrap(gain, len(kl))}


def best_of_n_kl(n):
    """log n - (n - 1) / n nats, at least KL(best of n || pi_SFT). Equal if there are no ties [2401.01879]."""
    return math.log(n) - (n - 1) / n


def best_of_n(reward, n, value):
    """The mean value of the response that has the largest reward among n, over all subsets of n responses.

    reward and value are (P, N), of samples of pi_SFT, with n <= N. Returns the mean over prompts, a float.
    The i-th smallest of N rewards is the largest in C(i - 1, n - 1) of the C(N, n) subsets.
    """
    ranked, N = value.double().gather(1, reward.argsort(1)), reward.shape[1]  # (P, N)
    share = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
    return (ranked * ranked.new_tensor(share)).sum(1).mean().item()


def win_rate(score_a, score_b):
    """How often a beats b, pair by pair. Ties count half. Returns (rate, low, high).

    score_a and score_b are (M,). The interval is Wilson's at 95%, and it takes the M pairs as independent
    [Wilson 1927]. Raises ValueError if there are none.
    """
    n, z = len(score_a), 1.959963984540054
    if n == 0:
        raise ValueError("win_rate needs at least one pair")
    rate = ((score_a > score_b).double() + (score_a == score_b).double() / 2).mean().item()
    center, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return rate, max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def cross_wins(score_a, score_b):
    """The win rate of a over b and the share of ties, over all S * S pairs at a prompt: (P,) each.

    score_a and score_b are (P, S).
    """
    a, b = score_a.repeat_interleave(score_b.shape[1], 1), score_b.repeat(1, score_a.shape[1])  # (P, S * S)
    rates = torch.tensor([win_rate(*pairs)[0] for pairs in zip(a, b)], dtype=torch.float64)
    return rates, (a == b).double().mean(1)


def bootstrap(statistic, num_prompts):
    """A statistic of the prompts with its 95% percentile bootstrap over prompts: [value, low, high].

    statistic maps weights of the prompts (M, P), whose rows sum to 1, to M values. None stands for a value
    that is not finite.
    """
    rows = torch.randint(num_prompts, (RESAMPLES, num_prompts), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.arange(num_prompts).unsqueeze(0), rows])  # the first row has each prompt once
    share = torch.zeros(rows.shape, dtype=torch.float64)
    values = statistic(share.scatter_add(1, rows, share + 1 / num_prompts))  # (1 + RESAMPLES,)
    interval = values[1:].quantile(values.new_tensor([0.025, 0.975]))
    return [x if math.isfinite(x) else None for x in (values[0].item(), *interval.tolist())]


# ----------------------------------------------------------------------------------------------- the answers
# From here to show, the functions are the same text in frontier.py and judge.py.
def check(condition, message):
    """Ends the program with a one-line error message if the condition does not hold."""
    if not condition:
        sys.exit(f"error: {message}")


def read_answers(folder):
    """Reads answers.jsonl of evaluate.py. Returns {policy: rows} with "sft" first, and the settings.

    Each policy has S rows for each prompt, and the prompts are in the same order.
    """
    path = Path(folder, "answers.jsonl")
    check(path.is_file(), f"{path} does not exist; run evaluate.py first, or give another --input_dir")
    try:
        with open(path, encoding="utf-8") as file:
            settings, *rows = [json.loads(line) for line in file]
        policies = {name: [] for name in ("sft", *settings["policies"])}
        for row in rows:
            policies[row["policy"]].append(row)
        asked = [i for i in range(settings["num_prompts"]) for _ in range(settings["samples_per_prompt"])]
        complete = all([row["prompt_id"] for row in part] == asked for part in policies.values())
    except (ValueError, KeyError, TypeError):  # half a line, for example, or a file of another program
        complete = False
    check(complete, f"{path} lacks a line, or has one twice; make it again with evaluate.py --overwrite")
    return policies, settings


def show(number, low=None, high=None):
    """A number and its interval as text. A dash stands for None."""
    text = "-" if number is None else f"{number:.3f}"
    return text if low is None else f"{text} [{low:.3f}, {high:.3f}]"


# ------------------------------------------------------------------------------------- what the answers say
def draw_optimum(reward, logp, gold=None):
    """The optimum's curve as far as it can be trusted, from N responses of all policies to each prompt.

    reward and gold are (P, N). logp (P, N, A) is the log-prob of each response under each policy. Returns the
    rows of gibbs_frontier, with the smallest ess over prompts as ess_min, and the curves of the prompts,
    {"kl", "reward", "ess"}, (P, G) each.
    """
    # The pool is a sample of the even mixture of all policies [balance heuristic, Veach and Guibas 1995].
    log_ratio = logp[..., 0] - logp.logsumexp(-1) + math.log(logp.shape[-1])  # (P, N)
    scale = reward.std(1, correction=0).mean().item() or 1.0
    betas = [scale * 10 ** (3 - g / 20) for g in range(101)]  # from KL 1e-6 to where the samples run out
    rows = gibbs_frontier(reward, betas, log_ratio, gold)
    rows = list(takewhile(lambda row: row["ess"] >= TRUSTED_ESS, rows))
    pairs = zip(reward.split(1), log_ratio.split(1))
    by_prompt = [gibbs_frontier(r, betas[: len(rows)], ratio) for r, ratio in pairs]
    curves = {}
    for name in ("kl", "reward", "ess"):
        curves[name] = torch.tensor([[row[name] for row in one] for one in by_prompt], dtype=torch.float64)
    return [row | {"ess_min": ess} for row, ess in zip(rows, curves["ess"].amin(0).tolist())], curves


def policy_numbers(data, sft, texts, curves):
    """The numbers of one policy for summary.json. data and sft hold columns of answers.jsonl, (P, S) each."""
    mean, mean_sft = ({name: values.mean(1) for name, values in part.items()} for part in (data, sft))  # (P,)
    kl, kl_sampled = mean["kl_exact"], mean["logp"] - mean["logp_sft"]
    values = {"kl": kl, "kl_sampled": kl_sampled}
    for name in [name for name in GAINS if name in data]:
        values |= {name: mean[name], GAINS[name]: mean[name] - mean_sft[name]}
    estimates = {name: bootstrap(lambda share: share @ values[name], len(kl)) for name in values}
    estimates |= efficiency(mean["reward"], mean_sft["reward"], kl, curves["kl"], curves["reward"])
    numbers = {}
    for name, (value, low, high) in estimates.items():
        numbers |= {name: value, f"{name}_low": low, f"{name}_high": high}
    error = (kl_sampled - kl).std(correction=0).item() / math.sqrt(len(kl))
    numbers["kl_difference"] = (kl_sampled - kl).mean().item() / error if error > 1e-9 else 0.0
    numbers |= {"response_length": data["length"].mean().item(), "eos_rate": data["ended"].mean().item()}
    numbers["perplexity"] = math.exp(-data["logp_sft"].sum() / data["length"].sum())
    pairs = [pair for words in map(str.split, texts) for pair in zip(words, words[1:])]
    return numbers | {"distinct_2": len(set(pairs)) / max(len(pairs), 1)}


def summarize(policies, S):
    """The content of summary.json: the policies, the optimum and best of n."""
    rewards = [key for key in GAINS if all(key in row for rows in policies.values() for row in rows)]
    data = {}
    for name, rows in policies.items():
        columns = {key: [row[key] for row in rows] for key in (*rewards, "kl_exact", "length", "ended")}
        columns["logp"] = [row["logp"][name] for row in rows]
        columns["logp_sft"] = [row["logp"]["sft"] for row in rows]
        columns["logps"] = [[row["logp"][other] for other in policies] for row in rows]
        columns = {key: torch.tensor(column, dtype=torch.float64) for key, column in columns.items()}
        data[name] = {key: column.unflatten(0, (-1, S)) for key, column in columns.items()}  # (P, S[, A])
        finite = all(column.isfinite().all() for column in columns.values())
        check(finite, f"a number of {name} is not finite; run evaluate.py --overwrite without this policy")
    pool = {key: torch.cat([part[key] for part in data.values()], 1) for key in (*rewards, "logps")}  # (P, N)
    frontier, curves = draw_optimum(pool["reward"], pool["logps"], pool.get("gold_reward"))
    sft, numbers, best = data["sft"], {}, []
    for name, columns in data.items():
        numbers[name] = policy_numbers(columns, sft, [row["response"] for row in policies[name]], curves)
    for name, (a, b) in product(rewards, permutations(data, 2)):
        wins, ties = cross_wins(data[a][name], data[b][name])  # (P,)
        rate = bootstrap(lambda share: share @ wins, len(wins))
        numbers[a].setdefault(name.replace("reward", "win_rate_vs"), {})[b] = rate
        numbers[a].setdefault(name.replace("reward", "tie_rate_vs"), {})[b] = ties.mean().item()
    for n in [2**k for k in range(S.bit_length()) if 2**k <= max(1, S // 2)]:
        means = {name: best_of_n(sft["reward"], n, sft[name]) for name in rewards}
        best.append({"n": n, "kl": best_of_n_kl(n)} | means)
    return {"policies": numbers, "optimal_frontier": frontier, "best_of_n": best}


# ------------------------------------------------------------------------------------------------ the report
def findings(summary):
    """Sentences about each policy, about how far the optimum is known, and about what looks wrong."""
    lines = [] if summary["optimal_frontier"] else ["The optimum is not known. Take more samples per prompt."]
    for end in summary["optimal_frontier"][-1:]:
        known = (
            f"The optimum is known up to KL {end['kl']:.2f} nats/response. There the effective sample size is"
        )
        lines.append(f"{known} {end['ess']:.0f}, and {end['ess_min']:.0f} at the worst prompt.")
    for name, numbers in summary["policies"].items():
        if (numbers["frontier_efficiency_low"] or 0) > 1:
            lines.append(f"WARNING: {name} is above the optimum, which is impossible. Take more samples.")
        if abs(numbers["kl_difference"]) > 4:
            apart = f"{abs(numbers['kl_difference']):.1f} standard errors apart"
            lines.append(f"WARNING: {name}: exact and sampled KL are {apart}. The sampling may have a bug.")
    for name, numbers in list(summary["policies"].items())[1:]:
        gain, share = f"gain {numbers['reward_gain']:.2f} over the SFT model", numbers["frontier_efficiency"]
        best = "not known how much is possible" if share is None else f"{share:.0%} of what is possible"
        level = f"{numbers['kl']:.2f} nats/response; reward {numbers['reward']:.3f}"
        lines.append(f"{name}: {gain}, {best} at its KL, {level}")
    return lines


def markdown_table(rows):
    """A table of texts, whose first row is the heading. No text can break it or control a terminal."""
    harmless = {**dict.fromkeys([*range(32), *range(127, 160)], " "), ord("|"): "\\|", ord("<"): "&lt;"}
    lines = ["| " + " | ".join(text.translate(harmless) for text in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def win_table(numbers, prefix=""):
    """The win rate of each policy, a row, against each other policy, a column, and their ties."""
    rows = [["win rate against", *numbers]]
    for name in numbers:
        rates, ties = numbers[name][f"{prefix}win_rate_vs"], numbers[name][f"{prefix}tie_rate_vs"]
        texts = {other: f"{show(*rates[other])}, ties {show(ties[other])}" for other in rates}
        rows.append([name, *(texts.get(other, "") for other in numbers)])
    return markdown_table(rows)


def write_report(summary, policies, path):
    """Writes report.md: the numbers, the findings, the win rates, and some responses side by side."""
    numbers, settings = summary["policies"], summary["settings"]
    keys = "reward reward_gain gold_gain kl kl_sampled optimal_reward frontier_efficiency response_length"
    keys = [key for key in f"{keys} eos_rate perplexity distinct_2".split() if key in numbers["sft"]]
    rows, samples = [["policy", *keys]], [["prompt", *policies]]
    for name, part in numbers.items():
        rows.append([name, *(show(*(part.get(key + end) for end in ("", "_low", "_high"))) for key in keys)])
    for first in range(0, len(policies["sft"]), settings["samples_per_prompt"])[:6]:
        texts = [f"{part[first]['response']} ({part[first]['reward']:.2f})" for part in policies.values()]
        samples.append([policies["sft"][first]["prompt"], *texts])
    units = (
        "KL is in nats per response, and kl_sampled is estimated from log-probs. The perplexity is the SFT"
    )
    units += " model's, per token of the responses. Intervals are 95% bootstraps over prompts."
    parts = ["# Evaluation", "\n".join(f"- {line}" for line in findings(summary)), "![](frontier.png)"]
    parts += [markdown_table(rows), units]
    parts += ["## Win rates by the reward model, of all pairs at a prompt", win_table(numbers)]
    if "gold_win_rate_vs" in numbers["sft"]:
        parts += ["## Win rates by the gold reward", win_table(numbers, "gold_")]
    parts += ["## First responses to the first prompts, and their rewards", markdown_table(samples)]
    parts += ["## Settings", "\n".join(f"- {name}: {value}" for name, value in settings.items())]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------- the picture
COLORS = "black #D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9".split()  # also for the colour-blind
TITLES = {"reward": "reward, which is trained on", "gold_reward": "gold reward, which is wanted"}


def draw_panel(axis, key, summary):
    """Draws the gain over the SFT model against the KL: the optimum, best of n and the policies."""
    policies, gain, start = summary["policies"], GAINS[key], summary["policies"]["sft"][key]
    right = 1.1 * max(1e-3, *(numbers["kl_high"] for numbers in policies.values()))
    curves = summary["optimal_frontier"], summary["best_of_n"]
    optimum, best = ([point for point in curve if point["kl"] <= right] for curve in curves)
    kl, height = [x["kl"] for x in optimum], [x[key] - start for x in optimum]
    axis.plot(kl, height, color="black", lw=2.4, label="optimum for the reward model")
    points = [x["kl"] for x in best], [x[key] - start for x in best]
    axis.plot(*points, "D:", color="#777777", ms=4, label="best of 1, 2, 4, ... (KL is an upper bound)")
    looks = zip(COLORS * len(policies), "so^vPXd" * len(policies))
    for (name, numbers), (color, marker) in zip(policies.items(), looks):
        bars = [[[abs(numbers[f"{x}_{end}"] - numbers[x])] for end in ("low", "high")] for x in ("kl", gain)]
        share = numbers["frontier_efficiency"]
        label = name if share is None else f"{name}: {share:.0%} of what is possible at its KL"
        style = {"fmt": marker, "color": color, "label": label, "clip_on": False}
        axis.errorbar(numbers["kl"], numbers[gain], *bars[::-1], ms=6, mec="white", mew=0.6, **style)
    if key == "reward":
        low, high = axis.get_ylim()
        axis.fill_between(kl, height, high, color="black", alpha=0.07, lw=0)
        axis.set_ylim(low, high)
        axis.text(0.03, 0.96, "no policy\ncan be here", va="top", color="#555555", transform=axis.transAxes)
    axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    axis.set(title=TITLES[key], xlim=(0, right), ylabel="gain over the SFT model")
    axis.set_xlabel("KL to the SFT model, nats per response (square-root scale)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)


# ------------------------------------------------------------------------------------------------------ main
def main(args):
    policies, settings = read_answers(args.input_dir)
    summary = summarize(policies, settings["samples_per_prompt"])
    summary["settings"] = settings["settings"]
    folder, panels = Path(args.input_dir), [key for key in TITLES if key in summary["policies"]["sft"]]
    figure = Figure(figsize=(4.9 * len(panels), 4.8), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw_panel(axis, key, summary)
    entries = figure.axes[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=len(panels), frameon=False)
    figure.savefig(folder / "frontier.png", dpi=200)
    write_report(summary, policies, folder / "report.md")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False), encoding="utf-8")
    print("\n".join(findings(summary)))
    print(f"{folder}: summary.json, report.md, frontier.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--input_dir", default="out/evaluation", help="folder that evaluate.py wrote")
    main(parser.parse_args())
