"""results/: every table and page is what its runs.jsonl says; runs are trained, measured and refused as promised."""

import importlib.util
import itertools
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script, word_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import toy

RESULTS = ROOT / "results"
sys.path.insert(0, str(RESULTS))
import lib  # noqa: E402
import toy_task  # noqa: E402

QUESTIONS = sorted(path.parent.name for path in RESULTS.glob("*/run.py"))


def load(path):
    """A script of results/ as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"results_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_committed_page_is_what_the_runs_say(question, tmp_path, monkeypatch, capsys):
    """Rebuilt from a page whose tables are empty; a number changed in runs.jsonl changes the page."""
    module, home = load(RESULTS / question / "run.py"), tmp_path / question
    page = (RESULTS / question / "README.md").read_text()
    home.mkdir()
    (home / "README.md").write_text(lib.BLOCK.sub(lambda match: f"{match[1]}{match[3]}", page))
    shutil.copy(RESULTS / question / "runs.jsonl", home)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing may be started"))
    monkeypatch.setattr(module, "__file__", str(home / "run.py"))
    module.main(["--plots_only"])
    assert (home / "README.md").read_text() == page
    said = capsys.readouterr().out
    assert "read from runs.jsonl" in said and "trained" not in said and "Missing:" not in page
    assert (home / "picture.png").stat().st_size > 10_000
    lib.write_lines(home / "runs.jsonl", doubled(lib.read_lines(home / "runs.jsonl")))
    module.main(["--plots_only"])
    assert (home / "README.md").read_text() != page


def doubled(value, found=False):
    """The same lines, but that KL, speed and gains are twice as large."""
    if isinstance(value, dict):
        names = "kl", "completions_per_second", "reward_gain"
        return {x: doubled(y, x in names) for x, y in value.items()}
    if isinstance(value, list):
        return [doubled(x, found) for x in value]
    return 2 * value if found else value


def test_sizes():
    files = [path for path in RESULTS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) <= 100 and sum(path.stat().st_size for path in files) <= 4e6
    lines = {path: len(path.read_text().splitlines()) for path in files if path.suffix == ".py"}
    assert sum(lines.values()) <= 1700 and lines[RESULTS / "lib.py"] <= 350
    assert all(lines[RESULTS / question / "run.py"] <= 120 for question in QUESTIONS)


def test_the_first_page_gives_the_answer_of_every_question():
    """And no line has a text of HH-RLHF, or of another data set but the first words of five film reviews."""
    first = (RESULTS / "README.md").read_text()
    for question in QUESTIONS:
        title, answer = (RESULTS / question / "README.md").read_text().split("\n\n")[:2]
        assert answer.startswith("**") and answer.strip("*") in first, question
        heading = f"## [{title.strip('# ')}]({question}/README.md)"
        assert heading in first and f"]({question}/picture.png)" in first
        for line in lib.read_lines(RESULTS / question / "runs.jsonl"):
            assert not {"prompt", "response", "text", "samples"} & set(line), question
            assert "Human:" not in json.dumps(line), "text of HH-RLHF"


# ------------------------------------------------------------------------------------------------ statistics
def test_the_t_interval_by_hand_and_its_quantiles_by_integration():
    assert lib.t_interval([2.0]) == (2.0, None, None)
    mean, low, high = lib.t_interval([1.0, 2.0, 4.0, 5.0])
    deviation = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (4 - 3) ** 2 + (5 - 3) ** 2) / 3)
    assert mean == 3 and high - 3 == pytest.approx(3.182 * deviation / 2) == pytest.approx(3 - low)
    for degrees, t in enumerate(lib.T975, 1):  # the density's integral from 0 to t is 0.475
        scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        step = t / 20000
        points = ((1 + ((i + 0.5) * step) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(20000))
        assert sum(points) * step * scale == pytest.approx(0.475, abs=2e-5), degrees


def test_intervals_take_all_seeds_and_differences_go_seed_by_seed():
    ours = [{"seed": 1, "x": 3.0}, {"seed": 2, "x": 5.0}, {"seed": 4, "x": 9.0}]
    theirs = [{"seed": 2, "x": 4.0}, {"seed": 1, "x": 1.0}, {"seed": 3, "x": None}]
    assert lib.paired(ours, theirs, "x")[0] == 1.5 and lib.interval(ours, "x")[0] == pytest.approx(17 / 3)
    assert [lib.interval(theirs, "x"), lib.interval([], "x"), lib.paired(ours, [], "x")] == [None] * 3


def test_the_bootstrap_is_that_of_a_plain_loop():
    language, values = load(RESULTS / "language/run.py"), [random.Random(i).gauss(1, 2) for i in range(40)]
    tensor = torch.tensor(values, dtype=torch.float64)
    value, low, high = language.bootstrap(lambda share: share @ tensor, 40)
    rng = random.Random(0)
    means = [statistics.fmean(rng.choices(values, k=40)) for _ in range(4000)]
    means.sort()
    assert value == pytest.approx(statistics.fmean(values))
    assert low == pytest.approx(means[100], abs=0.08) and high == pytest.approx(means[3900], abs=0.08)


def test_a_method_with_a_known_share_of_the_optimum_gets_it_back():
    """However few its points are: chords between gains would make even the optimum look worse than it is."""
    frontier = load(RESULTS / "frontier/run.py")
    kls = [0.01 * i for i in range(801)]
    found = SimpleNamespace(sft={"reward": 1.0}, optimum={"kl": kls, "reward": [1 + 2 * x**0.5 for x in kls]})
    assert toy_task.best_gain(found, 2.25) == pytest.approx(3.0) and toy_task.best_gain(found, 8.1) is None
    points = [{"kl": kl, "share": 0.95 - 0.1 * kl**0.5} for kl in (2.5, 0.05, 0.9)]
    points.append({"kl": 9, "share": None})
    for kl in (0.05, 0.3, 1.0, 2.5):
        expected = (0.95 - 0.1 * kl**0.5) * 2 * kl**0.5
        assert frontier.gain_at(found, points, kl) == pytest.approx(expected)
    assert frontier.gain_at(found, points, 2.6) is None
    assert frontier.gain_at(found, points[:1], 1.0) == pytest.approx((0.95 - 0.1 * 2.5**0.5) * 2)


def test_wins_over_all_pairs_at_a_prompt():
    frontier = load(RESULTS / "frontier/run.py")
    a, b = torch.randint(0, 4, (2, 128, 3), generator=torch.Generator().manual_seed(0)).double()
    difference = a.unsqueeze(2) - b.unsqueeze(1)
    ties = (difference == 0).double().mean().item()
    wins = (difference > 0).double().mean().item() + ties / 2
    found = frontier.win_rate(a.flatten().tolist(), b.flatten().tolist())
    assert found == pytest.approx((100 * wins, 100 * ties))


def test_a_number_is_shown_with_two_digits_of_its_interval():
    cells = {(1.23456, 1.2, 1.3): "1.235 [1.200, 1.300]", (0.42, 0.0077, 0.832): "0.42 [0.01, 0.83]"}
    cells |= {(-0.17, -0.357, -0.0023): "-0.170 [-0.357, -0.002]"}  # two would hide the side of 0
    cells |= {(1.0716, 0.655, 1.49): "1.07 [0.66, 1.49]", (189.0, 123.0, 214.0): "189 [123, 214]"}
    cells |= {(0.5, None, None): "0.500", None: "", "text": "text", (0.0, 0.0, 0.0): "0.000 [0.000, 0.000]"}
    assert {cell: lib.show(cell) for cell in cells} == cells


# ------------------------------------------------------------------------------------------------------ runs
TINY = {"steps": 2, "prompts_per_step": 4, "minibatch_size": 4, "num_responses": 2, "eval_prompts": 8}


@pytest.fixture
def world(chain, tmp_path, monkeypatch):
    """The toy with the few steps of `chain` in place of its models, few answers, and scripts that start at once."""

    class Tiny(toy_task.Toy):
        def prepare(self, args):
            self.flags = {"device": args.device}
            data = {name: chain / "data/toy" / name for name in ("prompts", "preferences")}
            return {"model": chain / "out/sft", "reward_model": chain / "out/reward_model"} | data

    def start(command, cwd=None, **options):
        if command[0] != sys.executable:
            return subprocess.CompletedProcess(command, 0, "0123456\n", "")
        started.append(command[1])
        return run_script(*command[1:], cwd=chain)

    started = []
    monkeypatch.setattr(lib, "OUT", tmp_path / "out")
    monkeypatch.setattr(toy_task, "PROMPTS", 4)
    monkeypatch.setattr(toy_task, "RESPONSES", 2)
    monkeypatch.setattr(lib.subprocess, "run", start)
    tiny = Tiny()
    tiny.started = started
    return tiny


def a_question(path, method):
    """A folder with the least that a question needs, as results/README.md says it."""
    path.mkdir()
    (path / "run.py").write_text(f"""
