"""Whether the features of a frozen backbone are extracted once, and what that takes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from attrs import asdict, frozen

from dinov3_framework import (
    Backbone,
    DataError,
    Dataset,
    FeatureNeeds,
    Head,
    HeadFeatures,
    ImagesConfig,
    Problem,
    StreamDataset,
    Transform,
    UserError,
)
from dinov3_framework.data.tokens import head_features
from dinov3_framework.parallel.sharder import DTYPES as COMPUTED
from dinov3_framework.parallel.state_dicts import weights_hash
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import OwnErrors, broadcast_from_rank0, run_on_all_ranks
from dinov3_framework.runtime.durable import written_aside
from dinov3_framework.training.simulation import made_up_sample
from dinov3_heads import TrainHeadConfig
from dinov3_heads.feature_chunks import DTYPES, Chunk, ChunkFolder, ChunkStore
from dinov3_heads.reused_batches import changed_features

_FORMAT = 1  # of the files; another one is another folder
_GIB = 2**30
_PIXELS = 2**22  # of a chunk: 16 images of 512 x 512 px; 64 of 224 x 224
_MOST = 64  # images of a chunk


@frozen
class Reuse:
    """What is kept of each of ``count`` samples, and where; or why nothing is.

    Nothing is where ``refusal`` says why; ``is_wrong`` tells a recipe that asks for what cannot be
    from one that leaves the choice.
    """

    count: int = 0
    sample_bytes: int = 0
    chunk_size: int = 1
    passes: float = 0.0
    shape: tuple[int, int, int] = (0, 0, 0)  # [C, H, W] of images
    folder: Path | None = None
    refusal: str = ""
    hint: str = ""
    blank: HeadFeatures | None = None  # features of one image, on the meta device

    @property
    def is_on(self) -> bool:
        return not self.refusal

    @property
    def gib(self) -> float:
        return self.count * self.sample_bytes / _GIB

    def rows(self, world_size: int) -> list[tuple[str, str]]:
        """What a check says of it."""
        if not self.is_on:
            return [("features", f"extracted in each step: {self.refusal}")]
        text = f"extracted once, of {self.count:,} images; used in {self.passes:,.3g} passes"
        where = f"in files in {self.folder}"
        if self.folder is None:
            where = "in memory" + (f" of each of {world_size} processes" if world_size > 1 else "")
        return [("features", text), ("features' size", f"{self.gib:,.3g} GiB, {where}")]


def plan_reuse(
    config: TrainHeadConfig,
    backbone: Backbone,
    head: Head | None,
    transform: Transform,
    dataset: Dataset | StreamDataset | None,
) -> Reuse:
    """What the recipe comes to; networks are on the meta device."""
    if config.reuse_features == "never":
        return Reuse(refusal='reuse_features = "never"')
    if dataset is None or head is None:
        return Reuse(refusal="the data are not here to be counted")
    if obstacle := _obstacle(config, head, transform, dataset):
        return obstacle
    indexed = cast(Dataset, dataset)
    count = len(indexed)
    passes = config.iterations * config.batch_size / count
    if config.reuse_features == "auto" and passes < 2:
        return Reuse(refusal=f"the run makes {passes:.3g} passes over the data")
    folder = None if config.feature_cache is None else Path(config.feature_cache)
    if folder is not None and indexed.version() is None:
        folder = None  # nothing to know these data again by
    height, width = transform.size or (0, 0)
    shape = (backbone.in_chans, height, width)
    dtype = COMPUTED[config.parallel.param_dtype]
    try:
        with torch.no_grad():
            found = head_features(backbone, torch.empty(1, *shape, device="meta"), head.needs)
            blank = changed_features(found, lambda each: each.to(dtype))
    except (UserError, IndexError):
        return Reuse(refusal="the backbone does not give the features")  # told elsewhere
    reuse = Reuse(
        count=count,
        sample_bytes=_sample_bytes(config, blank, transform, shape),
        chunk_size=max(min(_PIXELS // (height * width), _MOST, count), 1),
        passes=passes,
        shape=shape,
        folder=folder,
        blank=blank,
    )
    if folder is None and reuse.gib > config.feature_memory:
        refusal = (
            f"they take {reuse.gib:,.3g} GiB, and feature_memory is {config.feature_memory:g} GiB"
        )
        return Reuse(refusal=refusal, hint="raise it, or name a folder as feature_cache")
    return reuse


def _obstacle(
    config: TrainHeadConfig, head: Head, transform: Transform, dataset: Dataset | StreamDataset
) -> Reuse | None:
    """Why features cannot be reused, however few there are."""
    options = list(transform.random_options())
    if config.tune_backbone:
        return Reuse(refusal="the backbone is trained", hint="leave tune_backbone out")
    if not isinstance(dataset, Dataset):
        return Reuse(refusal="the data are a stream, without an index")
    if transform.random:
        if not options:
            return Reuse(refusal="the transform does not say that it draws nothing at random")
        named = ", ".join(f"transform.{name}" for name in options)
        verb = "draws" if len(options) == 1 else "draw"
        return Reuse(refusal=f"{named} {verb} at random", hint="leave out what is random")
    if head.needs.image:
        return Reuse(refusal="the head looks at images besides features")
    if transform.size is None:
        hint = "let the transform crop images, or resize both of their sides"
        return Reuse(refusal="images are of several sizes", hint=hint)
    if type(transform).collate is not Transform.collate:
        return Reuse(refusal="the transform makes batches in a way of its own")
    return None


def reuse_problem(config: TrainHeadConfig, reuse: Reuse, dataset: object) -> list[Problem]:
    """What is wrong with a recipe that insists."""
    if config.reuse_features != "always" or reuse.is_on or dataset is None:
        return []
    hint = reuse.hint or 'set reuse_features = "auto"'
    return [Problem("reuse_features", f'"always", but {reuse.refusal}', hint)]


def _sample_bytes(
    config: TrainHeadConfig,
    blank: HeadFeatures,
    transform: Transform,
    shape: tuple[int, int, int],
) -> int:
    """Of one sample: its features, and its targets as far as a made-up one tells."""
    features = [*blank.maps, *blank.cls, *blank.storage]
    kept = [DTYPES.get(config.feature_dtype, each.dtype) for each in features]
    size = sum(each.numel() * dtype.itemsize for each, dtype in zip(features, kept, strict=True))
    with torch.random.fork_rng(devices=[]):
        sample = transform(made_up_sample(transform.targets, shape[1:], shape[0]))
    return size + Chunk.of(None, {0: sample}, {}, None).nbytes()


# --------------------------------------------------------------------------- the store
def open_store(
    reuse: Reuse,
    backbone: Backbone,
    dataset: Dataset,
    needs: FeatureNeeds,
    transform: tuple[str, Mapping[str, Any]],
    images: ImagesConfig,
    dtypes: tuple[str, str],
) -> ChunkStore:
    """Where the features are or will be; called by every process.

    In a folder they lie in one below it, named by a hash of all that decides on them: the weights,
    the data and their state, the ``transform`` (its name and options), what the head needs, the
    ``dtypes`` that are computed and kept. Raises ``DataError`` where the disk has no room.
    """
    if reuse.folder is None:
        return ChunkStore(reuse.count, reuse.chunk_size)
    cls = type(dataset)
    content = {
        "format": _FORMAT,
        "weights": weights_hash(backbone),
        "dataset": f"{cls.__module__}.{cls.__qualname__}",
        "data": broadcast_from_rank0(dataset.version),
        "targets": {name: str(asdict(each)) for name, each in dataset.targets.items()},
        "transform": transform,
        "images": str(images),
        "needs": asdict(needs) | {"layers": [layer % backbone.n_layers for layer in needs.layers]},
        "dtypes": dtypes,
        "samples": [reuse.count, reuse.chunk_size, *reuse.shape],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
    folder = reuse.folder.expanduser() / f"samples-{digest}"
    store = ChunkFolder(folder, reuse.count, reuse.chunk_size)
    with OwnErrors():
        run_on_all_ranks(_prepare_folder, store, reuse, content)
    return store


def _prepare_folder(store: ChunkFolder, reuse: Reuse, content: Mapping[str, Any]) -> None:
    """Make the folder, say in it what it holds, and see whether the rest finds room."""
    if not collectives.is_main():
        return
    try:
        with written_aside(store.folder / "features.json") as aside:
            aside.write_text(json.dumps(content, indent=1), "utf-8")
        rest = sum(len(store.indices(number)) for number in store.missing()) * reuse.sample_bytes
        free = shutil.disk_usage(store.folder).free
    except OSError as error:
        raise DataError(f"features cannot be kept in {store.folder}: {error}") from error
    if rest > free:
        raise DataError(
            f"features take {rest / _GIB:,.3g} GiB more in {store.folder}, where "
            f"{free / _GIB:,.3g} GiB are free\n    make room, name another folder as "
            'feature_cache, or set reuse_features = "never"'
        )
