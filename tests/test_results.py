"""results/reproduce.py: its arithmetic, what it repeats and what it does not, and the README's numbers."""

import csv
import importlib.util
import itertools
import json
import re
import statistics
import subprocess

import pytest
import torch
from conftest import ROOT

import p3o
import toy


def load(name):
    """A script of results/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reproduce = load("reproduce")
NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)")  # not the digits of P3O-V2


BEST, LUCKY = "K 8", "cosine"  # of the settings on seed 0, and on the others, in the logs made here


def parse(folder, *words):
    return reproduce.parse_args([*words, "--folder", str(folder)])


def synthetic_log(flags, kl, gain, gold, sha="a"):
    """What measure() returns, for two prompts with two responses each."""
    prompts = {
        "reward": [1 + gain] * 2,
        "gold": [1 + gold] * 2,
        "kl": [kl] * 2,
        "length": [9.0] * 2,
        "eos": [1.0] * 2,
    }
    curve = [
        {
            "step": step,
            "eval_reward": gain * step,
            "eval_kl_exact": kl * step,
            "eval_gold": gold * step * (1.5 - step),
            "eval_gold_even": gold * step * (1.4 - step),
            "eval_gold_odd": gold * step * (1.6 - step),
        }
        | {"clip_fraction": 0.1, "log_ratio_max": 0.5, "grad_norm_min": 0.3, "grad_norm_max": 2.0}
        for step in (0, 0.5, 1)
    ]
    log = {
        "git_commit": "0123456789",
        "versions": {},
        "hardware": "a machine",
        "minutes": 1.0,
        "flags": flags,
    }
    responses = [[gold, gold + 0.1], [gold, gold - 0.1]]
    return log | {"prompts": prompts, "gold": responses, "curve": curve, "sha256": sha}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Logs of two seeds of every run; beta is what decides the KL."""
    folder = tmp_path_factory.mktemp("results")
    args = parse(folder, "--seeds", "2")
    reproduce.write_log(
        args, "sft", synthetic_log({}, 0.0, 0.0, 0.0) | {"reward_spread": 1.3, "reward_variance": 2.0}
    )
    kls = [0.01 * i for i in range(801)]
    optimum = {
        "kl": kls,
        "reward": [1 + 2 * kl**0.5 for kl in kls],
        "gold_reward": [1 + kl**0.5 for kl in kls],
    }
    reproduce.write_log(args, "optimum", optimum)
    for experiment in (*reproduce.EXPERIMENTS, "distance"):  # again: its later runs depend on the first
        for run in reproduce.plan(experiment, args):
            kl = 0.8 / run["beta"] + 0.1 * run["seed"]
            gain = (1 + 0.1 * (run["method"] == "p3o-v2")) * kl**0.5 + 0.01 * run["seed"]
            gain -= (
                0.02 * (run["method"] == "ppo" and "offsets" in run) * run.get("times", 0)
            )  # they cost PPO
            gain += 0.03 * (run.get("setting") == BEST) + 0.1 * (
                run.get("setting") == LUCKY and run["seed"] > 0
            )
            log = synthetic_log(
                run["flags"],
                kl,
                gain,
                gain / 2,
                sha=f"p3o {run['seed']}" if run["method"] == "p3o-v2" else run["name"],
            )
            reproduce.write_log(args, run["name"], log)
    errors = {"PPG": 1.0, "VPG": 50.0, "leave-one-out": 1.0, "PPO, whitened": 0.5}
    errors = {name: {"variance": x, "cosine": 1 / (1 + x), "error": x} for name, x in errors.items()}
    errors |= {"norm of the truth": 1.0}
    variance = {"batches": 3, "policies": {"SFT": errors, "after PPO": errors}}
    reproduce.write_log(args, "variance", synthetic_log({}, 0, 0, 0) | variance)
    return folder


def table(folder, experiment):
    with open(folder / f"{experiment}.csv") as file:
        return list(csv.DictReader(file))