import lib
PLAN = [lib.run({method!r}, seed, **{TINY!r}) for seed in (1, 2)]
def tables(found):
    return {{"gains": [{{"method": {method!r}, "gain": lib.interval(found.points, "gain")}}]}}
def picture(found):
    figure, (axis,) = lib.axes()
    lib.curve(axis, {method!r}, [0], [lib.interval(found.points, "gain")])
    return figure
""")
    return load(path / "run.py")


def test_a_method_and_a_question_are_added(world, tmp_path, monkeypatch, capsys):
    """Trained and measured by the real scripts; a second command trains nothing, and says so."""
    monkeypatch.setitem(lib.METHODS, "mine", lib.Method("p3o.py", "#000000", 1e-3, {"clip_range": 0.5}))
    question, home = a_question(tmp_path / "mine", "mine"), tmp_path / "mine"

    def run(*words):
        lib.main(home / "run.py", question.PLAN, question.tables, question.picture, world, words)

    run("--seeds", "1")
    assert world.started == ["p3o.py", "evaluate.py"] and not (home / "runs.jsonl").exists()
    assert "1 runs trained and measured now" in capsys.readouterr().out
    run("--keep")
    assert world.started == ["p3o.py", "evaluate.py"] * 2, "the first seed is not trained again"
    sft, *lines = lib.read_lines(home / "runs.jsonl")
    assert [line["flags"]["seed"] for line in lines] == [1, 2] and sft["method"] == "SFT"
    assert all(x["flags"]["clip_range"] == 0.5 and x["flags"]["learning_rate"] == 1e-3 for x in lines)
    assert all(line["minutes"] >= 0 and line["weights"] and line["hardware"] for line in lines)
    gains = lib.t_interval([line["reward"] - sft["reward"] for line in lines])
    page = (home / "README.md").read_text()
    assert f"| mine | {lib.show(gains)} |" in page and "2 runs, seeds 1, 2" in page
    assert (home / "picture.png").exists()
    capsys.readouterr()
    run()
    said = capsys.readouterr().out
    assert len(world.started) == 4 and "1 of 1 numbers overlap" in said
    assert "0 runs trained and measured now" in said
    old = [line | {"base": "another"} for line in lib.read_lines(home / "runs.jsonl")]
    lib.write_lines(home / "runs.jsonl", old)
    with pytest.raises(SystemExit, match="another SFT model"):  # half of the runs would be of another machine
        run("--seeds", "1", "--keep")
    assert lib.read_lines(home / "runs.jsonl") == old


def test_a_leftover_folder_of_another_setting_is_refused(world, tmp_path):
    paths, (first, *_) = world.prepare(SimpleNamespace(device="cpu")), a_question(tmp_path / "a", "P3O").PLAN
    folder = lib.OUT / "a" / lib.name_of(first)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"left over")
    with pytest.raises(SystemExit, match="another setting"):  # nobody knows what it is
        lib.train_run(first, folder, paths, {})
    shutil.rmtree(folder)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        made = dict(exist_ok=True)
        patch.setattr(lib, "call", lambda _, *words, **__: (calls.append(words), folder.mkdir(**made)))
        lib.train_run(first, folder, paths, {})
        lib.train_run(first, folder, paths, {})  # it has ended: nothing to do
        assert calls == [()]
        for other in (first | {"flags": first["flags"] | {"beta": 0.1}}, first | {"script": "ppo.py"}):
            with pytest.raises(SystemExit, match="another setting"):
                lib.train_run(other, folder, paths, {})
        with pytest.raises(SystemExit, match="another setting"):  # the same flags from another SFT model
            lib.train_run(first, folder, paths | {"model": paths["reward_model"]}, {})
        record = folder.parent / f"{folder.name}.setting.json"
        record.write_text(record.read_text().replace("true", "false"))  # it was killed: it goes on
        (folder / "args.json").write_text("{}")
        lib.train_run(first, folder, paths, {})
        assert calls == [(), ("--resume",)]
    assert not world.started


def test_a_rerun_is_compared_number_by_number(capsys):
    before = [{"method": "P3O", "x": (1.0, 0.9, 1.1), "y": (5.0, None, None)}, {"method": "PPO", "x": None}]
    now = [{"method": "P3O", "x": (1.15, 1.05, 1.25), "y": (6.0, 5.5, 6.5)}]
    now += [{"method": "PPO", "x": (1.0, 0.9, 1.1)}]
    lib.compare({"t": before}, {"t": now})
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("now 1.15 [1.05, 1.25]: overlaps") and said[1].endswith("DIFFERS")
    assert said[2] == "1 of 2 numbers overlap with the committed ones"


# ------------------------------------------------------------------------------------------- single questions
def test_offsets_by_place_are_exact_as_large_as_asked_and_those_of_the_place():
    """float64 adds them without rounding, so that P3O, which sees differences, cannot tell."""
    script = load(RESULTS / "invariance/offsets_by_place.py")
    offsets = torch.tensor(list(script.place_offsets(6.8).values()), dtype=torch.float64)
    assert offsets.std(unbiased=False).item() == pytest.approx(6.8, rel=1e-2) and abs(offsets.mean()) < 0.01
    scores = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).double().unsqueeze(-1)
    shifted = scores + offsets
    assert torch.equal(shifted[:, 0] - shifted[:, 1], (scores[:, 0] - scores[:, 1]).expand_as(shifted[:, 0]))
    module = SimpleNamespace(load_reward=lambda *_: lambda batch: torch.zeros(len(batch["prompt"])))
    script.add_offsets(module, 6.8)
    prompts = [f"{toy.OPENINGS[0]} {toy.ENDINGS[0]}".format(place, toy.ASPECTS[0]) for place in toy.PLACES]
    found = module.load_reward(None, None)({"prompt": prompts}).tolist()
    assert found == [script.place_offsets(6.8)[place] for place in toy.PLACES] and len(set(found)) > 3


def test_a_script_with_offsets_by_place_starts(chain, tmp_path):
    words = [word for x, y in (TINY | {"device": "cpu"}).items() for word in (f"--{x}", y)]
    script = "results/invariance/offsets_by_place.py"
    words += ["--output_dir", tmp_path / "a"]
    done = run_script(script, "p3o.py", "--place_shift", 27.0, *words, cwd=chain)
    assert done.returncode == 0 and (tmp_path / "a/model.safetensors").exists(), done.stderr


def test_relatives_have_equal_seconds_and_an_equivalent_problem(chain, tmp_path, monkeypatch):
    """Steps by a table made up here; the reward model's scores four times as large, to the last bit."""
    relatives = load(RESULTS / "relatives/run.py")
    seconds = dict.fromkeys(relatives.METHODS, 2.0) | {"PPO, K = 2": 3.0, "P3O, K = 8": 2.5}
    (tmp_path / "seconds.json").write_text(json.dumps({"seconds": seconds}))
    steps = relatives.equal_seconds(tmp_path / "seconds.json")
    assert (steps["PPO, K = 2"], steps["P3O, K = 8"], steps["P3O, K = 2"]) == (60, 72, 90)
    world, paths = sys.modules["times_four"].ToyTimesFour(), {"reward_model": chain / "out/reward_model"}
    monkeypatch.setattr(toy_task.Toy, "prepare", lambda *_: paths)
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    world.prepare(None)
    load_model, ids = AutoModelForSequenceClassification.from_pretrained, torch.arange(3, 30).unsqueeze(0)
    one = load_model(chain / "out/reward_model")(ids).logits
    four = load_model(tmp_path / relatives.FOUR["reward_model"])(ids).logits
    assert torch.equal(4 * one, four) and one != 0
    point = {"reward": 2.0, "gold_reward": 0.0, "kl": 1.0, "flags": relatives.FOUR}
    found = SimpleNamespace(sft={"reward": 0.5, "gold_reward": 0.0}, optimum={})
    assert world.complete(point, found)["objective"] == 1.0  # 1.5 - 0.5 * 1, not with a beta of 2


