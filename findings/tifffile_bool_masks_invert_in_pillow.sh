#!/usr/bin/env bash
# What Pillow and GDAL read of masks that tifffile writes: bool, and unsigned integers of 32 bits.
#
# Guess:    what was written, as tifffile and GDAL read it.
# Seen:     tifffile 2026.3.3, Pillow 13.0.0 and rasterio 1.4.4: tifffile tags bool as white-is-zero, so
#           that Pillow, which shows what a picture looks like, gives the opposite of each pixel, and
#           GDAL the bits as they are. Of uint32 Pillow makes int32 without a word: from 2^31 on
#           numbers are negative.
# Output:   bool: tifffile [True, False, False], GDAL [1, 0, 0], Pillow [False, True, True]
#           uint32: tifffile [4000000000, 1, 0], GDAL [4000000000, 1, 0], Pillow [-294967296, 1, 0]
#
# Fails where any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tifffile==2026.3.3 rasterio==1.4.4 pillow==13.0.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON' | tee "$folder/seen"
import numpy as np
import rasterio
import tifffile
from PIL import Image

for values in (np.array([[True, False, False]]), np.array([[4_000_000_000, 1, 0]], np.uint32)):
    tifffile.imwrite("mask.tif", values)
    with rasterio.open("mask.tif") as file:
        gdal = file.read(1)[0].tolist()
    own = tifffile.imread("mask.tif")[0].tolist()
    print(f"{values.dtype}: tifffile {own}, GDAL {gdal}, Pillow", end=" ")
    print(np.asarray(Image.open("mask.tif"))[0].tolist())
PYTHON
diff "$folder/seen" - <<'SEEN'
bool: tifffile [True, False, False], GDAL [1, 0, 0], Pillow [False, True, True]
uint32: tifffile [4000000000, 1, 0], GDAL [4000000000, 1, 0], Pillow [-294967296, 1, 0]
SEEN
