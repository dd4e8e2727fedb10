"""Predictions by pixel as files: masks with their colors, depth in 16 bits, arrays.

A folder holds those of one model asked in one way, as ``predictions.json`` in it says, so that what
is there need not be predicted again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3_framework.contracts.data import Target
from dinov3_framework.data.palettes import palette
from dinov3_framework.errors import DataError, printable
from dinov3_framework.runtime.agreement import OwnErrors, broadcast_from_rank0
from dinov3_framework.runtime.durable import clear_aside, parse_json
from dinov3_framework.runtime.output import output_file

FILE = "predictions.json"
FORMATS = ("png", "npy")
_SCALE = "map scale"  # in predictions.json and in each PNG of a map: what a step of it stands for
_LONGEST = 200  # bytes of a file's name, which becomes longer while it is written
_BYTES = 256  # classes of a palette
_MOST = 2**16 - 1


class SavedPredictions:
    """A folder of predictions of samples, by their names.

    - ``png``: a mask as class ids, 8 bits with the target's palette, or 16 bits where there are
      more than 256 classes; a map in 16 bits, in steps of ``scale`` of its unit, 0 where nothing
      is known (each file and ``predictions.json`` state the scale);
    - ``npy``: class ids as uint8 or uint16; float32 of a map, exact.

    ``key`` says what they are predictions of, in plain values. A file is called as its sample, with
    the suffix of the image (``a/b.jpg.png``); where all ``names`` are given, without it
    (``a/b.png``), if no two of them differ in it alone. To be made by every process; each writes
    those of its own samples. Raises ``DataError`` where the folder holds those of another key, and
    ``OutputError`` where it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        formats: Sequence[str],
        *,
        names: Iterable[str] = (),
        scale: float = 1e-3,
    ) -> None:
        unknown = [form for form in formats if form not in FORMATS]
        if unknown or not formats:
            raise DataError(f"formats of predictions are {', '.join(FORMATS)}, not {[*formats]}")
        self.folder, self.formats, self.scale = folder, tuple(formats), scale
        self.clipped = 0  # of how many maps here a value was beyond what 16 bits hold
        self._stems = unique_stems(names)
        with OwnErrors():
            broadcast_from_rank0(self._claim, dict(key))

    def _claim(self, key: dict[str, Any]) -> None:
        """Make the folder one of these predictions, or say whose it is."""
        path = self.folder / FILE
        # As it will be read again: tuples are lists, keys are strings.
        stated = json.loads(json.dumps({**key, _SCALE: self.scale}, default=str))
        try:
            found = parse_json(path.read_bytes())
        except FileNotFoundError:
            with output_file(path) as aside:
                aside.write_text(json.dumps(stated, indent=2) + "\n", "utf-8")
            return
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}; delete the folder") from error
        if not isinstance(found, dict):
            raise DataError(f"{path} does not describe predictions; delete the folder")
        different = [
            printable(f"    {name}: {found.get(name)} there, {stated.get(name)} now")
            for name in {**found, **stated}
            if found.get(name) != stated.get(name)
        ]
        if different:
            raise DataError(
                f"{self.folder} holds other predictions; delete it, or write elsewhere:\n"
                + "\n".join(different)
            )
        for folder, _, _ in os.walk(self.folder):
            clear_aside(Path(folder))  # what a killed process left

    # ------------------------------------------------------------------ files
    def path(self, name: str, form: str) -> Path:
        """Where the prediction of a sample is, whether or not it is there yet."""
        return self.folder / relative_path(self._stems.get(name, name), form)

    def has(self, name: str) -> bool:
        """Whether it is there in every format; a file that is there is whole."""
        return all(self.path(name, form).is_file() for form in self.formats)

    def write(self, name: str, prediction: Tensor, target: Target) -> None:
        """Keep class ids [H, W] of a mask, or values [H, W] of a map."""
        values = prediction.detach().cpu().numpy()
        values = values.astype(np.float32) if target.kind == "map" else _ids(values, target)
        for form in self.formats:
            with output_file(self.path(name, form)) as aside:
                if form == "npy":
                    with aside.open("wb") as stream:
                        np.save(stream, values, allow_pickle=False)
                elif target.kind == "map":
                    self._write_map(aside, values)
                else:
                    _write_mask(aside, values, target)

    def _write_map(self, path: Path, values: np.ndarray[Any, Any]) -> None:
        from PIL import Image, PngImagePlugin

        known = np.isfinite(values)
        steps = np.rint(np.where(known, values, 0).astype(np.float64) / self.scale)
        self.clipped += bool((steps > _MOST).any() or (steps < 0).any())
        # 0 stands for the unknown, so that the smallest known value is 1.
        stored = np.where(known, steps.clip(1, _MOST), 0).astype(np.uint16)
        text = PngImagePlugin.PngInfo()
        text.add_text(_SCALE, repr(self.scale))
        Image.fromarray(stored).save(path, format="PNG", pnginfo=text)

    def read(self, name: str) -> Tensor:
        """A prediction that is there: int64 ids or float32 values [H, W], NaN where unknown.

        Raises ``DataError`` where it cannot be read.
        """
        form = "npy" if "npy" in self.formats else "png"
        path = self.path(name, form)
        try:
            values = np.load(path, allow_pickle=False) if form == "npy" else _read_png(path)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path} cannot be read: {error}; delete it") from error
        if values.ndim != 2 or values.dtype.kind not in "uf":
            shape = list(values.shape)
            raise DataError(f"{path} is no prediction: {values.dtype} {shape}; delete it")
        return torch.from_numpy(
            values.astype(np.float32 if values.dtype.kind == "f" else np.int64, copy=False)
        )


