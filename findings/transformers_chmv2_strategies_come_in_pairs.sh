#!/usr/bin/env bash
# CHMv2 in transformers takes its two strategies apart, and heights are then off by a factor of 8.
#
# Guess:    bins_strategy says where the bins of depth are, norm_strategy how scores become weights;
#           any two of the allowed values give depths between min_depth and max_depth.
# Seen:     transformers 5.24.0: chmv2_mixlog bins are those of an eighth of the range, and
#           chmv2_mixlog weights multiply by 8. One without the other is accepted without a word:
#           of a range from 0.5 to 96 the largest depth is 12, or 768.
# Output:   bins chmv2_mixlog, weights chmv2_mixlog: largest depth 96.0
#           bins chmv2_mixlog, weights softmax: largest depth 12.0
#           bins linear, weights chmv2_mixlog: largest depth 768.0
#           bins linear, weights softmax: largest depth 96.0
#
# Scores of which the last bin is sure, through the module that ends the model. Fails where any of
# this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
import torch
from transformers import CHMv2Config
from transformers.models.chmv2.modeling_chmv2 import CHMv2FeaturesToDepth

scores = torch.full((1, 256, 1, 1), -100.0)
scores[:, -1] = 100.0
for bins in ("chmv2_mixlog", "linear"):
    for weights in ("chmv2_mixlog", "softmax"):
        config = CHMv2Config(min_depth=0.5, bins_strategy=bins, norm_strategy=weights)
        depth = float(CHMv2FeaturesToDepth(config)(scores))
        print(f"bins {bins}, weights {weights}: largest depth {depth:.1f}")
PYTHON
diff "$folder/seen" - <<'SEEN'
bins chmv2_mixlog, weights chmv2_mixlog: largest depth 96.0
bins chmv2_mixlog, weights softmax: largest depth 12.0
bins linear, weights chmv2_mixlog: largest depth 768.0
bins linear, weights softmax: largest depth 96.0
SEEN