def test_no_review_is_in_two_splits_and_pairs_are_balanced(monkeypatch):
    language = load(RESULTS / "language/run.py")
    reviews_of = sys.modules["film_reviews"]
    for name, value in {"SFT": 60, "VALIDATION": 8, "TEST": 9, "PAIRS": 6}.items():
        monkeypatch.setattr(reviews_of, name, value)
    rng, rows = random.Random(0), []
    for i in range(500):
        words = [f"w{rng.randrange(3, 300)}" for _ in range(rng.randrange(6, 30))]
        rows.append({"text": " ".join(words), "label": i % 2})
    monkeypatch.setattr(reviews_of.datasets, "load_dataset", lambda **_: rows)
    reviews = reviews_of.read_reviews("hub", word_tokenizer(300))
    label, homes = {row["text"].strip(): row["label"] for row in rows}, {}
    splits = reviews_of.make_splits(reviews)
    assert [len(splits["prompts"][x]) for x in ("validation", "test")] == [8, 9] and language.PLAN
    held_out = {row["prompt"] for x in ("validation", "test") for row in splits["prompts"][x]}
    assert len(held_out) == 17 and not held_out & {row["prompt"] for row in splits["prompts"]["train"]}
    for split in ("train", "validation", "test"):
        for row in splits["sft"][split]:
            homes.setdefault(row["text"].strip(), set()).add(("sft", split))
    for name in ("pairs", "judge_pairs"):
        for split, pairs in splits[name].items():
            for column, wanted in (("chosen", 1), ("rejected", 0)):
                texts = [pair[column].strip() for pair in pairs]
                assert {texts.count(text) for text in texts} == {2} and {label[x] for x in texts} == {wanted}
                for text in texts:
                    homes.setdefault(text, set()).add((name, split))
    assert len(homes) > 300 and all(len(home) == 1 for home in homes.values())


