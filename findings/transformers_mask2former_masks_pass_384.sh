#!/usr/bin/env bash
# Semantic maps of Mask2Former in transformers pass through 384 x 384, however large the image is.
#
# Guess:    post_process_semantic_segmentation resizes the masks that the network gave (a quarter of
#           the image's side) once, to the size asked for. At that very size nothing is resized.
# Seen:     transformers 5.24.0: masks are first resized to 384 x 384, without antialiasing, and the
#           scores of classes from there to target_sizes. Of an image of 2,048 pixels, whose masks
#           are 512 x 512, stripes one mask pixel wide come back wrong in half of their pixels; of
#           one of 4,096 pixels, stripes of two. Up to 1,536 pixels (384) all are right. The
#           processor's own `size` has no say, so larger images lose what the network saw.
# Output:   masks 384, stripes of 1: 100.0 % right
#           masks 512, stripes of 1: 50.0 % right
#           masks 512, stripes of 2: 100.0 % right
#           masks 1024, stripes of 2: 50.0 % right
#
# Two queries of certain classes and certain masks; target_sizes are the masks' own. Fails where any
# of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
from types import SimpleNamespace

import torch
from transformers import Mask2FormerImageProcessor

processor = Mask2FormerImageProcessor()
classes = torch.tensor([[[10.0, -10, -10], [-10, 10, -10]]])  # of each query, and none
for side, width in ((384, 1), (512, 1), (512, 2), (1024, 2)):
    truth = (torch.arange(side) // width % 2).expand(side, side)
    masks = torch.stack([truth == 0, truth == 1])[None].float() * 20 - 10
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    found = processor.post_process_semantic_segmentation(outputs, target_sizes=[(side, side)])[0]
    right = float((found == truth).float().mean())
    print(f"masks {side}, stripes of {width}: {right:.1%} right".replace("%", " %"))
PYTHON
diff "$folder/seen" - <<'SEEN'
masks 384, stripes of 1: 100.0 % right
masks 512, stripes of 1: 50.0 % right
masks 512, stripes of 2: 100.0 % right
masks 1024, stripes of 2: 50.0 % right
SEEN
