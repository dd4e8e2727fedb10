#!/usr/bin/env bash
# What Pillow reads of a mask of few classes that GDAL wrote as gray PNG or TIFF of 1, 2 or 4 bits.
#
# Guess:    the ids, as GDAL reads them: at 1 bit they come out right (as False and True).
# Seen:     Pillow 13.0.0 and rasterio 1.4.4: of 2 bits ids are multiplied by 85, of 4 bits by 17, as
#           is right for gray values of a picture; mode "L" and uint8 show nothing of it. With a
#           palette, indices stay as they are.
# Output:   png 1: GDAL [0, 1, 0, 1], Pillow 1 [False, True, False, True]
#           png 2: GDAL [0, 1, 2, 3], Pillow L [0, 85, 170, 255]
#           png 4: GDAL [0, 1, 2, 3], Pillow L [0, 17, 34, 51]
#           tif 1: GDAL [0, 1, 0, 1], Pillow 1 [False, True, False, True]
#           tif 2: GDAL [0, 1, 2, 3], Pillow L [0, 85, 170, 255]
#           tif 4: GDAL [0, 1, 2, 3], Pillow L [0, 17, 34, 51]
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

for driver, ending in (("PNG", "png"), ("GTiff", "tif")):
    for bits in (1, 2, 4):
        ids = np.arange(4, dtype=np.uint8).reshape(1, 1, 4) % 2**bits
        shape = {"width": 4, "height": 1, "count": 1, "dtype": "uint8", "nbits": bits}
        with rasterio.open(f"mask.{ending}", "w", driver=driver, **shape) as file:
            file.write(ids)
        with rasterio.open(f"mask.{ending}") as file:
            gdal = file.read(1)[0].tolist()
        image = Image.open(f"mask.{ending}")
        print(f"{ending} {bits}: GDAL {gdal}, Pillow {image.mode} {np.asarray(image)[0].tolist()}")
PYTHON
diff "$folder/seen" - <<'SEEN'
png 1: GDAL [0, 1, 0, 1], Pillow 1 [False, True, False, True]
png 2: GDAL [0, 1, 2, 3], Pillow L [0, 85, 170, 255]
png 4: GDAL [0, 1, 2, 3], Pillow L [0, 17, 34, 51]
tif 1: GDAL [0, 1, 0, 1], Pillow 1 [False, True, False, True]
tif 2: GDAL [0, 1, 2, 3], Pillow L [0, 85, 170, 255]
tif 4: GDAL [0, 1, 2, 3], Pillow L [0, 17, 34, 51]
SEEN
