"""The task ``visualize``: pictures of what one backbone's patch features see."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov3_figures.canvas import save_png, whole_file
from dinov3_figures.configs import VisualizeConfig
from dinov3_figures.visualize_images import Seen, choose, look
from dinov3_figures.visualize_maps import Codes, Maps, encode, maps_of
from dinov3_figures.visualize_page import Entry, page
from dinov3_figures.visualize_panels import Shown, overview, panel
from dinov3_figures.visualize_tiles import tiles_of
from dinov3_framework import (
    Backbone,
    DataError,
    Dataset,
    LoadedBackbone,
    OutputError,
    Plan,
    Problem,
    RecipeError,
    Registry,
    Task,
    describe_recipe_backbone,
    load_recipe_backbone,
)
from dinov3_framework.runtime import collectives

log = logging.getLogger("dinov3_framework.figures")

_DIMS = 32  # numbers a patch in the page
_LONGEST_NAME = 100  # letters of a picture's file name
_LONGEST_TAIL = 60  # and of the weights' path in a caption
_OVERVIEW = "overview"


class Visualize(Task):
    """Draws figures/*.png and index.html and writes results.json."""

    def __init__(self, config: VisualizeConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    def check(self, world_size: int) -> Plan:
        config = self.config
        subject = describe_recipe_backbone(config, self.registry)
        _raise(_problems(config, subject))
        backbone = subject.backbone
        parameters = sum(parameter.numel() for parameter in backbone.parameters())
        data: list[tuple[str, str]] = []
        missing: list[str] = []
        try:
            dataset = self._dataset(subject)
            choice = choose(dataset, config.names, config.count)
        except DataError as error:
            missing.append(str(error))
        else:
            data = [("dataset", dataset.describe()), ("images", f"{len(choice):,}")]
        return Plan(
            {
                "backbone": [*subject.origin, ("parameters", f"{parameters:,}")],
                "data": [*data, ("size", self._size(subject))],
                "maps": [
                    ("maps", ", ".join(config.maps)),
                    ("layer", _layer(config, backbone)),
                    ("principal components", f"of {_extent(config)}"),
                    ("processes", str(world_size)),
                ],
            },
            missing,
        )

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        config = self.config
        subject = load_recipe_backbone(config, self.registry)
        _raise(_problems(config, subject))
        dataset = self._dataset(subject)
        choice = choose(dataset, config.names, config.count)
        seen = look(subject, dataset, choice, config)
        if not collectives.is_main():
            return
        try:
            self._write(output_dir, subject, dataset, seen)
        except OSError as error:
            raise OutputError(
                f"{error.filename or output_dir} cannot be written: {error.strerror or error}"
            ) from error

    def _dataset(self, subject: LoadedBackbone) -> Dataset:
        dataset: Dataset = self.registry.build(
            self.config.dataset, channels=subject.images.channels
        )
        return dataset

    def _size(self, subject: LoadedBackbone) -> str:
        size = self.config.size or subject.size
        patch = subject.backbone.patch_size
        length = f"{self.config.side} side {size} px" if size else "as they are"
        return f"{length}, rounded to patches of {patch} px"

    # ------------------------------------------------------------------ files
    def _write(
        self, output_dir: Path, subject: LoadedBackbone, dataset: Dataset, seen: Sequence[Seen]
    ) -> None:
        """All files; results.json, which says that they are complete, last."""
        maps = maps_of([each.features for each in seen], self.config)
        every = [
            Shown(
                each.name,
                each.label,
                found,
                tiles_of(each, found, subject.images, self.config.maps),
            )
            for each, found in zip(seen, maps, strict=True)
        ]
        codes = [self._codes(each) for each in seen]
        stems = file_stems([each.name for each in seen], taken=[_OVERVIEW])
        figures = [f"figures/{stem}.png" for stem in stems]
        caption = f"{_tail(subject.name)}, layer {_layer(self.config, subject.backbone)}"
        for shown, figure in zip(every, figures, strict=True):
            save_png(panel(shown, caption), output_dir / figure)
        note = f"{caption}; principal components of {_extent(self.config)}"
        save_png(overview(every, "Patch features", note), output_dir / f"figures/{_OVERVIEW}.png")
        facts = self._facts(subject, dataset, seen)
        entries = [Entry(*parts) for parts in zip(every, figures, codes, strict=True)]
        _save_text(page(entries, facts, self._notes(codes)), output_dir / "index.html")
        images = [_row(*parts) for parts in zip(seen, maps, figures, codes, strict=True)]
        results = {
            "task": "visualize",
            "backbone": dict(subject.origin),
            "dataset": dataset.describe(),
            "layer": self.config.layer % subject.backbone.n_layers,
            "pca": self.config.pca,
            "images": images,
        }
        _save_text(json.dumps(results, indent=2) + "\n", output_dir / "results.json")
        log.info("%d images: %s", len(seen), output_dir / "index.html")

    def _codes(self, seen: Seen) -> Codes | None:
        return encode(seen.features, _DIMS) if "similarity" in self.config.maps else None

    def _facts(
        self, subject: LoadedBackbone, dataset: Dataset, seen: Sequence[Seen]
    ) -> dict[str, str]:
        columns, width = seen[0].features.shape[1:]
        # Of the layer shown, which may have a finer grid than the last.
        cell = seen[0].image.shape[-1] // columns
        return {
            "backbone": f"{type(subject.backbone).__name__}, {width} numbers a patch of {cell} px",
            **{label: value for label, value in subject.origin if label != "backbone"},
            "layer": _layer(self.config, subject.backbone),
            "dataset": dataset.describe(),
            "images": f"{len(seen):,}; {self._size(subject)}",
        }

    def _notes(self, codes: Sequence[Codes | None]) -> list[str]:
        """What the pictures mean."""
        config = self.config
        notes = []
        if "pca" in config.maps:
            notes.append(
                "PCA: red, green and blue are the first three principal components of "
                f"{_extent(config)}; per cent: their share of the variance."
            )
        if "foreground" in config.maps:
            notes.append(
                "PCA of foreground: patches on one side of a threshold of the first component, and "
                "the principal components of these alone as colours. The side that is less at the "
                "images' borders counts as the foreground."
            )
        errors = [each.error for each in codes if each is not None]
        if errors:
            notes.append(
                "Similarity to a marked patch: the cosine between its features and each patch's, "
                "exact. Move over an image to see similarities to the patch under the pointer; "
                "click to keep it, or move it with the arrow keys. These are approximate: computed "
                f"in this page from {_DIMS} numbers of 8 bits a patch, they are off by "
                f"{max(errors):.2g} (root mean square) in the worst of these images."
            )
        return notes


# --------------------------------------------------------------------------- checks
def _problems(config: VisualizeConfig, subject: LoadedBackbone) -> list[Problem]:
    backbone = subject.backbone
    layers, patch = backbone.n_layers, backbone.patch_size
    problems = []
    if config.size is not None and config.size < patch:
        message = f"{config.size} px is less than one patch of {patch} px"
        problems.append(Problem("size", message, f"take {16 * patch} px, say, for 16 patches"))
    if not -layers <= config.layer < layers:
        message = f"is {config.layer}, the backbone has {layers:,}"
        hint = f"take one of 0 to {layers - 1}, or of -{layers} to -1"
        problems.append(Problem("layer", message, hint))
    elif _gives_last_only(backbone) and config.layer % layers != layers - 1:
        message = f"is {config.layer}, {type(backbone).__name__} gives its last layer alone"
        problems.append(Problem("layer", message, "leave it out"))
    if "similarity" in config.maps and not config.points and not config.typical:
        hint = 'give points or typical, or leave "similarity" out of maps'
        problems.append(Problem("points", "there is no patch to be similar to", hint))
    return problems


def _gives_last_only(backbone: Backbone) -> bool:
    return type(backbone).get_intermediate_layers is Backbone.get_intermediate_layers


def _raise(problems: Sequence[Problem]) -> None:
    if problems:
        raise RecipeError(problems)


# --------------------------------------------------------------------------- words and files
def _layer(config: VisualizeConfig, backbone: Backbone) -> str:
    layer, last = config.layer % backbone.n_layers, backbone.n_layers - 1
    return f"{layer}, the last" if layer == last else f"{layer} of 0 to {last}"


def _tail(name: str) -> str:
    """The end of a path, which tells most of it, where that is long."""
    return name if len(name) <= _LONGEST_TAIL else f"…{name[-_LONGEST_TAIL:]}"


def _extent(config: VisualizeConfig) -> str:
    return "all images together" if config.pca == "joint" else "each image by itself"


def _row(seen: Seen, maps: Maps, figure: str, codes: Codes | None) -> dict[str, Any]:
    """What results.json says of an image."""
    height, width = seen.image.shape[-2:]
    rows, columns = maps.grid
    row: dict[str, Any] = {
        "name": seen.name,
        "label": seen.label or None,
        "figure": figure,
        "original": {"width": seen.original[1], "height": seen.original[0]},
        "seen": {"width": width, "height": height},
        "patches": {"columns": columns, "rows": rows},
        "explained": _rounded(maps.pca_shares),
        "foreground": {
            "share": round(maps.foreground_share, 6),
            "explained": _rounded(maps.foreground_shares),
        },
        "marked": [
            {
                "why": marked.what,
                "column": marked.column,
                "row": marked.row,
                "mean_similarity": round(float(marked.similarity.mean()), 6),
            }
            for marked in maps.marked
        ],
    }
    if codes is not None:
        row["page_similarity_error"] = round(codes.error, 6)
    return row


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 6) for value in values]


def file_stems(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """A file name without its ending for each sample: letters that every system takes, no two
    alike, even where large and small letters are the same."""
    used = set(taken)
    stems = []
    for name in names:
        plain = re.sub(r"\.[A-Za-z0-9]{2,4}$", "", name)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._")[-_LONGEST_NAME:] or "image"
        stem, number = plain, 1
        while stem.lower() in used:
            number += 1
            stem = f"{plain}-{number}"
        used.add(stem.lower())
        stems.append(stem)
    return stems


def _save_text(text: str, path: Path) -> None:
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
