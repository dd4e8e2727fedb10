#!/usr/bin/env bash
# What becomes of the fourth band of a red, green, blue, near-infrared tile that rasterio writes.
#
# Guess:    a band like the others; nothing said that it is opacity.
# Seen:     rasterio 1.4.4 (GDAL 3.10.3): four uint8 bands are written as RGBA. The infrared band is
#           tagged as alpha, so that where it is 0 (water) read_masks calls the other three invalid, and
#           Pillow opens the tile as RGBA. Four uint16 bands are left alone. photometric="minisblack"
#           or colorinterp of one's own avoids it.
# Output:   uint8: last band alpha, pixels valid 3 of 4, Pillow RGBA
#           uint16: last band undefined, pixels valid 4 of 4
#           uint8 minisblack: last band undefined, pixels valid 4 of 4
#
# Fails where any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rasterio==1.4.4 pillow==13.0.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON' | tee "$folder/seen"
import numpy as np
import rasterio
from PIL import Image

bands = np.full((4, 2, 2), 90)
bands[3] = [[0, 40], [80, 120]]  # near infrared, 0 over water
for name, dtype, options in (
    ("uint8", "uint8", {}),
    ("uint16", "uint16", {}),
    ("uint8 minisblack", "uint8", {"photometric": "minisblack"}),
):
    shape = {"width": 2, "height": 2, "count": 4, "dtype": dtype}
    with rasterio.open("tile.tif", "w", driver="GTiff", **shape, **options) as file:
        file.write(bands.astype(dtype))
    with rasterio.open("tile.tif") as file:
        last, valid = file.colorinterp[-1].name, int((file.read_masks(1) > 0).sum())
    pillow = f", Pillow {Image.open('tile.tif').mode}" if name == "uint8" else ""
    print(f"{name}: last band {last}, pixels valid {valid} of 4{pillow}")
PYTHON
diff "$folder/seen" - <<'SEEN'
uint8: last band alpha, pixels valid 3 of 4, Pillow RGBA
uint16: last band undefined, pixels valid 4 of 4
uint8 minisblack: last band undefined, pixels valid 4 of 4
SEEN
