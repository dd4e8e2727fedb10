#!/usr/bin/env bash
# How much GDAL caches under rasterio.Env(GDAL_CACHEMAX=64), beside GDAL_CACHEMAX=64 in the
# environment.
#
# Guess:    64 MB in both: GDAL's documentation says that values below 100,000 are megabytes.
# Seen:     rasterio 1.4.4 (GDAL 3.10.3): 64 bytes by Env, 64 MB by the environment. Env hands numbers
#           on as bytes, so that no block stays in the cache and decimated reads decode each block again
#           and again. The limit of before is back where the Env ends.
# Output:   environment 64: 67108864 bytes
#           Env(64): 64 bytes
#           after it: 67108864 bytes
#
# Fails where any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rasterio==1.4.4 numpy==2.4.6
GDAL_CACHEMAX=64 "$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
import ctypes

import rasterio

libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libgdal" in line}
gdal = ctypes.CDLL(libraries.pop())
gdal.GDALGetCacheMax64.restype = ctypes.c_longlong
with rasterio.Env():
    print("environment 64:", gdal.GDALGetCacheMax64(), "bytes")
with rasterio.Env(GDAL_CACHEMAX=64):
    print("Env(64):", gdal.GDALGetCacheMax64(), "bytes")
print("after it:", gdal.GDALGetCacheMax64(), "bytes")
PYTHON
diff "$folder/seen" - <<'SEEN'
environment 64: 67108864 bytes
Env(64): 64 bytes
after it: 67108864 bytes
SEEN
