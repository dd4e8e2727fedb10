"""Backbones larger than a process's memory: no process ever holds a whole one.

What is measured, and how, is in benchmarks/large_models.py.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dinov3_vit.configs import Vit7bConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import large_models as bench  # noqa: E402
from dinov3_ssl.networks import Blueprint  # noqa: E402

from dinov3_framework import Registry, load_backbone  # noqa: E402

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it"
)
SIZES = {"embed_dim": 512, "depth": 11, "num_heads": 8}  # 134 MiB
# Beside what is kept: a tensor as it is read, as it is cast or cut, and what Python takes.
BUFFERS, FIXED = 3, 12 * bench.MIB

Figures = dict[str, list[bench.Measured]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bench.Place]:
    place = bench.Place("vit", SIZES, tmp_path_factory.mktemp("large"))
    place.write()
    yield place
    shutil.rmtree(place.folder)


@pytest.fixture(scope="module")
def figures(place: bench.Place) -> Figures:
    """Of four processes, by rank; then of one that converts the checkpoint they saved."""
    actions = [bench.load_file, bench.start_training, bench.save_and_export]
    found = bench.measure(actions, place, 4)
    found += bench.measure([bench.convert_checkpoint], place, 1)
    names = [action.__name__ for action in (*actions, bench.convert_checkpoint)]
    return dict(zip(names, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("action", ["load_file", "start_training"])
def test_a_process_takes_its_shards_and_a_few_tensors(
    action: str, figures: Figures, place: bench.Place
) -> None:
    model, largest = sum(place.sizes()), max(place.sizes())
    copies = 2 if action == "start_training" else 1
    assert model > 120 * bench.MIB
    for found in figures[action]:
        assert found.kept == pytest.approx(copies * model / 4, rel=0.01)
        assert found.peak >= found.kept * 0.9, "the measurement sees nothing"
        assert found.peak <= found.kept + BUFFERS * largest + FIXED
        assert found.peak <= (copies / 4 + 0.14) * model


@pytest.mark.slow
@pytest.mark.parametrize("action", ["save_and_export", "convert_checkpoint"])
def test_a_file_is_written_with_a_few_tensors_in_memory(
    action: str, figures: Figures, place: bench.Place
) -> None:
    for found in figures[action]:
        assert 0 < found.peak <= 2 * BUFFERS * max(place.sizes()) + FIXED
        assert found.peak <= 0.2 * sum(place.sizes())


@pytest.mark.slow
def test_what_came_through_is_what_went_in(figures: Figures, place: bench.Place) -> None:
    expected = load_backbone(place.weights, registry=place.registry).backbone.state_dict()
    assert figures
    for name in ("end.safetensors", "converted.safetensors"):
        found = load_backbone(place.folder / name, registry=place.registry).backbone.state_dict()
        assert found.keys() == expected.keys()
        assert [n for n, tensor in expected.items() if not torch.equal(found[n], tensor)] == []


def test_seven_billion_parameters_are_laid_out_without_memory() -> None:
    with bench.Peak() as peak:
        student = Blueprint.draw(Registry.load(), Vit7bConfig(), {}).student()
    assert sum(parameter.numel() for parameter in student.parameters()) == 6_716_043_264
    assert peak.bytes < 200 * bench.MIB
