"""What golden cases of depth are compared with."""

from __future__ import annotations

import re

import attrs
import torch
from dinov3_depth.bins import depth_of_scores
from dinov3_depth.configs_heads import CHMV2, BinsConfig, DptDepthConfig, LinearDepthConfig
from dinov3_depth.configs_losses import DepthHeadConfig
from dinov3_depth.dpt import DptDepth
from dinov3_depth.linear import LinearDepth
from dinov3_depth.losses import depth_loss
from dinov3_depth.metrics import METRICS, depth_metrics
from dinov3_vit.configs import VitConfig
from dinov3_vit.transformer import VisionTransformer
from golden_support import Case, Noted, assert_close, fill, random_state, require, seeded

from dinov3_framework import Target
from dinov3_framework.data.tokens import head_features

_LOSSES = {"sigma": "sig", "gradient": "gradient", "gradient_log": "gradient_log", "l1": "l1"}
_METRICS = {"log10": "log_10"}  # the case's names where they are others


def check_depth_numbers(case: Case) -> None:
    """Losses of a batch, and the metrics of its first image."""
    t = case.tensors
    least = re.fullmatch(r"gt > ([\d.]+)", case.spec["valid"])
    assert least is not None, case.spec["valid"]
    prediction, truth = t["pred"][:, 0], t["gt"][:, 0]
    for name in ("pred", "gt"):
        drawn = random_state(name, case.spec["seed"]).rand(*t[name].shape)
        known = 3 if name == "gt" else 0  # nothing is known of the first rows
        assert_close(t[name][:, :, known:], 0.5 + 9 * drawn[:, :, known:], f"input {name}")
    for name, key in _LOSSES.items():
        weights = dict.fromkeys(_LOSSES, 0.0) | {name: 1.0}
        config = DepthHeadConfig(together=None, min_truth=float(least[1]), **weights)
        result = depth_loss(config, prediction, truth)
        assert_close(result.loss, t[key], name)
        assert_close(result.metrics[name], t[key], name)
    valid = truth[0] > float(least[1])
    first = (each[0][valid].double().numpy() for each in (prediction, truth))
    found = depth_metrics(*first)
    for name in METRICS:
        assert_close(found[name], t[f"metric_{_METRICS.get(name, name)}"], name)


@torch.no_grad()
def check_depth_head(case: Case) -> None:
    spec, expected = case.spec, case.tensors
    # img_size is the reference's nominal size; nothing here depends on it.
    options = {name: value for name, value in spec["vit"].items() if name != "img_size"}
    backbone = VisionTransformer(VitConfig(**options)).eval()
    build = {"linear": _linear, "dpt": _dpt}[spec["head"]]
    known = {"features": backbone.feature_info, "targets": {"depth": Target("map", unit="m")}}
    head = build(spec, known).eval()
    head.init_weights()  # statistics of batches, too, which the case leaves as they are
    shapes = {name: list(value.shape) for name, value in head.state_dict().items()}
    assert shapes == spec["decoder_state_dict"]
    fill(backbone, spec["seed"])
    fill(head, spec["head_seed"])
    images = seeded("images", spec["seed"], tuple(spec["image_shape"]))
    scores = head(head_features(backbone, images, head.needs))
    assert_close(scores, expected["decoder_output"], "scores of bins")
    assert_close(depth_of_scores(head.config, scores)[:, None], expected["depth"], "depth")


def _linear(spec: Noted, known: dict[str, object]) -> LinearDepth:
    options = spec["options"]
    config = LinearDepthConfig(
        layers=tuple(spec["layers"]),
        norm=False,  # what the case's options leave to the reference's default
        bins=options["n_output_channels"],
        batch_norm=options["use_batchnorm"],
        class_token=options["use_cls_token"],
        min_depth=options["min_depth"],
        max_depth=options["max_depth"],
    )
    return LinearDepth(config, **known)  # type: ignore[arg-type]


def _dpt(spec: Noted, known: dict[str, object]) -> DptDepth:
    options = spec["options"]
    config = DptDepthConfig(
        layers=tuple(spec["layers"]),
        norm=options["use_backbone_norm"],
        bins=options["n_output_channels"],
        batch_norm=options["use_batchnorm"],
        readout="project" if options["use_cls_token"] else "ignore",
        min_depth=options["min_depth"],
        max_depth=options["max_depth"],
        channels=options["channels"],
        widths=tuple(options["post_process_channels"]),
    )
    return DptDepth(config, **known)  # type: ignore[arg-type]


def check_depth_bins(case: Case) -> None:
    t, (low, high) = case.tensors, case.spec["range"]
    for name, key in {"x": "bins", "x1": "one"}.items():
        assert_close(t[name], seeded(key, case.spec["seed"], tuple(t[name].shape)), f"input {name}")
    count = t["x"].shape[1]
    for spacing in ("linear", "log"):
        for weighting in ("linear", "softmax", "sigmoid"):
            config = BinsConfig(
                bins=count, min_depth=low, max_depth=high, spacing=spacing, weighting=weighting
            )
            key = f"{spacing}_{weighting}"
            assert_close(depth_of_scores(config, t["x"])[:, None], t[key], key)
    require("chmv2_range", list(case.spec["chmv2_range"]), [CHMV2.min_depth, CHMV2.max_depth])
    chmv2 = attrs.evolve(CHMV2, bins=count)
    assert_close(depth_of_scores(chmv2, t["x"])[:, None], t["chmv2"], "mixed log")
    assert_close(depth_of_scores(BinsConfig(min_depth=low), t["x1"])[:, None], t["regression"], "1")
