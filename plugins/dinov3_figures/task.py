"""The task ``visualize``: pictures of what one backbone's patch features see."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov3_figures.configs import VisualizeConfig
from dinov3_figures.images import Seen, choose, look
from dinov3_figures.maps import encode, maps_of
from dinov3_figures.pictures import Shown, overview, panel, tiles_of, write_page
from dinov3_figures.sheet import save_png
from dinov3_framework import (
    Backbone,
    DataError,
    Dataset,
    LoadedBackbone,
    Plan,
    Problem,
    RecipeError,
    Registry,
    Task,
    describe_recipe_backbone,
    load_recipe_backbone,
    write_results,
)
from dinov3_framework.runtime import collectives

log = logging.getLogger("dinov3_framework.plots")

_DIMS = 32  # numbers a patch in the page
_LONGEST_NAME = 100  # letters of a picture's file name


class Visualize(Task):
    """Draws figures/*.png and index.html and writes results.json."""

    def __init__(self, config: VisualizeConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    def check(self, world_size: int) -> Plan:
        subject = describe_recipe_backbone(self.config, self.registry)
        _refuse_problems(self.config, subject.backbone)
        missing: list[str] = []
        try:
            facts = self._facts(subject, *self._choice(subject))
        except DataError as error:
            facts, missing = self._facts(subject), [str(error)]
        facts["maps"].append(("processes", str(world_size)))
        return Plan(facts, missing)

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        subject = load_recipe_backbone(self.config, self.registry)
        _refuse_problems(self.config, subject.backbone)
        dataset, choice = self._choice(subject)
        seen = look(subject, dataset, choice, self.config)
        if collectives.is_main():
            self._write(output_dir, subject, dataset, seen)

    def _choice(self, subject: LoadedBackbone) -> tuple[Dataset, list[Sequence[int]]]:
        config = self.config
        dataset = self.registry.build(config.dataset, channels=subject.images.channels)
        return dataset, choose(dataset, config.names, config.count)

    def _facts(
        self, subject: LoadedBackbone, dataset: Dataset | None = None, shown: Sequence[Any] = ()
    ) -> dict[str, list[tuple[str, str]]]:
        """What is shown of what, for the check and for the page."""
        config, backbone = self.config, subject.backbone
        parameters = sum(parameter.numel() for parameter in backbone.parameters())
        size = config.size or subject.size
        length = f"{config.side} side {size} px" if size else "as they are"
        rounded = f"{length}, rounded to patches of {backbone.patch_size} px"
        data = [("size", rounded)]
        if dataset is not None:
            data = [("dataset", dataset.describe()), ("images", f"{len(shown):,}"), *data]
            data += [("note", note) for note in dataset.notes()]
        return {
            "backbone": [*subject.origin, ("parameters", f"{parameters:,}")],
            "data": data,
            "maps": [
                ("maps", ", ".join(config.maps)),
                ("layer", _layer(config, backbone)),
                ("principal components", f"of {_extent(config)}"),
            ],
        }

    # ------------------------------------------------------------------ files
    def _write(
        self, output_dir: Path, subject: LoadedBackbone, dataset: Dataset, seen: Sequence[Seen]
    ) -> None:
        """Write all files; results.json, which completes the run, last."""
        config = self.config
        maps = maps_of([each.features for each in seen], config)
        stems = file_stems([each.name for each in seen], taken=["overview"])
        every = [
            Shown(
                each,
                found,
                tiles_of(each, found, subject.images, config.maps),
                encode(each.features, _DIMS) if "similarity" in config.maps else None,
                f"figures/{stem}.png",
            )
            for each, found, stem in zip(seen, maps, stems, strict=True)
        ]
        caption = f"{subject.name}, layer {_layer(config, subject.backbone)}"
        for shown in every:
            save_png(panel(shown, caption), output_dir / shown.figure)
        caption += f"; principal components of {_extent(config)}"
        save_png(overview(every, caption), output_dir / "figures/overview.png")
        facts = dict(itertools.chain(*self._facts(subject, dataset, seen).values()))
        write_page(output_dir / "index.html", facts, self._notes(every), every)
        results = {
            "task": "visualize",
            "backbone": dict(subject.origin),
            "dataset": dataset.describe(),
            "layer": config.layer % subject.backbone.n_layers,
            "pca": config.pca,
            "images": [_row(shown) for shown in every],
            "files": [shown.figure for shown in every],
        }
        write_results(output_dir, results)
        log.info("%d images: %s", len(seen), output_dir / "index.html")

    def _notes(self, every: Sequence[Shown]) -> list[str]:
        """What the pictures mean."""
        notes = {
            "pca": "PCA: red, green and blue are the first three principal components of "
            f"{_extent(self.config)}; percent: their share of the variance.",
            "foreground": "PCA of foreground: patches on one side of a threshold of the first "
            "component, and the principal components of these alone as colors. The side that is "
            "less at the images' borders counts as the foreground.",
        }
        errors = [shown.codes.error for shown in every if shown.codes is not None]
        if errors:
            notes["similarity"] = (
                "Similarity to a marked patch: the cosine between its features and each patch's, "
                "exact. Move over an image to see similarities to the patch under the pointer; "
                "click to keep it, or move it with the arrow keys. These are approximate: computed "
                f"in this page from {_DIMS} numbers of 8 bits a patch, they are off by "
                f"{max(errors):.2g} (root mean square) in the worst of these images."
            )
        return [note for name, note in notes.items() if name in self.config.maps]


# --------------------------------------------------------------------------- checks
def _refuse_problems(config: VisualizeConfig, backbone: Backbone) -> None:
    """Raise ``RecipeError`` for what this backbone cannot do."""
    layers, patch = backbone.n_layers, backbone.patch_size
    problems = []
    if config.size is not None and config.size < patch:
        message = f"{config.size} px is less than one patch of {patch} px"
        problems.append(Problem("size", message, f"take {16 * patch} px, say, for 16 patches"))
    last_only = type(backbone).get_intermediate_layers is Backbone.get_intermediate_layers
    if not -layers <= config.layer < layers:
        message = f"is {config.layer}, the backbone has {layers:,}"
        hint = f"take one of 0 to {layers - 1}, or of -{layers} to -1"
        problems.append(Problem("layer", message, hint))
    elif last_only and config.layer % layers != layers - 1:
        message = f"is {config.layer}, {type(backbone).__name__} gives its last layer alone"
        problems.append(Problem("layer", message, "leave it out"))
    if "similarity" in config.maps and not config.points and not config.typical:
        hint = 'give points or typical, or leave "similarity" out of maps'
        problems.append(Problem("points", "there is no patch to be similar to", hint))
    if problems:
        raise RecipeError(problems)


# --------------------------------------------------------------------------- words and files
def _layer(config: VisualizeConfig, backbone: Backbone) -> str:
    layer, last = config.layer % backbone.n_layers, backbone.n_layers - 1
    return f"{layer}, the last" if layer == last else f"{layer} of 0 to {last}"


def _extent(config: VisualizeConfig) -> str:
    return "all images together" if config.pca == "joint" else "each image by itself"


def _row(shown: Shown) -> dict[str, Any]:
    """What results.json holds of an image."""
    seen, maps = shown.seen, shown.maps

    def size(height: int, width: int) -> dict[str, int]:
        return {"width": width, "height": height}

    row: dict[str, Any] = {
        "name": seen.name,
        "label": seen.label or None,
        "figure": shown.figure,
        "original": size(*seen.original),
        "seen": size(*seen.image.shape[-2:]),
        "patches": {"columns": maps.grid[1], "rows": maps.grid[0]},
        "explained": [round(share, 6) for share in maps.pca_shares],
        "foreground": {
            "share": round(float(maps.foreground.mean()), 6),
            "explained": [round(share, 6) for share in maps.foreground_shares],
        },
        "marked": [
            {
                "why": mark.what,
                "column": mark.column,
                "row": mark.row,
                "mean_similarity": round(float(mark.similarity.mean()), 6),
            }
            for mark in maps.marks
        ],
    }
    if shown.codes is not None:
        row["page_similarity_error"] = round(shown.codes.error, 6)
    return row


def file_stems(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """A file name without its ending for each sample: letters that every system takes, no two
    alike, even where large and small letters are the same."""
    used = set(taken)
    stems = []
    for name in names:
        plain = re.sub(r"\.[A-Za-z0-9]{2,4}$", "", name)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._")[-_LONGEST_NAME:] or "image"
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        stem = next(s for s in itertools.chain([plain], numbered) if s.lower() not in used)
        used.add(stem.lower())
        stems.append(stem)
    return stems
