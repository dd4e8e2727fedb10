"""The task ``predict``: images in, predictions and pictures of them out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from attrs import evolve, frozen
from torch import Tensor

from dinov3_framework import (
    DataError,
    Dataset,
    Model,
    Plan,
    Problem,
    RecipeError,
    Registry,
    Sample,
    Target,
    Task,
    Transform,
    collectives,
    normalize,
)
from dinov3_framework.data.dense import dense_predictions, dense_problems
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.data.images import ImageFit
from dinov3_framework.data.inference import ProgressLines
from dinov3_framework.data.predictions import predictions
from dinov3_framework.data.saved_predictions import SavedPredictions
from dinov3_framework.errors import problems_at
from dinov3_framework.parallel.state_dicts import weights_hash
from dinov3_framework.runtime.agreement import OwnErrors
from dinov3_framework.runtime.output import output_file
from dinov3_framework.runtime.results import write_csv, write_results
from dinov3_predict import PredictConfig
from dinov3_predict.drawing import (
    ClassDrawing,
    Drawing,
    MapDrawing,
    MaskDrawing,
    Pixels,
    as_pixels,
)
from dinov3_predict.images import Images
from dinov3_predict.model import Loaded, describe, load
from dinov3_predict.report import Shown, thumbnail, write_page

log = logging.getLogger("dinov3_framework.predict")

_QUALITY = 90  # of JPEG


@frozen
class _Seen:
    """What became of one image."""

    index: int
    row: Mapping[str, Any]
    shown: Shown | None  # of those that the report shows


class Predict(Task):
    """Predicts, draws, and writes one report."""

    def __init__(self, config: PredictConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    # ------------------------------------------------------------------ checking
    def check(self, world_size: int) -> Plan:
        config = self.config
        loaded = describe(config, self.registry)
        name, target = self._target(loaded)
        inference = self._inference(loaded.model)
        if target.kind in ("mask", "map"):
            problems = dense_problems(loaded.model, inference, name)
            if problems:
                raise RecipeError(problems_at("inference", RecipeError(problems)))
        self._drawing(target)
        missing: list[str] = []
        images: list[tuple[str, str]] = []
        dataset = None
        try:
            dataset = self._dataset(loaded.model)
        except DataError as error:
            missing.append(str(error))
        else:
            images = [("images", dataset.describe())]
            images += [("note", note) for note in dataset.notes()]
        asked = [("target", f"{name} ({target})"), *_described(inference, loaded.model, target)]
        sections = {
            "model": loaded.rows,
            "images": [*images, ("processes", str(world_size))],
            "predictions": asked,
        }
        return Plan(sections, missing, dataset)

    def _target(self, loaded: Loaded) -> tuple[str, Target]:
        targets = loaded.head.head.targets
        known = ", ".join(f"{name} ({each})" for name, each in targets.items())
        name = self.config.target
        if name is None:
            if len(targets) > 1:
                message = f"the head predicts several: {known}"
                raise RecipeError([Problem("target", message, "name one")])
            (name,) = targets
        if name not in targets:
            raise RecipeError([Problem("target", f"is {name!r}; the head predicts {known}")])
        if targets[name].kind not in ("mask", "map", "class"):
            message = f"{name} is of kind {targets[name].kind}, of which there are no pictures"
            raise RecipeError([Problem("target", message)])
        return name, targets[name]

    def _inference(self, model: Model) -> DenseInferenceConfig:
        if self.config.inference is not None:
            return self.config.inference
        if model.size is None:
            return DenseInferenceConfig()
        return DenseInferenceConfig(resize=model.size, mode="slide", window=model.size)

    def _drawing(self, target: Target) -> Drawing:
        if target.kind == "mask":
            return MaskDrawing(target, self.config.alpha)
        if target.kind == "class":
            return ClassDrawing(target)
        import matplotlib

        if self.config.colormap not in matplotlib.colormaps:
            message = f"{self.config.colormap!r} is no color map of matplotlib"
            raise RecipeError([Problem("colormap", message, "take turbo, viridis or gray")])
        return MapDrawing(target, self.config.colormap)

    def _dataset(self, model: Model) -> Dataset:
        channels = model.images.channels
        if self.config.dataset is None:
            return Images(self.config.images or "", channels=channels)
        dataset: Dataset = self.registry.build(self.config.dataset, channels=channels)
        if len(dataset) == 0:
            raise DataError(f"{dataset.describe()}: holds no images")
        return dataset

    # ------------------------------------------------------------------ running
    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        with OwnErrors():
            loaded = load(self.config, self.registry)
            model = loaded.model
            dataset = (plan and plan.prepared) or self._dataset(model)
            self._run(output_dir, loaded, dataset)

    def _run(self, output_dir: Path, loaded: Loaded, dataset: Dataset) -> None:
        model = loaded.model
        name, target = self._target(loaded)
        drawing = self._drawing(target)
        protocol = dict(_described(self._inference(model), model, target))
        hashed = weights_hash(model.backbone, cast(Any, model.head))
        found: list[_Seen] = []
        progress = ProgressLines(-(-len(dataset) // collectives.world_size()), log)
        walked = (
            self._classes(model, dataset, name)
            if target.kind == "class"
            else self._pixels(output_dir, model, dataset, name, target, hashed, protocol)
        )
        for index, prediction in walked:
            found.append(self._show(output_dir, dataset, index, prediction, drawing))
            progress.add(1)
        shares = collectives.all_gather_object((found, drawing))
        if not collectives.is_main():
            return
        gathered = cast("list[tuple[list[_Seen], Drawing]]", shares)
        seen = sorted((each for share, _ in gathered for each in share), key=lambda s: s.index)
        legends = [each.legend() for _, each in gathered]
        self._conclude(output_dir, loaded, dataset, seen, legends, protocol, hashed)

    def _pixels(
        self,
        output_dir: Path,
        model: Model,
        dataset: Dataset,
        name: str,
        target: Target,
        hashed: str,
        protocol: Mapping[str, str],
    ) -> Iterator[tuple[int, Tensor]]:
        """Predictions of masks and maps; those that are there from before are read."""
        key = {"weights": hashed, "target": name, "classes": target.count, **protocol}
        names = (dataset.name(index) for index in range(len(dataset)))
        saved = SavedPredictions(
            output_dir / "predictions",
            key,
            self.config.formats,
            names,
            target,
            scale=self.config.png_scale,
        )
        for each in dense_predictions(
            model,
            _Unlabeled(dataset),
            self._inference(model),
            name,
            workers=self.config.workers,
            skip=saved.has,
        ):
            prediction = each.prediction
            if prediction is None:
                prediction = saved.read(each.name)
            else:
                saved.write(each.name, prediction)
            yield each.index, prediction
        if saved.clipped:
            most = 65535 * self.config.png_scale
            log.warning(
                "Values of %d images are beyond the %g %s that a 16-bit PNG holds; set png_scale",
                saved.clipped,
                most,
                target.unit,
            )

    def _classes(self, model: Model, dataset: Dataset, name: str) -> Iterator[tuple[int, Tensor]]:
        if model.size is None:
            raise DataError("nothing says how large the head's images were")
        shown = ImageFit(model.images, 1, "crop", model.size)
        config = self.config
        for predicted, targets in predictions(
            model,
            _Numbered(dataset),
            _Cropped(shown),
            batch_size=config.batch_size,
            workers=config.workers,
        ):
            scores = predicted[name].float().softmax(-1).cpu()
            yield from zip(targets["index"].tolist(), scores, strict=True)

    def _show(
        self, output_dir: Path, dataset: Dataset, index: int, prediction: Tensor, drawing: Drawing
    ) -> _Seen:
        name = dataset.name(index)
        words = drawing.words(prediction)
        row = {"image": name}
        shown = None
        if self.config.overlays or index < self.config.report_images:
            image = as_pixels(dataset[index].image)
            row |= {"width": image.shape[1], "height": image.shape[0]}
            over = drawing.over(image, prediction)
            if self.config.overlays and not isinstance(drawing, ClassDrawing):
                self._save(output_dir / "overlays" / _jpeg(name), over)
            if index < self.config.report_images:
                shown = Shown(name, thumbnail(image), thumbnail(over), dict(words))
        return _Seen(index, {**row, **words}, shown)

    @staticmethod
    def _save(path: Path, pixels: Pixels) -> None:
        from PIL import Image

        if path.is_file():
            return
        with output_file(path) as aside:
            Image.fromarray(np.ascontiguousarray(pixels)).save(
                aside, format="JPEG", quality=_QUALITY
            )

    def _conclude(
        self,
        output_dir: Path,
        loaded: Loaded,
        dataset: Dataset,
        seen: list[_Seen],
        legends: list[Mapping[str, tuple[int, int, int]]],
        protocol: Mapping[str, str],
        hashed: str,
    ) -> None:
        columns = list(dict.fromkeys(key for each in seen for key in each.row))
        with output_file(output_dir / "predictions.csv") as aside:
            write_csv(aside, columns, ([s.row.get(c, "") for c in columns] for s in seen))
        skipped = len(dataset) - len(seen)
        facts = {
            **dict(loaded.rows),
            "images": dataset.describe(),
            **({"unreadable": str(skipped)} if skipped else {}),
            **protocol,
            "hash of the weights": hashed,
        }
        shown = [each.shown for each in seen if each.shown is not None]
        legend = {name: color for each in legends for name, color in each.items()}
        write_page(
            output_dir / "report.html", facts, shown, legend, left_out=len(seen) - len(shown)
        )
        write_results(
            output_dir,
            {
                "task": "predict",
                "model": dict(loaded.rows),
                "weights": hashed,
                "protocol": dict(protocol),
                "images": len(seen),
                "skipped": skipped,
                "files": ["predictions.csv", "report.html"],
            },
        )
        log.info("Predictions of %d images: %s", len(seen), output_dir / "report.html")


# --------------------------------------------------------------------------- parts
def _described(
    inference: DenseInferenceConfig, model: Model, target: Target
) -> list[tuple[str, str]]:
    if target.kind == "class":
        return [("seen", f"the middle, {model.size} px")]
    size = (
        "their own size"
        if inference.resize is None
        else (f"{inference.side} side {inference.resize} px, {inference.interpolation}")
    )
    found = [("resized to", size), ("mode", inference.mode)]
    if inference.mode == "slide":
        window = inference.window or model.size or 0
        stride = inference.stride or window * 2 // 3
        found.append(("windows", f"{window} px, every {stride} px"))
    scales = ", ".join(f"{scale:g}" for scale in inference.scales)
    return [*found, ("scales", scales), ("mirrored, too", "yes" if inference.flip else "no")]


def _jpeg(name: str) -> Path:
    parts = [part for part in Path(name).parts if part not in ("/", "..")]
    *folders, last = parts or ["image"]
    return Path(*folders, f"{last}.jpg")


class _Unlabeled(Dataset):
    """A dataset whose predictions are at the size of the image, whatever it knows of it."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return evolve(self.dataset[index], targets={})

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def describe(self) -> str:
        return self.dataset.describe()


class _Numbered(_Unlabeled):
    """Whose samples say which they are."""

    def __getitem__(self, index: int) -> Sample:
        return evolve(self.dataset[index], targets={"index": index})


class _Cropped(Transform):
    def __init__(self, fit: ImageFit) -> None:
        self.fit, self.size = fit, (fit.size or 0, fit.size or 0)

    def __call__(self, sample: Sample) -> Sample:
        return Sample(normalize(self.fit(sample.image), self.fit.images), sample.targets)
