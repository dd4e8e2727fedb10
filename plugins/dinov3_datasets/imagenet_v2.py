"""ImageNet-V2 (Recht et al. 2019, arXiv:1902.10811): folders named after the labels 0 to 999."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from dinov3_datasets.file_stamps import files_stamp
from dinov3_datasets.imagenet_configs import ImagenetV2Config
from dinov3_datasets.imagenet_layout import read_labels
from dinov3_datasets.index_arrays import check_class_ids, data_folder, load_array
from dinov3_datasets.listing import FileList, image_files
from dinov3_framework import DataError, Dataset, Sample, Target
from dinov3_framework.data.pictures import read_image
from dinov3_framework.errors import first_few

_ENDINGS = (".jpeg", ".jpg", ".png")


class ImagenetV2(Dataset):
    """One of the test sets of ImageNet-V2, uint8 [channels, H, W], with the classes of ImageNet-1k.

    Folders sort as numbers: 10 comes after 9. Raises ``DataError`` for folders that are missing,
    empty, or no label.
    """

    def __init__(self, config: ImagenetV2Config, *, channels: int) -> None:
        self.config, self.channels = config, channels
        self.root = data_folder("imagenet_v2", config.root, "the folders 0 to 999")
        self.ids, names = class_list(Path(config.imagenet).expanduser())
        classes = names if config.classes == "names" else self.ids
        self.targets = {"label": Target("class", classes=classes)}
        self.passed_over: Counter[str] = Counter()
        folders = [str(label) for label in self._folders()]
        self.files = FileList(image_files(self.root, _ENDINGS, folders, self.passed_over))
        self.labels = np.array([int(name.partition("/")[0]) for name in self.files], np.int32)
        counts = np.bincount(self.labels, minlength=len(classes))
        empty = [str(label) for label in np.flatnonzero(counts == 0)]
        if not len(self.files) or (empty and not config.subset):
            raise DataError(
                f"imagenet_v2: {self.root} has no image for {len(empty):,} of {len(classes):,} "
                f"classes: {first_few(empty)}\n    fetch them, or set subset = true"
            )
        self.empty = empty

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        image = read_image(self.root / self.files[index], self.channels, self.config.max_pixels)
        return Sample(image, {"label": self.label(index)})

    def label(self, index: int) -> int:
        """The label, without reading the image."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return self.files[range(len(self))[index]]

    def describe(self) -> str:
        return f"imagenet_v2 {self.root}: {len(self):,} images, {self.n_classes:,} classes"

    def digest(self) -> str:
        ids = hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:8]
        return f"{len(self):,} images, their names {self.files.digest}, their classes {ids}"

    def version(self) -> str:
        stamp = files_stamp(self.root, iter(self.files))
        return f"{self.digest()}; at most {self.config.max_pixels} pixels, files {stamp}"

    def notes(self) -> list[str]:
        found = []
        if count := self.passed_over.total():
            found.append(f"{count:,} other files passed over")
        if self.empty:
            found.append(f"{len(self.empty):,} classes have no image: {first_few(self.empty)}")
        return found

    def _folders(self) -> list[int]:
        """The labels that there are folders of, in order."""
        try:
            names = [path.name for path in self.root.iterdir() if path.is_dir()]
        except OSError as error:
            raise DataError(f"cannot read the folder {self.root}: {error.strerror}") from error
        names = [name for name in names if not name.startswith(".")]
        count = len(self.ids)
        known = {str(label) for label in range(count)}
        if strange := sorted(set(names) - known):
            raise DataError(
                f"imagenet_v2: {self.root} has folders that are no label of 0 to {count - 1:,}: "
                f"{first_few(strange)}\n    root is the folder with the folders 0 to 999, and "
                "imagenet the list of all 1,000 classes"
            )
        return sorted(map(int, names))


def class_list(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ids and names of ImageNet-1k's classes by label; raises ``DataError``.

    From index files in a folder or in extra below it, so that labels mean what they mean there;
    else from labels.txt, sorted by id.
    """
    for folder in (path, path / "extra"):
        for split in ("TRAIN", "VAL"):
            files = [folder / f"class-{what}-{split}.npy" for what in ("ids", "names")]
            if not files[0].exists():
                continue
            mend = "dinov3-run index writes it anew"
            ids, names = (tuple(map(str, load_array(each, None, mend))) for each in files)
            check_class_ids(ids, files[0], mend)
            if len(ids) != len(names):
                raise DataError(f"{files[0]} and {files[1].name} differ in length\n    {mend}")
            return ids, names
    labels = path / "labels.txt" if path.is_dir() else path
    if not labels.is_file():
        raise DataError(
            f"imagenet_v2: imagenet = {str(path)!r} has neither class-ids-TRAIN.npy nor "
            "labels.txt\n    it is the folder of imagenet_1k, where labels get their meaning"
        )
    ordered = sorted(read_labels(labels).items())
    return tuple(each for each, _ in ordered), tuple(name for _, name in ordered)
