#!/usr/bin/env bash
# Pixels that Mask2Former's processor in transformers is told to ignore are trained on all the same.
#
# Guess:    ignore_index = 255 means what it means for a cross-entropy: pixels of 255 take no part in
#           the loss.
# Seen:     transformers 5.24.0: the processor leaves 255 out of the classes, and the loss knows
#           nothing of it. Ignored pixels are background of every mask, and get as much gradient as
#           labeled ones do: on ADE20K, where 255 is "other", each query learns to leave it out.
# Output:   classes [1], masks (1, 64, 64)
#           gradient in the ignored half over that in the labeled one: 1.0
#
# The left half of a truth is ignored; logits are 0. Fails where any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 scipy
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
import numpy as np
import torch
from transformers import Mask2FormerConfig, Mask2FormerImageProcessor
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

truth = np.full((64, 64), 255, np.uint8)
truth[:, 32:] = 1
processor = Mask2FormerImageProcessor(do_resize=False, ignore_index=255)
image = np.zeros((64, 64, 3), np.uint8)
batch = processor(image, segmentation_maps=truth, return_tensors="pt")
masks, classes = batch["mask_labels"], batch["class_labels"]
print(f"classes {classes[0].tolist()}, masks {tuple(masks[0].shape)}")

torch.manual_seed(0)
logits = torch.zeros(1, 4, 64, 64, requires_grad=True)
loss = Mask2FormerLoss(Mask2FormerConfig(num_labels=3), {})
loss(logits, torch.zeros(1, 4, 4), masks, classes)["loss_mask"].backward()
ignored, labeled = (float(half.abs().sum()) for half in logits.grad.chunk(2, dim=3))
print(f"gradient in the ignored half over that in the labeled one: {ignored / labeled:.1f}")
PYTHON
diff "$folder/seen" - <<'SEEN'
classes [1], masks (1, 64, 64)
gradient in the ignored half over that in the labeled one: 1.0
SEEN
