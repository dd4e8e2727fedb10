"""Scenes, mixtures and subsets in a run, as a recipe says them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("rasterio")

from run_support import run_here
from scenes_support import noise, write_scene


def test_a_mixture_with_scenes_trains(tmp_path: Path) -> None:
    write_scene(tmp_path / "scenes" / "a.tif", noise(2, 96, 96))
    recipe = tmp_path / "mixture.toml"
    recipe.write_text(f"""
        extends = "{Path(__file__).parents[1] / "support" / "tiny.toml"}"
        drop = ["dataset"]
        iterations = 2

        [dataset]
        use = "mixture"
        weights = {{ clothes = 1, scenes = 3 }}

        [dataset.parts.scenes]
        use = "geotiff_scenes"
        root = "{tmp_path / "scenes"}"
        tile = 32
        bands = [2]
        bits = 12

        [dataset.parts.clothes]
        use = "subset"
        of = {{ use = "fashion_mnist" }}
        per_class = 3
    """)
    whole = run_here(tmp_path / "whole", recipe=recipe)
    assert whole.returncode == 0, whole.stderr
    assert "mixture, 120 images: scenes 0.75 (geotiff_scenes" in whole.stdout + whole.stderr
    wrong = run_here(tmp_path / "wrong", "dataset.weights.odd=1", recipe=recipe)
    assert wrong.returncode == 2
    assert "there is no part odd" in wrong.stderr
    assert not (tmp_path / "wrong").exists()
