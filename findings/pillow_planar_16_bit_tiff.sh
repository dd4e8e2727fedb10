#!/usr/bin/env bash
# Whether Pillow reads one band of 16 bits that rasterio wrote band by band, uncompressed.
#
# Guess:    yes: with one band, interleaving by band or by pixel gives the same bytes.
# Seen:     Pillow 13.0.0 and rasterio 1.4.4: the tag PlanarConfiguration = 2 is enough. uint16 ends in
#           "unknown raw mode", int16 in "image file is truncated", float32 and uint8 are read; written
#           by pixel, or compressed (deflate, LZW, zstd), all are.
# Output:   uint8: band read, pixel read
#           uint16: band ValueError, pixel read
#           int16: band OSError, pixel read
#           float32: band read, pixel read
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

values = np.arange(64 * 64).reshape(1, 64, 64) % 100


def opened(dtype, interleave):
    shape = {"width": 64, "height": 64, "count": 1, "dtype": dtype, "interleave": interleave}
    with rasterio.open("tile.tif", "w", driver="GTiff", **shape) as file:
        file.write(values.astype(dtype))
    try:
        same = np.array_equal(np.asarray(Image.open("tile.tif")), values[0].astype(dtype))
        return "read" if same else "other values"
    except Exception as error:
        return type(error).__name__


for dtype in ("uint8", "uint16", "int16", "float32"):
    print(f"{dtype}: band {opened(dtype, 'band')}, pixel {opened(dtype, 'pixel')}")
PYTHON
diff "$folder/seen" - <<'SEEN'
uint8: band read, pixel read
uint16: band ValueError, pixel read
int16: band OSError, pixel read
float32: band read, pixel read
SEEN