def test_preferences_and_the_best_of_n_on_film_reviews():
    """By loops: over all pairs of answers, and over all subsets of n and all answers outside them."""
    load(RESULTS / "language/run.py")
    module, rng, mean, near = sys.modules["film_reviews"], random.Random(0), statistics.fmean, pytest.approx
    rewards = [[[rng.randrange(9) + i / 10 for i in range(6)] for _ in range(4)] for _ in "ab"]  # no ties
    sft, policy = ({"reward": x, "judge": [[rng.randrange(9) for _ in y] for y in x]} for x in rewards)
    found = module.by_prompt(policy | {"kl": [1.0] * 4}, sft)
    for p in range(4):
        pairs = [(x > y) + (x == y) / 2 for x in policy["judge"][p] for y in sft["judge"][p]]
        assert found["preferred by the judge"][p].item() == near(mean(pairs))
        assert found["gain"][p].item() == near(mean(policy["reward"][p]) - mean(sft["reward"][p]))
    for n, values in module.best_of_n(sft, (1, 2, 4)).items():
        for p, (reward, judge) in enumerate(zip(sft["reward"], sft["judge"])):
            subsets = [(max(x, key=reward.__getitem__), x) for x in itertools.combinations(range(6), n)]
            wins = [(judge[i], judge[j]) for i, x in subsets for j in range(6) if j not in x]
            wins = mean((a > b) + (a == b) / 2 for a, b in wins)
            assert values["preferred by the judge"][p].item() == near(wins)
            assert values["gain"][p].item() == near(mean(reward[i] for i, _ in subsets) - mean(reward))
        assert values["KL"][0].item() == near(math.log(n) - (n - 1) / n)


