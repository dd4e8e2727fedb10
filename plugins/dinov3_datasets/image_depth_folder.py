"""Folders of images and of their depth as a dataset."""

from __future__ import annotations

from torch import Tensor

from dinov3_datasets.dense_pairs import DensePairs
from dinov3_datasets.depth_configs import DepthFolderConfig
from dinov3_datasets.depth_values import DepthReader
from dinov3_datasets.pairing import Pairing
from dinov3_framework import CorruptSampleError, DataError, Target
from dinov3_framework.errors import WrongTargetError


class ImageDepthFolder(DensePairs):
    """Images with the target ``depth``, float32."""

    component = "image_depth_folder"
    config: DepthFolderConfig

    def __init__(self, config: DepthFolderConfig, *, channels: int) -> None:
        pairing = Pairing(
            component=self.component,
            truth="depth",
            image_extensions=config.extensions,
            truth_extensions=config.depth_extensions,
            image_suffix=config.image_suffix,
            truth_suffix=config.depth_suffix,
            skip_unpaired=config.skip_unpaired,
        )
        pairs = pairing.pairs(config.images, config.depth)
        super().__init__(config, channels, pairs, {"depth": Target("map", unit=config.unit)})
        self.reader = DepthReader(config.max_pixels, config.scale, config.invalid, config.negative)
        self._require_scale()

    def read_truth(self, index: int) -> Tensor:
        return self.reader(self.truth_path(index))

    def truth_options(self) -> str:
        config = self.config
        return (
            f"depth times {config.scale} in {config.unit}, invalid {list(config.invalid)}, "
            f"negative {config.negative}"
        )

    def _require_scale(self) -> None:
        """Raise ``DataError`` where the first file holds integers of no stated scale."""
        try:
            self.read_truth(0)
        except WrongTargetError as error:
            raise DataError(f"image_depth_folder: {error}") from error
        except CorruptSampleError:
            return  # the first is broken, which is counted when it is read
