"""metrics.jsonl as series, their grouping into panels, and the drawing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from dinov3_figures.curves import Series, curves_figure, panels, read_series, smooth
from dinov3_figures.sheet import save_png
from figures_support import read_png

from dinov3_framework import DataError

Line = Mapping[str, float | None]


def write_lines(path: Path, lines: Iterable[Line]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def training(iterations: int) -> list[Line]:
    """Lines as a training run writes them, every tenth iteration, k-NN now and then."""
    rng = np.random.default_rng(0)
    lines: list[Line] = [{"iteration": 0, "knn@10": 50.0}]
    for iteration in range(10, iterations + 1, 10):
        loss = 8 * np.exp(-iteration / iterations) + 0.1 * rng.standard_normal()
        line = {
            "iteration": iteration,
            "loss": loss,
            "dino": loss,
            "dino/global": 0.9 * loss,
            "dino/temperature": 0.04,
            "dino/weight": 1.0,
            "koleo": -0.3,
            "koleo/weight": 0.1,
            "lr": 1e-3,
            "last_layer_lr": 0.0,
            "weight_decay": 0.04,
            "momentum": 0.994,
            "gradient_norm/backbone": np.exp(rng.standard_normal()),
            "gradient_norm/dino_head": np.exp(rng.standard_normal() - 4),
            "images_per_second": 300.0,
            "data_wait": 0.01,
            "time/teacher": 0.2,
            "time/backward": 0.4,
            "probe/accuracy": 0.5,
        }
        if iteration % 50 == 0:
            line |= {"knn@10": 60.0, "knn@20": 59.0}
        lines.append(line)
    return lines


# ---------------------------------------------------------------------- reading
def test_lines_may_miss_keys_and_null_is_not_finite(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "metrics.jsonl",
        [{"iteration": 5, "loss": 2.0}, {"iteration": 10, "loss": None, "knn@10": 70.5}],
    )
    series = read_series(path)
    assert series["loss"].iterations.tolist() == [5, 10]
    assert series["loss"].values[0] == 2.0
    assert np.isnan(series["loss"].values[1])
    assert series["loss"].finite.tolist() == [2.0]
    assert series["knn@10"].iterations.tolist() == [10]


def test_what_is_no_metric_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"iteration": 1, "loss": 1.5, "note": "hello", "on": true}\n\n[1, 2]\n{"loss": 3}\n'
        f'{"[" * 100_000}\n{{"iteration": 1{"0" * 5000}}}\n'
        '{"iteration": 2, "loss": 1.2'
    )
    series = read_series(path)
    assert list(series) == ["loss"]
    assert series["loss"].iterations.tolist() == [1]


def test_no_file_and_an_empty_file_hold_no_series(tmp_path: Path) -> None:
    assert read_series(tmp_path / "metrics.jsonl") == {}
    (tmp_path / "metrics.jsonl").touch()
    assert read_series(tmp_path / "metrics.jsonl") == {}
    with pytest.raises(DataError, match="no curves"):
        curves_figure({}, "run")


# ---------------------------------------------------------------------- grouping
def test_every_metric_but_constant_weights_is_in_one_panel(tmp_path: Path) -> None:
    series = read_series(write_lines(tmp_path / "metrics.jsonl", training(200)))
    shown = panels(series)
    names = [name for panel in shown for name in panel.names]
    assert sorted(names) == sorted(set(series) - {"dino/weight", "koleo/weight"})
    grouped = {panel.title: panel.names for panel in shown}
    assert grouped["Total loss"] == ("loss",)
    assert grouped["Loss “dino”"] == ("dino", "dino/global")
    assert grouped["dino/temperature"] == ("dino/temperature",)  # 100 times smaller than the loss
    assert grouped["k-NN accuracy"] == ("knn@10", "knn@20")
    assert grouped["Learning rate"] == ("lr", "last_layer_lr")
    assert grouped["Gradient norm"] == ("gradient_norm/backbone", "gradient_norm/dino_head")
    assert grouped["probe/accuracy"] == ("probe/accuracy",)
    labels = {panel.title: panel.labels for panel in shown}
    assert labels["Gradient norm"] == ("backbone", "dino_head")
    assert labels["Loss “dino”"] == ("dino", "global")


def test_weights_are_shown_if_one_moves() -> None:
    at = np.array([1, 2])
    series = {
        name: Series(at, np.array(values))
        for name, values in {
            "gram": [1.0, 2.0],
            "gram/weight": [0.0, 2.0],
            "dino": [1.0, 2.0],
            "dino/weight": [1.0, 1.0],
            "ibot": [1.0, 2.0],
            "ibot/weight": [0.5, 1.0],
        }.items()
    }
    weights = next(panel for panel in panels(series) if panel.title == "Loss weights")
    assert weights.names == ("gram/weight", "ibot/weight")
    assert weights.labels == ("gram", "ibot")


# ---------------------------------------------------------------------- smoothing
def test_smoothing_keeps_a_constant_whatever_is_missing() -> None:
    values = np.full(1000, 3.5)
    values[::3] = values[400:420] = np.nan
    places, means = smooth(np.arange(1000) * 10, values)
    assert len(places) == 300  # no hole where the kernel finds anything
    np.testing.assert_allclose(means, 3.5)
    assert (np.diff(places) > 0).all()


@pytest.mark.parametrize("count", [1, 2, 30, 31, 299, 301])
def test_smoothing_takes_any_number_of_points(count: int) -> None:
    places, means = smooth(np.arange(count), np.full(count, 2.0))
    assert len(places) == len(means) == min(count, 300)
    np.testing.assert_allclose(means, 2.0)


def test_smoothing_removes_noise_and_follows_the_trend() -> None:
    at = np.arange(3000)
    trend = np.sin(at / 500)
    noisy = trend + np.random.default_rng(0).standard_normal(3000)
    places, means = smooth(at, noisy)
    assert np.abs(means - np.interp(places, at, trend)).std() < 0.15


# ---------------------------------------------------------------------- drawing
def axes_of(series: Mapping[str, Series]) -> dict[str, object]:
    figure = curves_figure(series, "run")
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}


def test_figure_is_a_png_of_sensible_size(tmp_path: Path) -> None:
    series = read_series(write_lines(tmp_path / "metrics.jsonl", training(2000)))
    save_png(curves_figure(series, "quickstart"), tmp_path / "curves.png")
    picture = read_png(tmp_path / "curves.png")
    assert 800 <= picture.shape[1] <= 3000
    assert 500 <= picture.shape[0] <= 3000
    assert 0.02 < (picture < 250).any(-1).mean() < 0.5
    assert not list(tmp_path.glob(".*"))


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    series = {"loss": Series(np.arange(50), np.sin(np.arange(50)))}
    for name in ("a.png", "b.png"):
        save_png(curves_figure(series, "quickstart"), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "lines",
    [
        [{"iteration": 1, "loss": 2.0}],
        [{"iteration": 1, "loss": None}],
        [{"iteration": 1, "loss": None, "lr": 1e-3}, {"iteration": 2, "lr": 0.0}],
        [{"iteration": n, "loss": 0.0} for n in range(50)],
        [{"iteration": n, "loss": None if n % 2 else -1e30} for n in range(100)],
        [{"iteration": n, "loss": 1e30 if n == 70 else 1.0} for n in range(100)],
    ],
    ids=["one line", "nothing finite", "missing keys", "constant zero", "huge", "one spike"],
)
def test_odd_runs_can_be_drawn(tmp_path: Path, lines: list[Line]) -> None:
    series = read_series(write_lines(tmp_path / "metrics.jsonl", lines))
    save_png(curves_figure(series, "odd"), tmp_path / "curves.png")
    picture = read_png(tmp_path / "curves.png")
    assert (picture < 250).any(-1).mean() > 0.01


def test_norms_over_decades_are_logarithmic_and_schedules_are_not(tmp_path: Path) -> None:
    axes = axes_of(read_series(write_lines(tmp_path / "metrics.jsonl", training(2000))))
    assert axes["Gradient norm"].get_yscale() == "log"
    assert axes["Learning rate"].get_yscale() == "linear"
    assert axes["Total loss"].get_yscale() == "linear"


def test_a_spike_leaves_the_panel_and_is_counted() -> None:
    values = np.linspace(8, 2, 200)
    values[150] = 1000.0
    axes = axes_of({"loss": Series(np.arange(200), values)})["Total loss"]
    assert axes.get_ylim()[1] < 20
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["loss 2", "off scale: 1"]


def test_what_was_not_finite_is_marked() -> None:
    values = np.linspace(8, 2, 200)
    values[[40, 41, 42]] = np.nan
    axes = axes_of({"loss": Series(np.arange(200), values)})["Total loss"]
    assert axes.get_legend_handles_labels()[1] == ["loss 2", "not finite: 3"]
    marks = axes.get_lines()[-1]
    assert marks.get_xdata().tolist() == [40, 41, 42]


def test_drawing_leaves_no_global_state() -> None:
    from matplotlib import _pylab_helpers

    curves_figure({"loss": Series(np.arange(3), np.ones(3))}, "run")
    assert not _pylab_helpers.Gcf.get_all_fig_managers()
