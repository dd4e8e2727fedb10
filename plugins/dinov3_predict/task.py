"""The task ``predict``: images in, predictions and pictures of them out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from dinov3_framework import (
    CorruptSampleError,
    DataError,
    Dataset,
    Model,
    Plan,
    Problem,
    RecipeError,
    Registry,
    Target,
    Task,
    collectives,
)
from dinov3_framework.data.dense import dense_problems
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.data.inference import ProgressLines
from dinov3_framework.data.saved_predictions import SavedPredictions
from dinov3_framework.errors import printable, problems_at
from dinov3_framework.parallel.state_dicts import weights_hash
from dinov3_framework.runtime.agreement import OwnErrors
from dinov3_predict import PredictConfig
from dinov3_predict.drawing import ClassDrawing, Drawing, MapDrawing, MaskDrawing
from dinov3_predict.images import Images, Resizable
from dinov3_predict.model import LoadedModel, describe, load
from dinov3_predict.outputs import OVERLAYS, PAGE, PREDICTIONS, TABLE, Outputs, Seen
from dinov3_predict.walk import Walk

# Below the framework's logger, whose handlers write run.log.
log = logging.getLogger("dinov3_framework.predict")

KINDS = ("mask", "map", "class")


class Predict(Task):
    """Predicts, draws, and writes one report."""

    def __init__(self, config: PredictConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    # ------------------------------------------------------------------ checking
    def check(self, world_size: int) -> Plan:
        if self.config.images is None and self.config.dataset is None:
            raise RecipeError([Problem("images", "are missing", "give images=FOLDER")])
        loaded = describe(self.config, self.registry)
        name, target = self.target(loaded)
        drawing = self._drawing(target)
        self._check_inference(loaded.model, name, target)
        missing: list[str] = []
        images: list[tuple[str, str]] = []
        dataset = None
        try:
            dataset = self.dataset(loaded.model, target)
        except DataError as error:
            missing.append(str(error))
        else:
            images = [("images", dataset.describe()), ("first", _first_size(dataset))]
            images += [("note", note) for note in dataset.notes()]
        protocol = _described(self.inference(loaded.model), loaded.model, target)
        sections = {
            "model": loaded.rows,
            "images": [*images, ("processes", str(world_size))],
            "predictions": [("target", f"{name}, a {target}"), *protocol.items()],
            "files": self._files(target, drawing),
        }
        return Plan(sections, missing, dataset)

    def target(self, loaded: LoadedModel) -> tuple[str, Target]:
        """The target that is predicted; raises ``RecipeError``."""
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
        target = targets[name]
        if target.kind not in KINDS or target.per_object:
            message = f"{name} is a {target}, which is not drawn"
            raise RecipeError([Problem("target", message, f"drawn are {', '.join(KINDS)}")])
        return name, target

    def inference(self, model: Model) -> DenseInferenceConfig:
        """How pixels are predicted."""
        if self.config.inference is not None or model.size is None:
            return self.config.inference or DenseInferenceConfig()
        patch = model.backbone.patch_size
        size = max(model.size // patch, 1) * patch
        return DenseInferenceConfig(resize=size, mode="slide", window=size)

    def _check_inference(self, model: Model, name: str, target: Target) -> None:
        if target.kind == "class":
            if self.config.inference is not None:
                message = "is for masks and maps, and the head predicts classes"
                raise RecipeError([Problem("inference", message, "leave it out")])
            if model.size is None:
                raise DataError("nothing says how large the images of the head's training were")
        elif problems := dense_problems(model, self.inference(model), name):
            raise RecipeError(problems_at("inference", RecipeError(problems)))

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

    def dataset(self, model: Model, target: Target) -> Dataset:
        """The images; raises ``DataError`` where there are none."""
        channels = model.images.channels
        if self.config.dataset is None:
            dataset: Dataset = Images(self.config.images or "", channels=channels)
        else:
            dataset = self.registry.build(self.config.dataset, channels=channels)
        if len(dataset) == 0:
            raise DataError(f"{dataset.describe()}: holds no images")
        return dataset if target.kind == "class" else Resizable(dataset, self.inference(model))

    def _files(self, target: Target, drawing: Drawing) -> list[tuple[str, str]]:
        config, found = self.config, []
        if drawing.has_files:
            bits = 8 if (target.count or 0) <= 256 else 16
            what = f"class ids, {bits} bits" + (", with colors" if bits == 8 else "")
            if target.kind == "map":
                step, most = config.png_scale, 65_535 * config.png_scale
                what = f"16 bits, steps of {step:g} {target.unit} up to {most:g} {target.unit}"
            texts = {"png": f"NAME.png, {what}", "npy": "NAME.npy, exact"}
            found = [(PREDICTIONS, texts[form]) for form in config.formats]
            found += [(OVERLAYS, "NAME.jpg")] if config.overlays else []
        return [*found, ("table", TABLE), ("report", f"{PAGE}, of {config.report_images} images")]

    # ------------------------------------------------------------------ running
    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        with OwnErrors():
            self._run(output_dir, plan)

    def _run(self, output_dir: Path, plan: Plan | None) -> None:
        config, loaded = self.config, load(self.config, self.registry)
        model = loaded.model
        name, target = self.target(loaded)
        dataset = (plan and plan.prepared) or self.dataset(model, target)
        drawing = self._drawing(target)
        protocol = _described(self.inference(model), model, target)
        weights = weights_hash(model.backbone, cast(Any, model.head))
        names = [dataset.name(index) for index in range(len(dataset))]
        saved = None
        if drawing.has_files:
            key = {"weights": weights, "target": name, **protocol}
            folder, scale = output_dir / PREDICTIONS, config.png_scale
            saved = SavedPredictions(folder, key, config.formats, names=names, scale=scale)
        outputs = Outputs(config, drawing, output_dir, names, saved)
        progress = ProgressLines(-(-len(dataset) // collectives.world_size()), log)
        seen: list[Seen] = []
        for each in self.walk(model, dataset, name)(saved, outputs.wants_image):
            seen.append(outputs.seen(each))
            progress.add(1)
        clipped = 0 if saved is None else saved.clipped
        gathered = collectives.all_gather_object((seen, clipped))
        if not collectives.is_main():
            return
        shares = cast("list[tuple[list[Seen], int]]", gathered)
        notes = []
        if clipped := sum(count for _, count in shares):
            most = f"{65_535 * config.png_scale:g} {target.unit}".strip()
            notes.append(
                f"PNG files of {clipped:,} images are cut off at 0 or {most}; set png_scale"
            )
            log.warning("%s", notes[0])
        facts = {"images": dataset.describe(), **dict(loaded.rows)}
        facts |= {"hash of the weights": weights, "target": f"{name}, a {target}", **protocol}
        outputs.conclude(dataset, [each for seen, _ in shares for each in seen], facts, notes)

    def walk(self, model: Model, dataset: Dataset, target: str) -> Walk:
        """What predicts the images."""
        config, inference = self.config, self.inference(model)
        return Walk(model, dataset, target, inference, config.batch_size, config.workers)


def predicted_images(config: PredictConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, prediction) of each image, without files; see ``dinov3_predict.predict``."""
    registry = Registry.load()
    task, loaded = Predict(config, registry=registry), load(config, registry)
    name, target = task.target(loaded)
    dataset = task.dataset(loaded.model, target)
    for each in task.walk(loaded.model, dataset, name)():
        yield dataset.name(each.index), each.prediction


# --------------------------------------------------------------------------- words
def _described(inference: DenseInferenceConfig, model: Model, target: Target) -> dict[str, str]:
    """All that changes a prediction, for a person and to know it again."""
    if target.kind == "class":
        return {"seen": f"the middle, {model.size} x {model.size} px"}
    found = {"resized to": "their own size"}
    if inference.resize is not None:
        size = f"{inference.resize} px, {inference.interpolation}"
        found["resized to"] = f"{inference.side} side {size}".replace("both side", "both sides")
    if inference.mode == "slide":
        window = inference.window or model.size or 0
        found["windows"] = f"{window} px, every {inference.stride or window * 2 // 3} px"
    else:
        found["windows"] = "none, the whole image at once"
    found["scales"] = ", ".join(f"{scale:g}" for scale in inference.scales)
    return {**found, "mirror images": "averaged with" if inference.flip else "not looked at"}


def _first_size(dataset: Dataset) -> str:
    """The size of the first of some images that can be read."""
    for index in range(min(len(dataset), 5)):
        try:
            height, width = dataset[index].image.shape[-2:]
        except CorruptSampleError:
            continue
        return f"{printable(dataset.name(index))}, {width} x {height} px"
    return "none of the first can be read"
