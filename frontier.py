"""Stage 5: what the answers say: every policy against the best that any policy can reach at its KL.

    python frontier.py     after evaluate.py; loads no model, takes seconds

ends, after the quick start, with
    p3o: 95.4% of the optimum's gain at its KL, 1.29 nats; reward 2.475, 0.103 below the optimum.
    out/evaluation: summary.json, report.md, frontier.png
made from answers.jsonl and meta.json there, and replaced each time; nothing else is written.

max E[r] - beta KL(pi || pi_SFT) has a closed form, whose KL-reward curve no policy exceeds:

    pi*_beta(y|x) ~ pi_SFT(y|x) exp(r(x, y) / beta)              [Ziegler et al. 2019, 1909.08593]
    from samples y of q: w = softmax(r / beta + log pi_SFT / q)                gibbs_frontier, draw_optimum
    efficiency = (reward - reward_sft) / (optimal reward at the same KL - reward_sft)            efficiency
    best of n: the largest reward of n, at KL <= log n - (n - 1) / n                best_of_n, best_of_n_kl
    win rate: how often a response of a beats one of b, all S * S pairs per prompt     win_rate, cross_wins

Departures: the optimum is estimated, with the responses of all policies as q: those of the SFT model alone
hold hardly a good one once the KL exceeds 1 nat. It is drawn while the effective sample size, averaged over
the prompts, is at least 50; beyond, efficiencies are null. Intervals: 95%, percentile bootstrap over prompts.
Legend: P prompts, A policies, the SFT model first, S responses of each to every prompt, N = A * S responses
to a prompt in all; G values of beta. KL and log-probs in nats per response.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, field, fields
from itertools import permutations, product, takewhile
from pathlib import Path

import torch
from matplotlib.figure import Figure


@dataclass
class Args:
    input_dir: str = field(default="out/evaluation", metadata={"help": "folder that evaluate.py wrote"})


TRUSTED_ESS = 50
RESAMPLES = 1000
GAINS = {"reward": "reward_gain", "gold_reward": "gold_gain"}  # over the SFT model
HARMLESS = {**dict.fromkeys([*range(32), *range(127, 160)], " "), ord("|"): "\\|", ord("<"): "&lt;"}


# ------------------------------------------------------------------------------------------- the mathematics
def gibbs_frontier(reward, betas, log_ratio=None, gold=None):
    """The KL-reward curve of pi*_beta ~ pi_SFT exp(r / beta) [Ziegler et al. 2019], one dict per beta.

    With w0 = softmax(log_ratio), w = softmax(log_ratio + r / beta) over N samples y_n of q(.|x):
    reward = sum w r; kl = sum w log(w / w0), nats per response, which is sum w log(N w) where q is pi_SFT;
    ess = 1 / sum w^2, the effective sample size, 1 to N. Self-normalised: a bias of order 1 / ess.

    reward (P, N): r(x, y_n). betas: above 0. log_ratio (P, N): log pi_SFT(y_n|x) - log q(y_n|x), finite, up
    to a constant per prompt; None: q is pi_SFT. gold (P, N): another reward, averaged under the same optimum.
    Returns [{"beta", "ess", "kl", "reward"[, "gold_reward"]}, ...]: means over the P prompts, in float64.
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
        rows.append(row | {name: x.sum(1).mean().item() for name, x in terms.items()})
    return rows


def optimal_reward(kl, curve_kl, curve_reward):
    """The optimum's reward at a KL: curves (..., G) with rising KL, kl (...) -> (...); NaN beyond their end.

    Between two points linear in sqrt(KL), which is how the reward of a Gibbs curve starts out.
    """
    if curve_kl.shape[-1] < 2:
        return torch.full_like(kl, math.nan)
    root, x = curve_kl.clamp(min=0).sqrt(), kl.clamp(min=0).sqrt().unsqueeze(-1)
    right = torch.searchsorted(root.contiguous(), x).clamp(1, root.shape[-1] - 1)
    (x0, y0), (x1, y1) = ((root.gather(-1, i), curve_reward.gather(-1, i)) for i in (right - 1, right))
    y = y0 + (y1 - y0) * ((x - x0) / (x1 - x0)).clamp(min=0)
    return y.masked_fill(x > root[..., -1:], math.nan).squeeze(-1)


