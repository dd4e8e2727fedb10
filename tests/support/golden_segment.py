"""What golden cases of segmentation heads are compared with."""

from __future__ import annotations

import torch
from dinov3_segment.configs_linear import LinearSegmentationConfig
from dinov3_segment.configs_mask2former import Mask2FormerConfig
from dinov3_segment.linear import LinearSegmentation
from dinov3_segment.mask2former import Mask2Former
from dinov3_vit.configs import VitConfig
from dinov3_vit.transformer import VisionTransformer
from golden_support import Case, assert_close, fill, seeded

from dinov3_framework import Target
from dinov3_framework.data.tokens import head_features


@torch.no_grad()
def check_segmentation_linear(case: Case) -> None:
    spec = case.spec
    options = {name: value for name, value in spec["vit"].items() if name != "img_size"}
    backbone = VisionTransformer(VitConfig(**options)).eval()
    fill(backbone, spec["seed"])
    head = LinearSegmentation(
        LinearSegmentationConfig(layers=tuple(spec["layers"])),
        features=backbone.feature_info,
        targets={"mask": Target("mask", n_classes=spec["classes"], ignore_index=255)},
    ).eval()
    shapes = {name: list(value.shape) for name, value in head.state_dict().items()}
    assert shapes == spec["head_state_dict"]
    fill(head, spec["head_seed"])
    images = seeded("images", spec["seed"], tuple(spec["image_shape"]))
    outputs = head(head_features(backbone, images, head.needs))
    size = (images.shape[2], images.shape[3])
    assert_close(head.predict(outputs, size)["mask"], case.tensors["logits"], "logits")
    rows = [
        head.predict_rows(outputs, size, row, row + 16)["mask"] for row in range(0, size[0], 16)
    ]
    assert_close(torch.cat(rows, dim=2), case.tensors["logits"], "logits, row by row")


@torch.no_grad()
def check_mask2former(case: Case) -> None:
    spec, expected = case.spec, case.tensors
    # img_size is the reference's nominal size; nothing here depends on it.
    options = {name: value for name, value in spec["vit"].items() if name != "img_size"}
    backbone = VisionTransformer(VitConfig(**options)).eval()
    head = Mask2Former(
        Mask2FormerConfig(
            layers=tuple(spec["interaction_layers"]),
            hidden_dim=spec["hidden_dim"],
            adapter_heads=spec["deform_num_heads"],
        ),
        features=backbone.feature_info,
        targets={"mask": Target("mask", spec["classes"])},
    ).eval()
    head.init_weights()  # statistics of batches, too, which the case leaves as they are
    shapes = {name: list(value.shape) for name, value in head.state_dict().items()}
    assert shapes == spec["state_dict"]

    # The names of the head begin with the case's prefix already.
    assert all(name.startswith(spec["fill_prefix"]) for name in shapes)
    fill(backbone, spec["seed"])
    fill(head, spec["head_seed"])
    images = seeded("images", spec["seed"], tuple(spec["image_shape"]))
    features = head_features(backbone, images, head.needs)
    for index, found in enumerate(head.maps(features), 1):
        assert_close(found, expected[f"feature{index}"], f"map {index} of the adapter")
    outputs = head(features)
    assert_close(outputs["pred_logits"], expected["pred_logits"], "classes")
    assert_close(outputs["pred_masks"], expected["pred_masks"], "masks")
