"""What golden cases of depth are compared with."""

from __future__ import annotations

import re

from dinov3_depth.configs_losses import DepthHeadConfig
from dinov3_depth.losses import depth_loss
from dinov3_depth.metrics import METRICS, depth_metrics
from golden_support import Case, assert_close, random_state

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