def efficiency(reward, reward_sft, kl, curve_kl, curve_reward):
    """optimal_reward and frontier_efficiency, [value, low, high] each; None beyond the curve, or at KL 0.

    reward, reward_sft, kl (P,); curve_kl, curve_reward (P, G): of every prompt, their means are the curve.
    """

    def optimum(share):
        return optimal_reward(share @ kl, share @ curve_kl, share @ curve_reward)

    def gain(share):
        ratio = share @ (reward - reward_sft) / (optimum(share) - share @ reward_sft)
        return ratio.masked_fill(share @ kl < 1e-6, math.nan)

    return {"optimal_reward": bootstrap(optimum, len(kl)), "frontier_efficiency": bootstrap(gain, len(kl))}


def best_of_n_kl(n):
    """log n - (n - 1) / n >= KL(best of n || pi_SFT), nats; equal without ties [Beirami et al. 2024]."""
    return math.log(n) - (n - 1) / n


def best_of_n(reward, n, value):
    """E[value of the response with the largest reward among n]: the mean over all subsets of n, no bias.

    reward, value (P, N), of samples of pi_SFT; n <= N. A float, the mean over the prompts.
    The i-th smallest of N is the largest of C(i - 1, n - 1) of the C(N, n) subsets.
    """
    ranked, N = value.double().gather(1, reward.argsort(1)), reward.shape[1]  # (P, N)
    share = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
    return (ranked * ranked.new_tensor(share)).sum(1).mean().item()


def win_rate(score_a, score_b):
    """How often a beats b, pair by pair, ties half: (rate, low, high), Wilson's 95% interval [Wilson 1927].

    score_a, score_b (M,). The interval takes the pairs as independent. ValueError if there are none.
    """
    n, z = len(score_a), 1.959963984540054
    if n == 0:
        raise ValueError("win_rate needs at least one pair")
    rate = ((score_a > score_b).double() + (score_a == score_b).double() / 2).mean().item()
    center, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return rate, max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def cross_wins(score_a, score_b):
    """Over all S * S pairs at each prompt, scores (P, S): the win rate of a, and the share of ties, (P,)."""
    a, b = score_a.repeat_interleave(score_b.shape[1], 1), score_b.repeat(1, score_a.shape[1])  # (P, S * S)
    rates = torch.tensor([win_rate(*pairs)[0] for pairs in zip(a, b)], dtype=torch.float64)
    return rates, (a == b).double().mean(1)


def bootstrap(statistic, num_prompts):
    """[value, low, high] of a statistic of the prompts, with its 95% percentile bootstrap over prompts.

    statistic: of share (M, P), the weight of every prompt in M samples of them, to (M,). None: not finite.
    """
    rows = torch.randint(num_prompts, (RESAMPLES, num_prompts), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.arange(num_prompts).unsqueeze(0), rows])  # first every prompt once: the value
    share = torch.zeros(rows.shape, dtype=torch.float64)
    values = statistic(share.scatter_add(1, rows, share + 1 / num_prompts))  # (1 + RESAMPLES,)
    interval = values[1:].quantile(values.new_tensor([0.025, 0.975]))
    return [x if math.isfinite(x) else None for x in (values[0].item(), *interval.tolist())]


# -------------------------------------------------------------------------------- failures, reading answers
def require(condition, message, status=2):
    """If it does not hold, ends the run in one line: what is wrong; what to do. Status 2: input, 1: run."""
    if not condition:
        message = "".join(c if c.isprintable() else "?" for c in message)  # no text may drive the terminal
        print(f"error: {message}", file=sys.stderr)
        sys.exit(status)


