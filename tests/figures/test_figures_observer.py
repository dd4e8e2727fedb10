"""When the observer draws, and that it never ends a run."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dinov3_figures import FiguresConfig
from dinov3_figures.observer import Plots, spread_images
from figures_support import FakeRun, Gradients, read_png

from dinov3_framework import DataError, DatasetConfig, ImagesConfig, Registry, StepRecord


def observer(**options: object) -> Plots:
    return Plots(FiguresConfig(**options))


def log_metrics(run: FakeRun, iterations: int) -> None:
    lines = [{"iteration": n, "loss": 1 / n} for n in range(1, iterations + 1)]
    (run.output_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))


def drawn(run: FakeRun) -> set[str]:
    return {path.name for path in (run.output_dir / "figures").glob("*")}


def test_the_plugin_is_found_and_light() -> None:
    described = Registry.load().describe("observer", "figures")
    assert {field.name for field in described.fields} == {"every", "images", "dataset", "upscale"}
    code = "import dinov3_figures, sys; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_from_start_to_end(run: FakeRun) -> None:
    plots = observer(every=10)
    assert not plots.on_start(run, 0)
    assert drawn(run) == {"crops.png"}
    log_metrics(run, 10)
    assert not plots.on_step(run, StepRecord(10, {}))
    assert drawn(run) == {"crops.png", "curves.png"}
    log_metrics(run, 100)
    assert not plots.on_end(run)
    assert drawn(run) == {"crops.png", "curves.png", "patch_pca.png"}
    for name in drawn(run):
        assert read_png(run.output_dir / "figures" / name).std() > 10
    assert run.teacher.sizes == [28] * 6 + [112] * 6


def test_crops_are_drawn_once(run: FakeRun) -> None:
    path = run.output_dir / "figures" / "crops.png"
    observer().on_start(run, 40)  # resumed, and the figure is not there
    path.write_bytes(b"kept")
    observer().on_start(run, 40)
    assert path.read_bytes() == b"kept"
    observer().on_start(run, 0)
    assert path.read_bytes() != b"kept"


def test_curves_wait_for_figures_and_the_last_step_for_the_end(run: FakeRun) -> None:
    observer().on_step(run, StepRecord(10, {}))
    log_metrics(run, 99)
    observer().on_step(run, StepRecord(100, {}))
    assert drawn(run) == set()


def test_other_processes_draw_nothing_but_call_the_teacher(run: FakeRun) -> None:
    run.is_main = False
    log_metrics(run, 100)
    plots = observer(images=2, upscale=1)
    plots.on_start(run, 0)
    plots.on_step(run, StepRecord(10, {}))
    plots.on_end(run)
    assert drawn(run) == set()
    assert run.teacher.sizes == [28, 28]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    spec = ImagesConfig(channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)
    run = FakeRun(tmp_path, spec)
    plots = observer(images=2)
    plots.on_start(run, 0)
    plots.on_end(run)
    assert drawn(run) == {"crops.png", "patch_pca.png"}


# ---------------------------------------------------------------------- clean images
def test_images_of_a_dataset_are_spread_and_skip_the_undecodable() -> None:
    images = spread_images(Gradients(1), count=5, size=28)
    assert images.shape == (5, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [1, 2, 4, 6, 8]


def test_a_dataset_is_opened_at_the_start(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = observer(dataset=DatasetConfig(), images=3, upscale=1)
    plots.on_start(run, 0)
    seen = []
    forward = run.teacher.forward_features
    monkeypatch.setattr(
        run.teacher, "forward_features", lambda images: seen.append(images) or forward(images)
    )
    plots.on_end(run)
    # Images 1, 3 and 6 of the dataset, normalized, one by one.
    levels = [
        float((each[0, 0].mean() * run.images.std[0] + run.images.mean[0]) * 255) for each in seen
    ]
    assert levels == pytest.approx([1, 3, 6], abs=1e-3)
    assert "patch_pca.png" in drawn(run)


def test_a_dataset_that_is_not_there_is_said_at_the_start(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: FakeRun, config: object, **runtime: object) -> None:
        raise DataError("no folder /data/photos")

    monkeypatch.setattr(FakeRun, "build", missing)
    with pytest.raises(DataError, match="no folder"):
        observer(dataset=DatasetConfig()).on_start(run, 0)


# ---------------------------------------------------------------------- faults
def test_a_failure_is_logged_and_goes_no_further(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: FakeRun, count: int) -> None:
        raise RuntimeError("no more crops")

    monkeypatch.setattr(FakeRun, "sample_batch", broken)
    plots = observer()
    with caplog.at_level(logging.WARNING, "dinov3_framework"):
        plots.on_start(run, 0)
        plots.on_end(run)
    assert drawn(run) == set()
    assert run.teacher.sizes == []
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "crops.png" in messages[0]
    assert "patch_pca.png" in messages[1]
    assert all("RuntimeError: no more crops" in message for message in messages)


def test_a_folder_that_cannot_be_made_is_logged(
    run: FakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    (run.output_dir / "figures").write_text("a file in its place")
    observer().on_start(run, 0)
    assert "crops.png: not drawn" in caplog.text


def test_a_failed_drawing_leaves_the_old_figure(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    log_metrics(run, 10)
    observer().on_step(run, StepRecord(10, {}))
    path = run.output_dir / "figures" / "curves.png"
    before = path.read_bytes()

    def half(self: Figure, file: Path, **options: object) -> None:
        file.write_bytes(b"half a figure")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    observer().on_step(run, StepRecord(20, {}))
    assert path.read_bytes() == before
    assert drawn(run) == {"curves.png"}


def test_a_backbone_of_one_image_size_gets_its_map_all_the_same(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = run.teacher.forward_features

    def rigid(images: torch.Tensor) -> object:
        if images.shape[-1] != 28:
            raise ValueError("28 px only")
        return forward(images)

    monkeypatch.setattr(run.teacher, "forward_features", rigid)
    observer().on_end(run)
    assert drawn(run) == {"patch_pca.png"}
    assert "112 px images: ValueError: 28 px only" in caplog.text