def test_plots_only_writes_everything(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing may be started"))
    reproduce.main(parse(folder, "--plots_only", "--seeds", "2"))
    for experiment in reproduce.EXPERIMENTS:
        assert (folder / f"{experiment}.png").stat().st_size > 5000
        text = (folder / f"{experiment}.md").read_text()
        assert (
            f"Commit 0123456; seeds {int(experiment not in ('tuning', 'distance'))}" in text
            and "a machine" in text
            and "missing" not in text
        )
        cells = {
            n for row in table(folder, experiment) for cell in row.values() for n in NUMBER.findall(cell)
        }
        shown = [line for line in text.splitlines() if line.startswith("|")]
        assert shown and {n for line in shown for n in NUMBER.findall(line)} <= cells | {"90", "95"}
    rows = table(folder, "equivalence")
    assert {row["identical weights"] for row in rows if row["method"] == "p3o-v2"} == {"2 of 2"}
    assert {row["identical weights"] for row in rows if row["method"] == "ppo" and row["times"] == "4"} == {
        "0 of 2"
    }
    lost = {
        (row["method"], row["offsets"], row["times"]): row["objective lost"]
        for row in rows
        if row["objective lost"]
    }
    for kind in ("noise", "by place"):
        assert lost["p3o-v2", kind, "16"] == "0.000" and lost["ppo", kind, "16"] == "0.320"
    assert len(lost) == 26
    ahead = {
        (row["offsets"], row["times"]): float(row["difference"])
        for row in rows
        if row["p3o-v2 minus"] == "ppo"
    }
    assert ahead["noise", "0"] == ahead["by place", "0"]
    for kind in ("noise", "by place"):
        assert ahead[kind, "16"] - ahead[kind, "0"] == pytest.approx(0.32, abs=2e-3)
    rows = [row for row in table(folder, "overoptimisation") if row["gold at the peak"]]
    for (
        row
    ) in rows:  # the even prompts are highest half way, and the odd ones tell what was there: 0.55 of 0.6
        assert float(row["gold at the peak"]) == pytest.approx(
            float(row["gold at the end"]) * 0.55 / 0.6, abs=2e-3
        )
        assert row["lowest after it"] == row["gold at the peak"]
    assert len(rows) == 4
    rows = [row for row in table(folder, "distance") if row["table"].startswith("default")]
    assert {row["more than default"][:5] for row in rows if row["setting"] == "default"} == {"0.000"}
    (best,) = {row["setting"] for row in rows if row["method"] == "p3o-v2"} - {"default"}
    assert best == BEST and {row["more than default"][:5] for row in rows if row["setting"] == best} == {
        "0.030"
    }
    rows = {row["method"]: row for row in table(folder, "critic")}
    assert rows["ppo"]["minus ppo"] == "0.000" != rows["ppo-lam1"]["objective"]
    assert rows["ppo"]["norm, minimum"] == "0.300" and rows["ppo"]["norm, maximum"] == "2.000"
    paired = [row for row in table(folder, "frontier") if row["p3o-v2 minus"] == "ppo" and row["KL"] == "2"]
    assert 0.05 < float(paired[0]["difference"]) < 0.15 * 2**0.5
    paper = [row["paper, GPT-4, HH %"] for row in table(folder, "head_to_head") if row["against"] == "sft"]
    assert "69.3" in paper


def test_a_missing_run_is_named_and_left_out(folder, tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    gone = f"ppg_beta{reproduce.BETA:g}_epochs8_seed2"
    for path in (folder / "logs").glob("*.json"):
        if path.stem != gone:
            (tmp_path / "logs" / path.name).symlink_to(path)
    reproduce.main(parse(tmp_path, "staleness", "--plots_only", "--seeds", "2"))
    assert f"missing: {gone}" in capsys.readouterr().out
    assert f"missing: {gone}" in (tmp_path / "staleness.md").read_text()
    seeds = {(row["method"], row["epochs"]): row["seeds"] for row in table(tmp_path, "staleness")}
    assert seeds["ppg", "8"] == "1" and seeds["p3o-v1", "8"] == "2"


def test_interpolation_is_linear_in_the_root_of_the_kl():
    points = [
        (4.0, 3.0),
        (1.0, 1.0),
    ]  # between them gain = 2 sqrt(KL) - 1; below 1 to the SFT model: sqrt(KL)
    assert reproduce.interpolate(points, [2.25, 4.0, 0.25, 4.01]) == pytest.approx([2.0, 3.0, 0.5, None])
    assert reproduce.interpolate([(0.0, 0.0)], [0.5]) == [None]  # a policy that never moved


def optimum(kl):
    """Gains of some optimum: neither linear nor linear in the root of the KL."""
    return [2 * k**0.5 - 0.3 * k for k in kl]


@pytest.mark.parametrize(
    "share",
    [lambda kl: 1.0, lambda kl: 0.9, lambda kl: 0.95 - 0.1 * kl**0.5],
    ids=["the optimum", "a constant share", "a falling share"],
)
def test_uneven_points_give_a_known_curve_back(share):
    """Chords between gains would not: an exactly optimal policy would seem worse for having few points."""
    kls, wanted = [0.05, 0.9, 2.5], [0.05, 0.3, 1.0, 2.0, 2.5]
    points = [(kl, share(kl) * optimum([kl])[0]) for kl in kls]
    expected = [share(kl) * best for kl, best in zip(wanted, optimum(wanted))]
    for order in itertools.permutations(points):
        found = reproduce.interpolate_shares(list(order), wanted, optimum)
        assert found == pytest.approx(expected, rel=1e-9)
    chords = reproduce.interpolate(points, wanted)
    assert chords != pytest.approx(expected, rel=1e-3)


def test_shares_beyond_the_points():
    points = [(1.0, 0.5 * optimum([1.0])[0]), (0.0, 0.0)]
    found = reproduce.interpolate_shares(points, [0.25, 1.0, 1.1], optimum)
    assert found == pytest.approx([0.5 * optimum([0.25])[0], 0.5 * optimum([1.0])[0], None])
    assert reproduce.interpolate_shares([(0.0, 0.0)], [0.5], optimum) == [None]


def test_wins_over_all_cross_pairs():
    a, b = [[1.0, 2.0, 2.0], [0.0, 5.0, 1.0]], [[2.0, 0.0, 1.0], [5.0, 5.0, -1.0]]
    outcomes = [(x > y) + 0.5 * (x == y) for rows in zip(a, b) for x in rows[0] for y in rows[1]]
    ties = [x == y for rows in zip(a, b) for x in rows[0] for y in rows[1]]
    assert reproduce.win_and_tie_rate(a, b) == pytest.approx((sum(outcomes) / 18, sum(ties) / 18))
    assert reproduce.win_and_tie_rate(b, a)[0] == pytest.approx(1 - sum(outcomes) / 18)


def test_the_win_rate_interval_covers_what_other_trainings_would_give():
    """Trainings differ, and both policies draw with the same random numbers: still 95% or nearly."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(32, 6, generator=generator, dtype=torch.float64)  # of six texts at 32 prompts
    gold = torch.randn(32, 6, generator=generator, dtype=torch.float64)

    def trained(better):  # text probabilities (32, 6) of a training: nearer to the gold reward, by luck too
        luck = 0.3 * torch.randn(1, generator=generator, dtype=torch.float64)
        return (base + (better + luck) * gold).softmax(1)

    def true_rate(a, b):
        difference = gold.unsqueeze(2) - gold.unsqueeze(1)
        score = (difference > 0).double() + (difference == 0).double() / 2
        return torch.einsum("pi,pij,pj->p", a, score, b).mean().item()

    truth = sum(true_rate(trained(0.4), trained(0.0)) for _ in range(1000)) / 1000
    covered, by_wilson = 0, 0
    for _ in range(200):
        rates, draws = [], []
        for _ in range(5):
            uniform = torch.rand(32, 8, generator=generator, dtype=torch.float64)  # of both policies
            texts = [torch.searchsorted(trained(x).cumsum(1), uniform).clamp(max=5) for x in (0.4, 0.0)]
            draws.append([gold.gather(1, text) for text in texts])
            rates.append(reproduce.win_and_tie_rate(*(x.tolist() for x in draws[-1]))[0])
        row = reproduce.stat("wins", rates)
        covered += row["wins_low"] < truth < row["wins_high"]
        _, low, high = reproduce.theory.win_rate(*(torch.cat(x).flatten() for x in zip(*draws)))
        by_wilson += low < truth < high
    assert 0.91 <= covered / 200 <= 0.98
    assert by_wilson / 200 < 0.85  # what pooled draws give, as if there had been one training


def test_errors_of_estimators_with_a_known_truth():
    """Gradients of ten numbers: truth t, an unbiased noisy one, a biased one with little noise."""
    generator, truth = torch.Generator().manual_seed(0), torch.arange(1.0, 11.0, dtype=torch.float64)

    def batches(count):
        for _ in range(count):
            noise = torch.randn(2, 10, generator=generator, dtype=torch.float64)
            yield {"PPO, lam = 1": truth + 2 * noise[0], "biased": truth * 0.5 + 0.1 * noise[1]}

    mean, noise = reproduce.true_gradient(batches(4000))
    torch.testing.assert_close(mean, truth, rtol=0, atol=0.15)
    assert noise == pytest.approx(10 * 4 / 4000, rel=0.1)
    table, square = reproduce.errors_of(batches(4000), mean, noise), (truth @ truth).item()
    assert table["PPO, lam = 1"]["variance"] == pytest.approx(40, rel=0.05)
    assert table["PPO, lam = 1"]["error"] == pytest.approx(40 / square, rel=0.05)
    assert table["biased"]["error"] == pytest.approx(0.25 + 0.1 / square, rel=0.05)
    assert table["biased"]["cosine"] > 0.999 > table["PPO, lam = 1"]["cosine"] > 0.9


def test_offsets_between_prompts_and_what_chance_makes_of_none():
    log = {"reward_spread": 1.5, "prompts": {"reward": [1.0, 2.0, 6.0], "gold": [0.0, 0.0, 3.0]}}
    log["gold"] = [
        [-2.0, -1.0, 1.0, 2.0],
        [-4.0, -2.0, 2.0, 4.0],
        [0.0, 0.0, 0.0, 0.0],
    ]  # variances 10/3, 40/3, 0
    log["reward_variance"] = 4.0
    model, gold = reproduce.offsets(log)
    assert list(model.values()) == ["reward model", 1.5, pytest.approx(7**0.5), 1.0]
    spread = ((10 / 3) ** 0.5 + (40 / 3) ** 0.5) / 3
    assert list(gold.values())[1:] == pytest.approx([spread, 3**0.5, (50 / 9 / 4) ** 0.5])


def test_offsets_by_place_are_exact_and_as_large_as_asked():
    """float64 adds them without rounding, so that P3O, which sees differences, cannot tell."""
    shift = load("shift_by_place")
    offsets = torch.tensor(list(shift.place_offsets(6.8).values()), dtype=torch.float64)
    assert offsets.std(unbiased=False).item() == pytest.approx(6.8, rel=1e-2) and abs(offsets.mean()) < 0.01
    scores = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).double().unsqueeze(-1)
    shifted = scores + offsets
    assert torch.equal(shifted[:, 0] - shifted[:, 1], (scores[:, 0] - scores[:, 1]).expand_as(shifted[:, 0]))


def test_a_script_with_offsets_by_place_adds_that_of_the_place_in_the_prompt(monkeypatch):
    """On the toy's own prompts: each asks about one place."""
    shift, seen = load("shift_by_place"), []
    monkeypatch.setattr(
        p3o, "load_reward", lambda tokenizer, args: lambda batch: torch.zeros(len(batch["prompt"]))
    )
    monkeypatch.setattr(
        p3o, "guard", lambda main, args: seen.append(p3o.load_reward(None, p3o.Args(device="cpu")))
    )
    shift.main("p3o.py", 6.8)
    offsets = shift.place_offsets(6.8)
    asked = [(place, toy.ASPECTS[0]) for place in toy.PLACES]
    prompts = [f"{opening} {toy.ENDINGS[0]}".format(*pair) for pair in asked for opening in toy.OPENINGS]
    found = seen[0]({"prompt": prompts}).tolist()
    assert found == [offsets[place] for place, _ in asked for _ in toy.OPENINGS] and len(set(found)) > 3


@pytest.mark.parametrize(
    "change, rates, beta2",
    [
        ("constant", [1.0, 1.0, 1.0, 1.0], 0.95),
        ("cosine", [1.0, 0.853553, 0.5, 0.146447], 0.95),
        ("0.999", [1.0, 0.75, 0.5, 0.25], 0.999),
    ],
)
def test_an_optimizer_with_another_schedule(change, rates, beta2):
    """The first step of Adam is as long as the rate; the second run goes on from the state of the first."""
    adam, weight = load("with_optimizer").make_adam(change), torch.nn.Parameter(torch.zeros(1))

    def build():
        return adam([weight], 1.0, betas=(0.9, 0.95), eps=0.0, fused=True)  # the rate as ppo.py gives it

    optimizer = build()
    for step, rate in enumerate(rates):
        if step == 2:
            state, optimizer = optimizer.state_dict(), build()
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = 1.0 - step / 4  # as the scripts set it
        before, weight.grad = weight.item(), torch.ones(1)
        optimizer.step()
        assert before - weight.item() == pytest.approx(rate, abs=1e-5)
        assert optimizer.param_groups[0]["lr"] == 1.0 - step / 4
    assert optimizer.param_groups[0]["betas"] == (0.9, beta2)


def test_responses_needed():
    curve = [(4000, 0.9), (1000, 0.8), (16000, 0.98)]
    assert reproduce.responses_to(curve, 0.85) == 2000  # half way on a logarithmic scale
    assert reproduce.responses_to(curve, 0.94) == 8000
    assert reproduce.responses_to(curve, 0.7) == "at most 1000"
    assert reproduce.responses_to(curve, 0.99) is None


def test_t_interval():
    mean, low, high = reproduce.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * 2.5**0.5 / 5**0.5  # variance 2.5, 4 degrees of freedom
    assert (mean, low, high) == pytest.approx((3.0, 3 - half, 3 + half))
    assert reproduce.t_interval([2.0]) == (2.0, None, None)
    assert reproduce.stat("x", [1.0, None]) == {"x": None, "x_low": None, "x_high": None}


def test_finished_runs_are_skipped_and_unfinished_ones_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "measure", lambda run: {"flags": run["flags"]})
    calls = []

    def run_nothing(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, int("dpo.py" in command[1]), "trained\n", "error: no\n")

    monkeypatch.setattr(subprocess, "run", run_nothing)
    args = parse(tmp_path, "--processes", "1")
    new, begun, done, failing = (reproduce.make_run(m, 0.1, 1) for m in ("p3o-v2", "ppo-max", "ppg", "dpo"))
    (tmp_path / reproduce.RUNS / begun["name"]).mkdir(parents=True)
    (tmp_path / reproduce.RUNS / begun["name"] / "args.json").write_text("{}")
    reproduce.write_log(args, done["name"], {"flags": done["flags"]})
    reproduce.train([new, begun, done, failing, new], args)
    assert [command[1].rpartition("/")[2] for command in calls] == ["p3o.py", "ppo.py", "dpo.py"]
    assert ["--resume" in command for command in calls] == [False, True, False]
    assert "--preset ppo_max" in " ".join(calls[1]) and "--beta 0.1" in " ".join(calls[1])
    logs = {path.stem for path in (tmp_path / "logs").glob("*.json")}
    assert logs == {run["name"] for run in (new, begun, done)}  # what failed has no log, and is tried again
    reproduce.train([new, begun, done], args)
    assert len(calls) == 3


def test_equal_runs_have_equal_names():
    default = reproduce.p3o.Args()
    batch = {"prompts_per_step": default.prompts_per_step, "minibatch_size": default.minibatch_size}
    same = reproduce.make_run(
        "p3o-v2", 0.2, 1, num_responses=2, epochs=default.epochs, reward_shift=0, **batch
    )
    assert same == reproduce.make_run("p3o-v2", 0.2, 1)
    args = parse(ROOT / "results")
    runs = [run for experiment in reproduce.EXPERIMENTS for run in reproduce.plan(experiment, args)]
    for a, b in itertools.combinations(runs, 2):
        assert a["name"] != b["name"] or (a["script"], a["flags"]) == (b["script"], b["flags"])


def test_a_quick_look_scales_every_length(tmp_path):
    runs = reproduce.plan("distance", parse(tmp_path, "--steps", "8"))
    steps = {(run["setting"], run["times"]): run["flags"]["steps"] for run in runs}
    assert steps["default", 1] == steps["240 steps", 1] == 8 and steps["default", 0.25] == 2


@pytest.mark.parametrize("page", reproduce.PAGES)
def test_tables_of_a_page_are_those_of_the_committed_csvs(page, tmp_path):
    """Every cell is written by reproduce.py from the table, row and column that the page names."""
    text = (ROOT / page).read_text()
    copy = tmp_path / "page.md"
    copy.write_text(reproduce.BLOCK.sub(r"\1nothing\n\4", text))
    assert len(reproduce.BLOCK.findall(text)) >= 1 and copy.read_text() != text
    reproduce.fill_page(copy, ROOT / "results")
    assert copy.read_text() == text
    assert "<!-- results" not in re.sub(r"<!-- results:\w+ \{", "", text), "a table that nothing fills"


CRITIC = "critic", "critic"


def cosine(policy, estimator):
    return "variance", "gradients", {"policy": policy, "estimator": estimator}, "cosine"


BOTH = "", "_low", "_high"
HELD_OUT, LEAD, PLACES = "default and best on the other seeds", "objective, seed by seed", "by place"
SAMPLES, TUNED = "more and fewer responses", "K 8, rate 0.0005"


def behind(method, times, *columns):
    """Of P3O over a method with offsets by place."""
    where = {"p3o-v2 minus": method, "offsets": PLACES, "times": times}
    return [("equivalence", LEAD, where, column) for column in columns]


OVER_PROMPTS = "over prompts_low", "over prompts_high"


def lead(own, its, *columns):
    """Of P3O over PPO, each in a setting."""
    return [("distance", LEAD, {"p3o-v2": own, "minus ppo": its}, column) for column in columns]


def gold_at(method):
    """The gold gain of a method at beta 0.05 and at beta 0.25."""
    ends = [f"gold_gain{end}" for end in BOTH]
    here = [("overoptimisation", "after training", {"method": method}, end) for end in ends]
    return here + [("frontier", "every beta", {"method": method, "beta": "0.25"}, end) for end in ends]


def passes(method, epochs, *columns):
    return [("staleness", "staleness", {"method": method, "epochs": epochs}, column) for column in columns]


def behind_v2(method):
    return passes(method, "8", "-minus p3o-v2", "-minus p3o-v2_high", "-minus p3o-v2_low")


CURVES = "overoptimisation", "training curves, means over seeds", {"method": "dpo"}
AGAINST = "{:.3f} [{:.3f}, {:.3f}] against {:.3f} [{:.3f}, {:.3f}]"
CLAIMS = [  # a sentence of results/README.md, and for each {} of it: experiment, table, row, column; "-": negated
    (
        "is {:.3f} [{:.3f}, {:.3f}] behind PPO, much as P3O-V2 is, {:.3f} [{:.3f}, {:.3f}]",
        *[(*CRITIC, {"method": "ppo-no-critic"}, f"-minus ppo{end}") for end in ("", "_high", "_low")],
        *[(*CRITIC, {"method": "p3o-v2"}, f"-minus ppo{end}") for end in ("", "_high", "_low")],
    ),
    (
        "cannot be told from PPO with its lam, {:.3f} [{:.3f}, {:.3f}]",
        *[(*CRITIC, {"method": "ppo-lam1"}, f"minus ppo{end}") for end in ("", "_low", "_high")],
    ),
    ("P3O reaches {:.1f} nats", ("frontier", "every beta", {"method": "p3o-v2", "beta": "0.1"}, "kl")),
    ("in a step is never below {:.2f}", (*CRITIC, {"method": "p3o-v2"}, "norm, least of all")),
    ("PPO's never above {:.2f}", (*CRITIC, {"method": "ppo"}, "norm, most of all")),
    (
        "has a cosine of {:.2f} to the true one, the plain policy gradient's is {:.2f}, PPO's {:.2f}, and with "
        "lam = 1, without bias, as much: {:.2f}",
        *[cosine("after PPO", name) for name in ("PPG", "VPG", "PPO", "PPO, lam = 1")],
    ),
    (
        "loses nothing by more: {:.3f} [{:.3f}, {:.3f}] at two passes, {:.3f} [{:.3f}, {:.3f}] at eight",
        *passes("p3o-v2", "2", "objective", "objective_low", "objective_high"),
        *passes("p3o-v2", "8", "objective", "objective_low", "objective_high"),
    ),
    ("V1 is behind it by {:.3f} [{:.3f}, {:.3f}]", *behind_v2("p3o-v1")),
    ("weights without a clip are by {:.3f} [{:.3f}, {:.3f}]", *behind_v2("p3o-weighted")),
    ("second pass on, by {:.3f} [{:.3f}, {:.3f}]", *behind_v2("ppg")),
    ("its KL reaches {:.3f} nats, V2's {:.3f}", *passes("ppg", "8", "kl"), *passes("p3o-v2", "8", "kl")),
    ("of offline DPO is highest at {:.3f} nats", (*CURVES, "KL at the gold peak")),
    ("rises by {:.3f} [{:.3f}, {:.3f}]", *[(*CURVES, f"proxy since the peak{end}") for end in BOTH]),
    ("does not: {:.3f} [{:.3f}, {:.3f}]", *[(*CURVES, f"gold since the peak{end}") for end in BOTH]),
    (f"the offline one {AGAINST}", *gold_at("dpo")),
    (f"the online one {AGAINST}", *gold_at("online-dpo")),
    (f"With P3O no loss shows, {AGAINST}", *gold_at("p3o-v2")),
    (f"nor with PPO, {AGAINST}", *gold_at("ppo")),
    (
        "PPO is still ahead, by {:.3f} [{:.3f}, {:.3f}]",
        *behind("ppo", "1", "-difference", "-difference_high", "-difference_low"),
    ),
    (
        "cannot be told from P3O, {:.3f} [{:.3f}, {:.3f}]",
        *behind("ppo", "4", "difference", "difference_low", "difference_high"),
    ),
    (
        "it is behind, by {:.3f} [{:.3f}, {:.3f}]",
        *behind("ppo", "16", "difference", "difference_low", "difference_high"),
    ),
    (
        "without it PPO is behind by {:.3f} [{:.3f}, {:.3f}]",
        *behind("ppo-values-unclipped", "16", "difference", "difference_low", "difference_high"),
    ),
    (
        "P3O gains {:.3f} [{:.3f}, {:.3f}] by it",
        *[
            ("distance", HELD_OUT, {"method": "p3o-v2", "setting": TUNED}, f"more than default{end}")
            for end in BOTH
        ],
    ),
    (
        "from its default, {:.3f} [{:.3f}, {:.3f}] (over prompts [{:.3f}, {:.3f}])",
        *lead(TUNED, "default", "difference", "difference_low", "difference_high", *OVER_PROMPTS),
    ),
    (
        "from its best, {:.3f} [{:.3f}, {:.3f}] (over prompts [{:.3f}, {:.3f}])",
        *lead(TUNED, "4 epochs", "difference", "difference_low", "difference_high", *OVER_PROMPTS),
    ),
    ("most of PPO's lead of {:.3f}, perhaps", *lead("default", "default", "-difference")),
    (
        "at 7680 responses it gets {:.3f} of the optimum's gain",
        ("distance", SAMPLES, {"method": "trl-rloo", "responses": "7680"}, "efficiency"),
    ),
    (
        "with ten times as many P3O gets {:.3f}.",
        ("distance", SAMPLES, {"method": "p3o-v2", "responses": "76800"}, "efficiency"),
    ),
    (
        "the plain policy gradient, {:.2f}, is nearer than the pair's, {:.2f}",
        *[cosine("SFT", name) for name in ("VPG", "PPG")],
    ),
]


def test_every_number_in_the_text_is_that_of_a_named_cell():
    """What the text says of the results is a sentence above with the numbers of the cells put in; no other
    decimal number stands in it, but settings: a beta, or KLs that were asked for."""
    text = " ".join(reproduce.BLOCK.sub("", (ROOT / "results" / "README.md").read_text()).split())
    for sentence, *cells in CLAIMS:
        values = []
        for experiment, name, row, column in cells:
            rows = [r for r in table(ROOT / "results", experiment) if r["table"] == name]
            (found,) = [r for r in rows if all(r[x] == y for x, y in row.items())]
            sign = -1 if column.startswith("-") else 1
            values.append(sign * float(found[column.removeprefix("-")]))
        said = sentence.format(*values)
        assert said in text, said
        text = text.replace(said, "")
    text = re.sub(r"beta 0\.\d+|at 0\.5( and|,| nats)|0\.5 nats", "", text)
    assert not re.findall(r"\d+\.\d+", text), re.findall(r".{30}\d+\.\d+.{10}", text)


@pytest.mark.parametrize("experiment", reproduce.EXPERIMENTS)
def test_the_committed_tables_are_what_the_committed_logs_say(experiment, tmp_path, capsys):
    for folder in (ROOT / "results").glob("logs*"):
        (tmp_path / folder.name).symlink_to(folder)
    reproduce.main(parse(tmp_path, experiment, "--plots_only"))
    for name in (f"{experiment}.csv", f"{experiment}.md"):
        assert (tmp_path / name).read_text() == (ROOT / "results" / name).read_text(), name
    assert "nothing missing" in capsys.readouterr().out


def test_every_method_runs_at_the_best_learning_rate_of_the_same_grid():
    """Variants, that answer one question, run at the rate of the method that they vary."""
    for method, (script, flags, _) in reproduce.METHODS.items():
        if method not in reproduce.TUNED:
            assert "learning_rate" not in flags
            continue
        rows = [row for row in table(ROOT / "results", "tuning") if row["method"] == method]
        assert [float(row["learning rate"]) for row in rows] == sorted(
            {*reproduce.RATES, reproduce.WIDER.get(method, 1e-4)}
        )
        best = max(rows, key=lambda row: float(row["objective"]))
        used = (vars(reproduce.SCRIPTS[script]()) | flags)["learning_rate"]
        assert best["best"] == "yes" and float(best["learning rate"]) == used, method


def test_what_changed_the_last_bits_left_p3o_within_its_interval():
    """Both from the same machine: before and after Adam and the toy's activation were fused."""
    found = {}
    for name in ("logs_staleness", "logs_fused"):
        folder = ROOT / "results" / name
        logs = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        runs = [logs[f"p3o-v2_beta{reproduce.BETA:g}_seed{seed}"] for seed in (1, 2, 3)]
        assert len({log["hardware"] for log in logs.values()}) == 1
        means = [{x: statistics.fmean(log["prompts"][x]) for x in ("reward", "kl")} for log in runs]
        sft = statistics.fmean(logs["sft"]["prompts"]["reward"])
        found[name] = reproduce.t_interval([m["reward"] - sft - reproduce.BETA * m["kl"] for m in means])
    assert found["logs_staleness"][1] < found["logs_fused"][0] < found["logs_staleness"][2], found


def test_logs_are_compact():
    logs = list((ROOT / "results").glob("logs*/*.json"))
    sizes = [path.stat().st_size for path in logs]
    assert max(sizes) < 50_000 and sum(sizes) < 10_000_000
    assert all(json.loads(path.read_text()) for path in logs)