def command_line(main, args_class):
    """Command line -> main(args). An expected failure becomes one line and an exit status, no traceback."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message}; see --help")
    for x in fields(args_class):
        text = f"{x.metadata['help']} (default: {x.default})"
        parser.add_argument(f"--{x.name}", type=x.type, default=x.default, help=text)
    try:
        main(args_class(**vars(parser.parse_args())))
    except OSError as error:
        require(False, f"{error}; mend that, and run it again", 1)
    except KeyboardInterrupt:
        require(False, "interrupted; nothing that was saved is lost", 130)


def read_answers(folder):
    """{policy: its rows of answers.jsonl}, "sft" first, all with S answers to the same prompts; meta.json."""
    path, todo, policies = Path(folder, "answers.jsonl"), "run evaluate.py again", {"sft": []}
    require(path.exists(), f"{path} does not exist; run evaluate.py first, or give --input_dir")
    try:
        meta = json.loads(path.with_name("meta.json").read_text(encoding="utf-8"))
        S, policies = int(meta["samples_per_prompt"]), policies | {name: [] for name in meta["policies"]}
        for line in open(path, encoding="utf-8"):
            row = json.loads(line)
            policies[row["policy"]].append(row)
            numbers = [row[x] for x in ("prompt_id", "reward", "kl_exact", "length", "ended")]
            numbers += [row.get("gold_reward", 0), *(row["logp"][name] for name in policies)]
            if row.keys() != policies[row["policy"]][0].keys() or not all(math.isfinite(x) for x in numbers):
                raise ValueError(f"not finite, or not like other lines: {line}")
    except Exception as error:  # what is broken shows in many ways
        require(False, f"cannot read {path} and meta.json beside it ({error!r:.200}); {todo}")
    asked = [x for x in dict.fromkeys(row["prompt_id"] for row in policies["sft"]) for _ in range(S)]
    for name, rows in policies.items():
        complete = rows and [row["prompt_id"] for row in rows] == asked
        require(complete, f"{path} lacks answers of {name}: not {S} to every prompt of sft; {todo}")
    require(len(policies) > 1, f"{path} has no policy but sft; name runs to evaluate.py")
    return policies, meta


# ----------------------------------------------------------------------------------------------------- report
def draw_optimum(reward, logp, gold=None):
    """The optimum's curve as far as it can be trusted, from N responses of all policies to every prompt.

    reward, gold (P, N); logp (P, N, A), of each under every policy. Returns the rows of gibbs_frontier, with
    the smallest ess over the prompts as ess_min, and {"kl", "reward", "ess"}, (P, G), by prompt.
    """
    # As samples of the even mixture of all policies: the balance heuristic [Veach and Guibas 1995].
    log_ratio = logp[..., 0] - logp.logsumexp(-1) + math.log(logp.shape[-1])  # (P, N)
    scale = reward.std(1, correction=0).mean().item() or 1.0
    betas = [scale * 10 ** (3 - g / 20) for g in range(101)]  # KL from 1e-6 to where the samples give out
    rows = gibbs_frontier(reward, betas, log_ratio, gold)
    rows = list(takewhile(lambda row: row["ess"] >= TRUSTED_ESS, rows))
    alone = [gibbs_frontier(r, betas[: len(rows)], x) for r, x in zip(reward.split(1), log_ratio.split(1))]
    curves = {}
    for name in ("kl", "reward", "ess"):
        curves[name] = torch.tensor([[row[name] for row in own] for own in alone], dtype=torch.float64)
    return [row | {"ess_min": ess} for row, ess in zip(rows, curves["ess"].amin(0).tolist())], curves


def policy_numbers(own, sft, texts, curves):
    """The numbers of one policy for summary.json. own, sft: {"reward", "kl_exact", ...}, (P, S) each."""
    mean, mean_sft = ({x: values.mean(1) for x, values in data.items()} for data in (own, sft))  # (P,)
    kl, kl_sampled = mean["kl_exact"], mean["logp"] - mean["logp_sft"]  # the latter: k1
    values = {"kl": kl, "kl_sampled": kl_sampled}
    for of in [x for x in GAINS if x in own]:
        values |= {of: mean[of], GAINS[of]: mean[of] - mean_sft[of]}
    estimates = {x: bootstrap(lambda share: share @ values[x], len(kl)) for x in values}
    estimates |= efficiency(mean["reward"], mean_sft["reward"], kl, curves["kl"], curves["reward"])
    numbers = {}
    for name, (value, low, high) in estimates.items():
        numbers |= {name: value, f"{name}_low": low, f"{name}_high": high}
    error = (kl_sampled - kl).std(correction=0).item() / math.sqrt(len(kl))
    numbers["kl_difference"] = (kl_sampled - kl).mean().item() / error if error > 1e-9 else 0.0
    numbers["response_length"] = own["length"].mean().item()
    numbers["eos_rate"] = own["ended"].mean().item()
    numbers["perplexity"] = math.exp(-own["logp_sft"].sum() / own["length"].sum())
    pairs = [pair for words in map(str.split, texts) for pair in zip(words, words[1:])]
    return numbers | {"distinct_2": len(set(pairs)) / max(len(pairs), 1)}


def summarize(policies, S):
    """What summary.json says of the policies, of the optimum and of best of n."""
    rewards, data = [x for x in GAINS if all(x in rows[0] for rows in policies.values())], {}
    for name, rows in policies.items():
        columns = {x: [row[x] for row in rows] for x in (*rewards, "kl_exact", "length", "ended")}
        columns |= {x: [row["logp"][y] for row in rows] for x, y in (("logp", name), ("logp_sft", "sft"))}
        columns["logps"] = [[row["logp"][other] for other in policies] for row in rows]
        data[name] = {x: torch.tensor(columns[x], dtype=torch.float64).unflatten(0, (-1, S)) for x in columns}
    pool = {x: torch.cat([own[x] for own in data.values()], 1) for x in (*rewards, "logps")}  # (P, N)
    frontier, curves = draw_optimum(pool["reward"], pool["logps"], pool.get("gold_reward"))
    sft, numbers, best = data["sft"], {}, []
    for name, own in data.items():
        numbers[name] = policy_numbers(own, sft, [row["response"] for row in policies[name]], curves)
    for of, (a, b) in product(rewards, permutations(data, 2)):
        wins, ties = cross_wins(data[a][of], data[b][of])  # (P,)
        rate = bootstrap(lambda share: share @ wins, len(wins))
        numbers[a].setdefault(of.replace("reward", "win_rate_vs"), {})[b] = rate
        numbers[a].setdefault(of.replace("reward", "tie_rate_vs"), {})[b] = ties.mean().item()
    for n in [2**k for k in range(S.bit_length()) if 2**k <= max(1, S // 2)]:
        means = {of: best_of_n(sft["reward"], n, sft[of]) for of in rewards}
        best.append({"n": n, "kl": best_of_n_kl(n)} | means)
    return {"policies": numbers, "optimal_frontier": frontier, "best_of_n": best}


def show(x, low=None, high=None):
    """A number and its interval, where there is one; a dash for None."""
    text = "-" if x is None else f"{x:.3f}"
    return text if low is None else f"{text} [{low:.3f}, {high:.3f}]"


def markdown_table(rows):
    """Rows of texts, the first one the heading; no text may break the table or drive a terminal."""
    lines = ["| " + " | ".join(text.translate(HARMLESS) for text in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def win_table(numbers, key=""):
    """Win rates and shares of ties, row against column: numbers[a][key + "win_rate_vs"][b], "tie_rate_vs"."""
    rows = [["wins against", *numbers]]
    for a, own in numbers.items():
        rates, ties = own[f"{key}win_rate_vs"], own[f"{key}tie_rate_vs"]
        texts = {b: f"{show(*rates[b])}, ties {show(ties[b])}" for b in rates}
        rows.append([a, *(texts.get(b, "") for b in numbers)])
    return markdown_table(rows)


def findings(summary):
    """Sentences: how far each policy is from the optimum, and what cannot be trusted."""
    lines, end = [], (summary["optimal_frontier"] or [dict.fromkeys(("kl", "ess", "ess_min"), 0.0)])[-1]
    for name, x in summary["policies"].items():
        share, at = x["frontier_efficiency"], f"at its KL, {x['kl']:.2f} nats"
        if share is not None:
            gap = f"reward {x['reward']:.3f}, {x['optimal_reward'] - x['reward']:.3f} below the optimum"
            lines.append(f"{name}: {100 * share:.1f}% of the optimum's gain {at}; {gap}.")
        elif name != "sft":
            lines.append(f"{name}: no efficiency {at}: 0, or where the optimum is not known.")
        if (x["frontier_efficiency_low"] or 0) > 1:
            lines.append(f"WARNING: {name} is above the optimum, which is impossible: few samples, or a bug.")
        if abs(x["kl_difference"]) > 4:
            apart = f"sampled and exact KL are {abs(x['kl_difference']):.1f} standard errors apart"
            lines.append(f"WARNING: {name}: {apart}: few samples, or a bug (temperature, top-k, dropout).")
    sizes = f"effective sample size {end['ess']:.0f}, {end['ess_min']:.0f} at the worst prompt"
    return lines + [f"The optimum is known up to KL {end['kl']:.2f}: {sizes}."]


def write_report(summary, policies, path):
    """report.md: the table, findings, win rates, and first responses to the first prompts, side by side."""
    numbers, meta = summary["policies"], summary["meta"]
    columns = "reward reward_gain gold_gain kl kl_sampled optimal_reward frontier_efficiency response_length"
    columns = [x for x in f"{columns} eos_rate perplexity distinct_2".split() if x in numbers["sft"]]
    rows, samples = [["policy", *columns]], [["prompt", *policies]]
    for name, own in numbers.items():
        rows.append([name, *(show(own[x], own.get(f"{x}_low"), own.get(f"{x}_high")) for x in columns)])
    for first in range(0, len(policies["sft"]), meta["samples_per_prompt"])[:6]:
        texts = [f"{own[first]['response']} ({own[first]['reward']:.2f})" for own in policies.values()]
        samples.append([policies["sft"][first]["prompt"], *texts])
    parts = ["# Evaluation", ", ".join(f"{name}: {value}" for name, value in meta.items())]
    parts += ["Gains: over the SFT model. KL: nats per response. Intervals: 95%, bootstrap over prompts."]
    parts += [markdown_table(rows), "\n".join(f"- {line}" for line in findings(summary)), "![](frontier.png)"]
    parts += ["## Win rates by the reward model, over all pairs at a prompt, ties half", win_table(numbers)]
    if "gold_win_rate_vs" in numbers["sft"]:
        parts += ["## Win rates by the gold reward", win_table(numbers, "gold_")]
    parts += ["## Responses (rewards), unselected", markdown_table(samples)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- picture
COLORS = "black #D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9".split()  # Okabe and Ito, for all eyes
TITLES = {"reward": "what they train on: the reward model", "gold_reward": "what is wanted: the gold reward"}


def draw_panel(axis, of, summary):
    """Gain in `of`, reward or gold_reward, over the SFT model, against KL: optimum, best of n, policies."""
    policies, gain, zero = summary["policies"], GAINS[of], summary["policies"]["sft"][of]
    right = 1.1 * max(1e-3, *(x["kl_high"] for x in policies.values()))
    optimum, best = ([x for x in summary[y] if x["kl"] <= right] for y in ("optimal_frontier", "best_of_n"))
    kl, height = [x["kl"] for x in optimum], [x[of] - zero for x in optimum]
    axis.plot(kl, height, color="black", lw=2.4, label="optimum for the reward model")
    points = [x["kl"] for x in best], [x[of] - zero for x in best]
    axis.plot(*points, "D:", color="#777777", ms=4, label="best of 1, 2, 4, ...")
    for (name, x), color, marker in zip(policies.items(), COLORS * len(policies), "so^vPXd" * len(policies)):
        bars = [[[abs(x[f"{y}_{end}"] - x[y])] for end in ("low", "high")] for y in ("kl", gain)]
        share = x["frontier_efficiency"]
        label = name if share is None else f"{name}: {share:.0%} of its gain at equal KL"
        style = {"fmt": marker, "ms": 6, "mec": "white", "mew": 0.6, "color": color, "label": label}
        axis.errorbar(x["kl"], x[gain], xerr=bars[0], yerr=bars[1], **style)
    if of == "reward":
        low, high = axis.get_ylim()
        axis.fill_between(kl, height, high, color="black", alpha=0.07, lw=0)
        axis.set_ylim(low, high)
        axis.text(0.03, 0.96, "no policy\ncan be here", va="top", color="#555555", transform=axis.transAxes)
        axis.legend(loc="lower right", fontsize=9)
    axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    axis.set(title=TITLES[of], xlim=(0, right), xlabel="KL to the SFT model, nats (square-root scale)")
    axis.set_ylabel("gain over the SFT model")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)


# ------------------------------------------------------------------------------------------------------ main
def main(args):
    policies, meta = read_answers(args.input_dir)
    summary = summarize(policies, meta["samples_per_prompt"])
    summary["meta"] = {name: value for name, value in meta.items() if isinstance(value, str | int | float)}
    folder, panels = Path(args.input_dir), [x for x in TITLES if x in summary["policies"]["sft"]]
    figure = Figure(figsize=(4.9 * len(panels), 4.2), layout="tight")
    for axis, of in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw_panel(axis, of, summary)
    figure.savefig(folder / "frontier.png", dpi=200)
    write_report(summary, policies, folder / "report.md")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False), encoding="utf-8")
    print("\n".join(findings(summary)))
    print(f"{folder}: summary.json, report.md, frontier.png")


if __name__ == "__main__":
    command_line(main, Args)
