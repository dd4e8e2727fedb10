"""Configs of classifiers on a backbone's features, and of their evaluations."""

from __future__ import annotations

from dinov3_classify.configs import MeasuredConfig
from dinov3_framework import (
    DatasetConfig,
    HeadConfig,
    config,
    fraction,
    not_negative,
    option,
    positive,
)

# Of the published linear evaluation, at 256 images a step.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


def _rates(value: tuple[float, ...]) -> str | None:
    if value and min(value) > 0 and len(set(value)) == len(value):
        return None
    return f"must be different numbers above 0, is {list(value)}"


def _blocks(value: tuple[int, ...]) -> str | None:
    if value and min(value) > 0 and len(set(value)) == len(value):
        return None
    return f"must be different numbers from 1, is {list(value)}"


def _pooling(value: tuple[bool, ...]) -> str | None:
    return None if value and len(set(value)) == len(value) else "names true, false or both, once"


def _names(value: dict[str, DatasetConfig]) -> str | None:
    if not value:
        return "names no set to classify"
    odd = [name for name in value if not name or "/" in name]
    return f"names must have letters and no '/': {odd[0]!r}" if odd else None


@config
class ClassHeadConfig(HeadConfig):
    """What classifiers have in common."""

    target: str = option("which target of the data is predicted, of kind class", default="label")
    label_smoothing: float = option(
        "share of the probability that training spreads over all classes",
        default=0.0,
        check=fraction,
    )


@config
class LinearClassifierConfig(ClassHeadConfig):
    """One linear layer on class tokens and the mean of the patch tokens.

    As it is, the published classifier on ViT-7B/16: the last block's, after the final norm.
    """

    blocks: int = option(
        "last blocks of the backbone whose class tokens are seen", default=1, check=positive
    )
    mean_patch: bool = option(
        "the mean of the last block's patch tokens is seen, too", default=True
    )


@config
class LinearProbesConfig(ClassHeadConfig):
    """Linear classifiers of every learning rate, number of blocks and pooling, trained at once.

    The published linear evaluation. A classifier's learning rate is that of the optimizer times
    its own of ``learning_rates``. They do not touch each other under SGD or AdamW without clipping
    (``clip_grad = "none"``), which goes by the gradient of all of them.
    """

    learning_rates: tuple[float, ...] = option(
        "learning rates, as factors of the optimizer's", default=RATES, check=_rates
    )
    blocks: tuple[int, ...] = option(
        "numbers of last blocks of the backbone whose class tokens are seen",
        default=(1,),
        check=_blocks,
    )
    mean_patch: tuple[bool, ...] = option(
        "whether the mean of the last block's patch tokens is seen, too",
        default=(True,),
        check=_pooling,
    )


@config
class AttentiveProbeConfig(ClassHeadConfig):
    """Attention from learned queries to all tokens of the last block, then one linear layer."""

    queries: int = option("learned queries, whose results are averaged", default=1, check=positive)
    heads: int = option(
        "heads of the attention; the width must be a multiple", default=8, check=positive
    )
    class_token: bool = option("the class token is attended to, too", default=True)


@config
class ClassifiedSetsConfig(MeasuredConfig):
    """What evaluations of classifiers have in common."""

    sets: dict[str, DatasetConfig] = option(
        "labeled images to classify, by names that begin those of their metrics", check=_names
    )
    seed: int = option("seed of confidence intervals", default=0, check=not_negative)


@config
class ClassificationConfig(ClassifiedSetsConfig):
    """Accuracy of a head that predicts classes, in percent, as ``NAME/accuracy``."""

    target: str = option("which of the head's targets is looked at", default="label")


@config
class ProbesEvaluationConfig(ClassifiedSetsConfig):
    """Accuracy of the best of ``linear_probes``, in percent, as ``NAME/accuracy``.

    The best is that of most images of ``val`` rightly classified, and is kept as a classifier of
    its own, ``<evaluation>_head.safetensors``. Accuracies on ``val`` are the chosen one's, and so
    a little too good.
    """

    sets: dict[str, DatasetConfig] = option(
        "further labeled images to classify, by names that begin those of their metrics",
        factory=dict,
    )
    val: DatasetConfig = option("labeled images on which the best classifier is chosen")
