#!/usr/bin/env bash
# RandomResizedCrop of torchvision moves a segmentation mask against its image, whatever
# interpolation it is given; Resize does so unless it is told NEAREST_EXACT.
#
# Guess:    transforms v2 resize an image and its tv_tensors.Mask about the same points, and one
#           interpolation argument means the same in Resize and in RandomResizedCrop.
# Seen:     torchvision 0.29.1: from 250 to 100 pixels a mask is a whole source pixel to the left
#           (and above) of where its image is, half a pixel of the result, with the default as with
#           any mode but NEAREST_EXACT. NEAREST_EXACT mends it in Resize, and is passed over in
#           silence by RandomResizedCrop. Pillow's NEAREST has no such bias, so masks resized
#           before becoming tensors, as older recipes do, differ from these.
# Output:   Resize NEAREST: mask -1.00, image +0.00
#           Resize NEAREST_EXACT: mask +0.00, image +0.00
#           RandomResizedCrop NEAREST: mask -1.00, image +0.00
#           RandomResizedCrop NEAREST_EXACT: mask -1.00, image +0.00
#           Pillow NEAREST: mask +0.00
#
# Each number is the mean distance, in pixels of the source, between a value of the result and the
# place that it stands for; the values are columns. Fails where any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 pillow==13.0.0 numpy
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

columns = torch.arange(250, dtype=torch.uint8).expand(1, 250, 250)
places = (torch.arange(100) + 0.5) * 2.5 - 0.5


def bias(values):
    row = torch.as_tensor(values).reshape(100, 100)[50].double()
    return f"{float((row - places).mean()) + 0.0:+.2f}"


for name, transform in {
    "Resize": lambda mode: v2.Resize((100, 100), mode, antialias=False),
    "RandomResizedCrop": lambda mode: v2.RandomResizedCrop(
        100, (1.0, 1.0), (1.0, 1.0), mode, antialias=False
    ),
}.items():
    image = transform(InterpolationMode.BILINEAR)(tv_tensors.Image(columns.float()))
    for mode in (InterpolationMode.NEAREST, InterpolationMode.NEAREST_EXACT):
        mask = transform(mode)(tv_tensors.Mask(columns))
        name_of_mode = mode.name
        print(f"{name} {name_of_mode}: mask {bias(mask)}, image {bias(image)}")
small = Image.fromarray(columns[0].numpy()).resize((100, 100), Image.NEAREST)
print(f"Pillow NEAREST: mask {bias(np.array(small))}")
PYTHON
diff "$folder/seen" - <<'SEEN'
Resize NEAREST: mask -1.00, image +0.00
Resize NEAREST_EXACT: mask +0.00, image +0.00
RandomResizedCrop NEAREST: mask -1.00, image +0.00
RandomResizedCrop NEAREST_EXACT: mask -1.00, image +0.00
Pillow NEAREST: mask +0.00
SEEN