def unique_stems(names: Iterable[str]) -> dict[str, str]:
    """Each name without its suffix, if it has one; empty where two would become the same."""
    stems = {name: name.removesuffix(_suffix(name)) for name in names}
    return stems if len(set(stems.values())) == len(stems) else {}


def _suffix(name: str) -> str:
    """What stands for the kind of a file; that of "tile 0.5" does not."""
    suffix = PurePosixPath(name).suffix
    return suffix if suffix[1:2].isalpha() else ""


def relative_path(name: str, suffix: str) -> Path:
    """A path below any folder for a sample's name, with ``suffix`` after it.

    It stays below: ``..`` and a root are replaced. Names too long for a file are cut, and made
    unique by a hash.
    """
    parts = [{"/": "_", "..": "__"}.get(part, part) for part in PurePosixPath(name).parts]
    *folders, last = [_cut(part) for part in parts] or ["_"]
    return Path(*folders, f"{last}.{suffix}")


def _cut(part: str) -> str:
    data = os.fsencode(part)
    if len(data) <= _LONGEST:
        return part
    digest = hashlib.blake2b(data, digest_size=8).hexdigest()
    return f"{part[: _LONGEST // 5]}-{digest}"


def _ids(values: np.ndarray[Any, Any], target: Target) -> np.ndarray[Any, Any]:
    """Class ids in the type that holds those of all classes."""
    most = max(target.count or 0, target.ignore_index or 0, int(values.max(initial=0)) + 1)
    return values.astype(np.uint8 if most <= _BYTES else np.uint16)


def _write_mask(path: Path, ids: np.ndarray[Any, Any], target: Target) -> None:
    from PIL import Image

    picture = Image.fromarray(ids)
    if ids.dtype == np.uint8:
        colors = target.palette or palette(_BYTES)
        picture.putpalette([channel for color in colors[:_BYTES] for channel in color])
    picture.save(path, format="PNG")


def _read_png(path: Path) -> np.ndarray[Any, Any]:
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as picture:
        picture.load()
        values = np.array(picture)
        if picture.mode.startswith("I"):
            values = values.astype(np.uint16)  # Pillow used to read 16 bits as 32
        scale = getattr(picture, "text", {}).get(_SCALE)
    if scale is None:
        return values
    return np.where(values != 0, values * float(scale), np.nan).astype(np.float32)