def test_the_judge_reads_whole_reviews_and_the_curve_compares_with_step_0(chain, tmp_path, monkeypatch):
    load(RESULTS / "language/run.py")
    world = sys.modules["film_reviews"].FilmReviews()
    world.judge_folder, world.flags = chain / "out/reward_model", {"device": "cpu"}
    world.dtype = {"dtype": "float32"}
    model = AutoModelForSequenceClassification.from_pretrained(world.judge_folder)
    tokenizer = AutoTokenizer.from_pretrained(world.judge_folder)
    responses = " the market is big .", " the market is small and local ."
    rows = [{"prompt": "write about the market", "response": x} for x in responses]
    for row, score in zip(rows, world.judge(rows)):  # one text without padding, read by transformers alone
        ids = tokenizer(row["prompt"] + row["response"] + tokenizer.eos_token, return_tensors="pt").input_ids
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-4)
    others = {f"eval_{x}": 0.5 for x in ("kl", "response_length", "eos_rate")}
    log = {"step": 0, "eval_reward": 1.0} | others, {"step": 1}, {"step": 2, "eval_reward": 3.0} | others
    lib.write_lines(tmp_path / "metrics.jsonl", log)
    for step, scores in {0: (1, 2, 3), 2: (2, 3, 2)}.items():
        lib.write_lines(tmp_path / f"samples_{step}.jsonl", [{"score": x} for x in scores])
    monkeypatch.setattr(world, "judge", lambda rows: [row["score"] for row in rows])
    first, last = world.curve(tmp_path)
    assert [(x["judge"], x["preferred"]) for x in (first, last)] == [(2, 0.5), (2.3333, 0.6667)]
    assert (first["reward"], last["reward"], last["step"], last["eos_rate"]) == (1.0, 3.0, 2, 0.5)


def test_seconds_and_memory_of_a_process(tmp_path):
    """A program whose steps take 5, 1, 3 and 2 seconds by its own word; the first one is left out."""
    load(RESULTS / "speed/run.py")
    (tmp_path / "program.py").write_text(
        "import json, sys, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1]); folder.mkdir()\n"
        "rows = [{'step': i, 'seconds': s} for i, s in enumerate((5, 1, 3, 2), 1)]\n"
        "(folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\\n' for row in rows))\n"
    )
    measure = sys.modules["measure"]
    seconds, memory = measure.measure([sys.executable, str(tmp_path / "program.py")], 1, steps=4)
    assert seconds == 2 and 0.005 < memory < 8
    (tmp_path / "program.py").write_text("print('it broke'); raise SystemExit(3)")
    with pytest.raises(SystemExit, match="it broke"):
        measure.measure([sys.executable, str(tmp_path / "program.py")], 1)
    paths = measure.make_gpt2(tmp_path, words=50, n_embd=16, n_layer=1, n_head=2)
    assert all(path.exists() for path in paths.values())
