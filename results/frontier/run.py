"""Which method gets the most reward for its KL, and how near does it come to the best that is possible?

    python results/frontier/run.py [--plots_only]     measures again, or tables and picture only

Every method samples 7,680 responses at each of four betas. Offline DPO trains on labelled pairs instead.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lib
from toy_task import ToyWithOptimum, best_gain

SEEDS, BETAS, DRAWN = range(1, 6), (1.0, 0.5, 0.25, 0.1), ("P3O", "PPO", "DPO", "online DPO")
METHODS = (*DRAWN, "P3O-V1", "pairwise gradient", "PPO-max")
RIVALS = {"PPO": 0.5, "DPO": 0.5, "online DPO": 1.0}  # the beta at which their KL is nearest to P3O's at 0.5
PAPER = {"PPO": "57.0", "DPO": "54.6", "SFT": "69.3"}  # %, judged by GPT-4; 6B model on HH
CRITIC = {  # what is changed: method, flags
    "PPO": ("PPO", {}),
    "PPO, lambda 1": ("PPO", {"lam": 1.0}),
    "PPO without a critic": ("PPO", {"lam": 1.0, "critic_init": "sft", "critic_learning_rate": 1e-9}),
    "P3O": ("P3O", {}),
    "P3O, gradient norm unclipped": ("P3O", {"max_grad_norm": 1000.0}),
}
PLAN = []
for m, beta in [(m, beta) for m in METHODS for beta in BETAS]:
    labels = {"keep_gold": beta == {"P3O": 0.5, **RIVALS}.get(m), "variant": None, "beta": beta}
    PLAN += [lib.run(m, seed, labels, beta=beta) for seed in SEEDS]
PLAN += [lib.run(m, seed, {"variant": x}, **flags) for x, (m, flags) in CRITIC.items() for seed in SEEDS]


def gain_at(found, points, kl):
    """A seed's gain at a KL: its share of the optimum, linear in the root of the KL; None beyond it."""
    known = sorted((point["kl"] ** 0.5, point["share"]) for point in points if point["share"])
    if not known or kl**0.5 > known[-1][0] + 1e-9:
        return None
    right = next(i for i, (x, _) in enumerate(known) if kl**0.5 <= x + 1e-9)
    (x0, y0), (x1, y1) = known[max(right - 1, 0)], known[right]
    way = min(max((kl**0.5 - x0) / (x1 - x0), 0), 1) if right else 0
    return (y0 + (y1 - y0) * way) * best_gain(found, kl)


def lead(found, method, kl):
    """P3O's gain minus another method's at a KL, seed by seed."""
    values = []
    for seed in SEEDS if method != "P3O" else ():
        gains = [gain_at(found, found.pick(method=m, seed=seed, variant=None), kl) for m in ("P3O", method)]
        values += [gains[0] - gains[1]] if None not in gains else []
    return lib.t_interval(values)


def win_rate(ours, theirs):
    """How often, in %, ours has more true reward, ties half; and the ties. Over all pairs at a prompt."""
    S, wins, ties = len(ours) // 128, 0, 0
    for first in range(0, len(ours), S):
        pairs = [(a, b) for a in ours[first : first + S] for b in theirs[first : first + S]]
        wins, ties = wins + sum(a > b for a, b in pairs), ties + sum(a == b for a, b in pairs)
    return 100 * (wins + ties / 2) / (len(ours) * S), 100 * ties / (len(ours) * S)


def wins(found):
    """A row for each rival of P3O at beta 0.5."""
    rows, ours = [], {x["seed"]: x["gold"] for x in found.pick(method="P3O", beta=0.5, variant=None)}
    for rival in (*RIVALS, "SFT"):
        theirs = found.pick(method=rival, beta=RIVALS.get(rival), variant=None)
        if rival == "SFT":
            theirs = [{"seed": seed, "kl": 0.0, "gold": found.sft["gold"]} for seed in ours]
        pairs = [win_rate(ours[x["seed"]], x["gold"]) for x in theirs if x["seed"] in ours and x["gold"]]
        row = {"P3O, beta 0.5, against": f"{rival}, beta {RIVALS[rival]:g}" if rival in RIVALS else rival}
        row |= {"wins, %": lib.t_interval([x for x, _ in pairs])}
        row["ties, %"] = f"{sum(x for _, x in pairs) / len(pairs):.1f}" if pairs else None
        rows.append(row | {"its KL": lib.interval(theirs, "kl"), "in the paper, %": PAPER.get(rival)})
    return rows


def tables(found):
    methods, shares, critic = [], [], []
    for m in METHODS:
        points = found.pick(method=m, beta=0.5, variant=None)
        names = {"KL": "kl", "gain": "gain", "true gain": "gold_gain", "share of the optimum": "share"}
        row = {"method": m} | {title: lib.interval(points, x) for title, x in names.items()}
        methods.append(row | {f"P3O's gain minus its, at KL {kl}": lead(found, m, kl) for kl in (1, 2)})
    for m in DRAWN:
        cells = {f"beta {beta:g}": found.pick(method=m, beta=beta, variant=None) for beta in BETAS}
        row = {"share of the optimum": m} | {x: lib.interval(y, "share") for x, y in cells.items()}
        kls = [f"{lib.interval(x, 'kl')[0]:.2f}" for x in cells.values() if x]
        shares.append(row | {"at KL, nats": ", ".join(kls)})
    for x in CRITIC:
        points, ppo = found.pick(variant=x), found.pick(variant="PPO") if x != "PPO" else []
        row = {"variant": x, "objective": lib.interval(points, "objective")}
        critic.append(row | {"minus PPO": lib.paired(points, ppo, "objective")})
    return {"methods": methods, "shares": shares, "critic": critic, "wins": wins(found)}


def picture(found):
    figure, (axis,) = lib.axes(1, 7.0, 4.6)
    for m in DRAWN:
        points = [found.pick(method=m, beta=beta, variant=None) for beta in BETAS]
        kls, shares = ([lib.interval(x, name) for x in points] for name in ("kl", "share"))
        lib.curve(axis, m, [kl[0] if kl else None for kl in kls], shares, kls, lw=2)
    axis.axhline(1, color="black", lw=2)
    axis.text(0.62, 0.993, "the best that any policy can do", va="top", fontsize=10)
    axis.set(ylim=(0.8, 1.01), xlim=(0.6, 3.1), xlabel="KL to the SFT model, nats per response")
    axis.set_ylabel("reward gained, as a share of the best")
    axis.legend(loc="lower right", fontsize=10, ncols=2)
    axis.set_title("PPO is slightly ahead of P3O; both are ahead of DPO", fontsize=13)
    return figure


def main(argv=None):
    lib.main(__file__, PLAN, tables, picture, ToyWithOptimum(), argv)


if __name__ == "__main__":
    main()
