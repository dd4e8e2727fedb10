#!/usr/bin/env bash
# The stereo pair that scikit-image ships marks pixels without truth in another way than it says.
#
# Guess:    its documentation says that NaN stands for the unknown, so that isnan finds those
#           pixels, and depth = focal * baseline / disparity is NaN there.
# Seen:     scikit-image 0.26.0, numpy 2.4.6: data.stereo_motorcycle() has no NaN and 27,226 pixels
#           of positive infinity, where depth by the formula is 0: nearer than all else, and counted.
# Output:   documented as NaN: True
#           NaN: 0, infinite: 27226 of 370500
#           depth of the infinite: 0.0
#
# The pair is in the wheel; nothing is downloaded. Fails where any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet scikit-image==0.26.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
import numpy as np
from skimage import data

_, _, disparity = data.stereo_motorcycle()
print("documented as NaN:", "nan" in data.stereo_motorcycle.__doc__.lower())
infinite = np.isinf(disparity)
print(f"NaN: {np.isnan(disparity).sum()}, infinite: {infinite.sum()} of {disparity.size}")
print("depth of the infinite:", float((994.978 * 0.193001 / disparity)[infinite].max()))
PYTHON
diff "$folder/seen" - <<'SEEN'
documented as NaN: True
NaN: 0, infinite: 27226 of 370500
depth of the infinite: 0.0
SEEN
