#!/usr/bin/env bash
# What timm and transformers give as "the features of an image" differs for the same DINOv3 weights,
# and in timm it differs between DINOv2 and DINOv3.
#
# Guess:    the normalized class token in all three, as in DINOv2's and DINOv3's own evaluations.
# Seen:     timm 1.0.31: model(x) of vit_small_patch16_dinov3 (num_classes=0) is the mean of the
#           normalized patch tokens, class and storage tokens left out; of
#           vit_small_patch14_reg4_dinov2 it is the class token. transformers 5.24.0: pooler_output
#           of a DINOv3ViTModel is the class token. So k-NN or a linear probe "on DINOv3 features"
#           depends on which library made them, without a word.
# Output:   dinov3 in timm: mean of patches True, class token False
#           dinov2 in timm: mean of patches False, class token True
#           dinov3 in transformers: mean of patches False, class token True
#
# Random weights, no download of weights. Fails where any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
import timm
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

torch.manual_seed(0)


def report(name, features, tokens, prefix):
    of_patches = torch.allclose(features, tokens[:, prefix:].mean(1), atol=1e-5)
    of_class = torch.allclose(features, tokens[:, 0], atol=1e-5)
    print(f"{name}: mean of patches {of_patches}, class token {of_class}")


with torch.no_grad():
    for name, model, size in (
        ("dinov3 in timm", "vit_small_patch16_dinov3", 64),
        ("dinov2 in timm", "vit_small_patch14_reg4_dinov2", 70),
    ):
        sizes = {} if size == 64 else {"img_size": size}
        network = timm.create_model(model, num_classes=0, **sizes).eval()
        images = torch.randn(2, 3, size, size)
        report(name, network(images), network.forward_features(images), network.num_prefix_tokens)
    config = DINOv3ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
        num_register_tokens=4,
    )
    output = DINOv3ViTModel(config).eval()(torch.randn(2, 3, 64, 64))
    report("dinov3 in transformers", output.pooler_output, output.last_hidden_state, 5)
PYTHON
diff "$folder/seen" - <<'SEEN'
dinov3 in timm: mean of patches True, class token False
dinov2 in timm: mean of patches False, class token True
dinov3 in transformers: mean of patches False, class token True
SEEN
