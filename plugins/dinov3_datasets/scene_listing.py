"""Which files of a folder are the scenes."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from dinov3_datasets.listing import image_files
from dinov3_datasets.scene_configs import GeotiffScenesConfig
from dinov3_framework import DataError
from dinov3_framework.errors import first_few

_ENDINGS = (".tif", ".tiff")


def list_scenes(config: GeotiffScenesConfig) -> tuple[Path, list[str]]:
    """The folder, and the scenes below it by their paths; raises ``DataError``."""
    root = Path(config.root).expanduser()
    if root.is_file():
        return root.parent, [root.name]
    if not root.is_dir():
        raise DataError(
            f"geotiff_scenes: root = {config.root!r} does not exist\n"
            "    root is the folder of your scenes, or one of them"
        )
    if config.scenes is not None:
        names = list(config.scenes)
        if absent := [name for name in names if not (root / name).is_file()]:
            raise DataError(f"geotiff_scenes: no scene {first_few(map(repr, absent))} in {root}")
    else:
        names = list(image_files(root, _ENDINGS))
        if config.pattern is not None:
            names = [name for name in names if fnmatchcase(name, config.pattern)]
    if not names:
        what = "that end in .tif or .tiff"
        if config.pattern is not None:
            what += f" and fit pattern = {config.pattern!r}"
        raise DataError(f"geotiff_scenes: no files {what} in {root} or below")
    return root, names
