"""curves.py draws what stands in metrics.jsonl, of runs that are done or going, and nothing else."""

import argparse
import json
import os

import matplotlib.figure
import pytest
from conftest import run_script

import curves


def write_run(folder, rows, end=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """out/ with a P3O run that goes on, an offline DPO run, a reward model and a folder without a log."""
    p3o = [{"step": 0, "eval_reward": 0.5, "eval_kl": 0.0}]
    p3o += [{"step": i, "reward": 1.0 * i, "kl": i / 2, "clip_fraction": 0.1} for i in (1, 2)]
    write_run(tmp_path / "out/p3o", p3o, '{"step": 3, "reward": 1')
    write_run(
        tmp_path / "out/dpo", [{"step": 10 * i, "eval_reward": 2.0 + i, "eval_kl": 0.1} for i in (0, 1)]
    )
    write_run(tmp_path / "out/reward_model", [{"step": 1, "loss": 0.1}])
    (tmp_path / "out/evaluation").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(monkeypatch, runs=(), output="out/curves.png"):
    """The axes of the picture that main writes."""
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda f, *a, **k: figures.append(f) or save(f, *a, **k)
    )
    curves.main(argparse.Namespace(runs=list(runs), output=output))
    return figures[0].axes


def points(axis):
    """What is drawn: {(x, y), ...} of each line that is not empty."""
    return [
        set(zip(*(list(map(float, data)) for data in line.get_data())))
        for line in axis.lines
        if len(line.get_xdata())
    ]


def test_it_draws_each_number_of_the_log_once(world, monkeypatch, capsys):
    axes = draw(monkeypatch)
    assert points(axes[0]) == [{(0, 2), (10, 3)}, {(1, 1), (2, 2)}, {(0, 0.5)}]  # reward of dpo, then of p3o
    assert points(axes[2]) == [{(0.1, 2), (0.1, 3)}, {(0.5, 1), (1, 2)}, {(0, 0.5)}]  # against KL
    assert points(axes[4]) == [{(1, 0.1), (2, 0.1)}] and points(axes[5]) == []
    colors = {
        run: {line.get_color() for line in axes[0].lines[2 * i : 2 * i + 2]} for i, run in enumerate("dp")
    }
    (legend,) = axes[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["out/dpo", "out/p3o"]
    assert [{line.get_color()} for line in legend.get_lines()] == list(colors.values())
    assert capsys.readouterr().out == "out/curves.png: out/dpo, out/p3o\n"
    assert (world / "out/curves.png").read_bytes().startswith(b"\x89PNG")


def test_as_a_script_with_a_run_in_brackets(world):
    (world / "out/p3o").rename(world / "run [1] b")
    done = run_script("curves.py", "run [1] b", "--output", "new/a [2].png", cwd=world)
    assert (done.returncode, done.stdout) == (0, "new/a [2].png: run [1] b\n"), done.stderr


@pytest.mark.parametrize(
    "runs, output, said",
    [
        (["out/p3o", "out/reward_model"], "out/curves.png", "'out/reward_model'"),
        (["nowhere"], "out/curves.png", "run p3o.py first"),
        ([], "fifo.png", "give --output NAME.png"),
        ([], "out", "give --output NAME.png"),
        ([], "out/p3o/metrics.jsonl", "give --output NAME.png"),
    ],
)
def test_wrong_input_is_one_line_and_touches_nothing(world, runs, output, said):
    os.mkfifo("fifo.png")
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    with pytest.raises(SystemExit) as error:
        curves.main(argparse.Namespace(runs=runs, output=output))
    assert (
        error.value.code.startswith("error: ") and said in error.value.code and "\n" not in error.value.code
    )
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before
