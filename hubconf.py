"""Entry points of torch.hub: the published backbones by name, and what stands on them.

    torch.hub.load(REPO_DIR, "dinov3_vits16", source="local", weights=PATH_OR_URL)

Needs torch, numpy and attrs alone. ``weights`` is a path, a URL, or the name of a training set
(``LVD1689M``, the default, or ``SAT493M``), which is downloaded; ``pretrained=False`` gives random
weights; ``check_hash=True`` compares the file with the digits in its name. Backbones come in eval
mode; ``backbone.images`` has the mean and standard deviation that their images want.
"""

import sys as _sys
from collections.abc import Callable as _Callable
from collections.abc import Sequence as _Sequence
from pathlib import Path as _Path
from typing import Any as _Any

# A clone works as it stands, installed or not.
for _folder in (_Path(__file__).parent, _Path(__file__).parent / "plugins"):
    if str(_folder) not in _sys.path:
        _sys.path.append(str(_folder))

from dinov3_framework.weights.hub import PlainCatalog as _PlainCatalog
from dinov3_framework.weights.hub import load_published as _load_published

dependencies = ["torch", "numpy", "attrs"]

_CATALOG = _PlainCatalog.of(
    "dinov3_vit", "dinov3_convnext", "dinov3_classify", "dinov3_segment", "dinov3_depth"
)


def _entry_point(name: str) -> _Callable[..., _Any]:
    def load(
        *,
        pretrained: bool = True,
        weights: str | _Path | None = None,
        check_hash: bool = False,
        unused: _Sequence[str] = (),
        **fields: _Any,
    ) -> _Any:
        return _load_published(
            _CATALOG,
            name,
            pretrained=pretrained,
            weights=weights,
            check_hash=check_hash,
            unused=unused,
            **fields,
        )

    published = _CATALOG.published[name]
    load.__name__ = load.__qualname__ = name
    load.__doc__ = f"{_load_published.__doc__}\n    Files: " + ", ".join(
        f"{training_set} ({file.file})" for training_set, file in published.files.items()
    )
    return load


# One function for each published backbone.
globals().update(
    {n: _entry_point(n) for n, each in _CATALOG.published.items() if each.kind == "backbone"}
)


def _head(
    name: str,
    backbone: _Any,
    targets: dict[str, _Any],
    weights: str | _Path | None,
    known: dict[str, bool],
) -> _Any:
    runtime = {"features": backbone.feature_info, "targets": targets}
    return _load_published(_CATALOG, name, weights=weights, runtime=runtime, **known)


def dinov3_vit7b16_lc(
    *,
    pretrained: bool = True,
    weights: str | _Path | None = None,
    backbone_weights: str | _Path | None = None,
    check_hash: bool = False,
    classes: int = 1000,
    **fields: _Any,
) -> _Any:
    """The published classifier on ViT-7B/16: normalized images [B, 3, H, W] to logits [B, 1000].

    ``weights`` are the classifier's (``IMAGENET1K``, a path or a URL), ``backbone_weights`` the
    backbone's, ``fields`` change the backbone's config. A module of ``backbone`` and
    ``linear_head``, in eval mode.
    """
    from dinov3_classify.classifier import Classifier

    from dinov3_framework.contracts.data import Target

    known = {"pretrained": pretrained, "check_hash": check_hash}
    backbone = _load_published(
        _CATALOG, "dinov3_vit7b16", weights=backbone_weights, **known, **fields
    )
    targets = {"label": Target("class", n_classes=classes)}
    return Classifier(
        backbone, _head("dinov3_vit7b16_lc", backbone, targets, weights, known)
    ).eval()


def dinov3_vit7b16_ms(
    *,
    pretrained: bool = True,
    weights: str | _Path | None = None,
    backbone_weights: str | _Path | None = None,
    check_hash: bool = False,
    classes: int = 150,
    **fields: _Any,
) -> _Any:
    """The published segmenter on ViT-7B/16: normalized images [B, 3, H, W] to masks and classes.

    ``weights`` are the segmenter's (``ADE20K``, a path or a URL), ``backbone_weights`` the
    backbone's, ``fields`` change the backbone's config. A module of ``backbone`` and ``head``, in
    eval mode, with ``predict(images, rescale_to=(512, 512))`` and ``scores(images)``.
    """
    from dinov3_segment.segmentor import Segmentor

    from dinov3_framework.contracts.data import Target

    known = {"pretrained": pretrained, "check_hash": check_hash}
    backbone = _load_published(
        _CATALOG, "dinov3_vit7b16", weights=backbone_weights, **known, **fields
    )
    targets = {"mask": Target("mask", n_classes=classes)}
    return Segmentor(backbone, _head("dinov3_vit7b16_ms", backbone, targets, weights, known)).eval()


def _depther(
    name: str,
    backbone_name: str,
    backbone_weights: str | _Path | None,
    weights: str | _Path | None,
    pretrained: bool,
    check_hash: bool,
    **fields: _Any,
) -> _Any:
    from dinov3_depth.depther import Depther

    from dinov3_framework.contracts.data import Target

    known = {"pretrained": pretrained, "check_hash": check_hash}
    backbone = _load_published(_CATALOG, backbone_name, weights=backbone_weights, **known, **fields)
    targets = {"depth": Target("map", unit="m")}
    return Depther(backbone, _head(name, backbone, targets, weights, known)).eval()


def dinov3_vit7b16_dd(
    *,
    pretrained: bool = True,
    weights: str | _Path | None = None,
    backbone_weights: str | _Path | None = None,
    check_hash: bool = False,
    **fields: _Any,
) -> _Any:
    """The published depth on ViT-7B/16: normalized images [B, 3, H, W] to depth [B, 1, h, w].

    h and w are the image's sides, padded to whole patches, and at odd numbers of patches 16 more.

    ``weights`` are the head's (``SYNTHMIX``, a path or a URL), ``backbone_weights`` the backbone's,
    ``fields`` change the backbone's config. A module of ``backbone`` and ``head``, in eval mode.
    Depths are relative: published figures are taken after an alignment of scale and shift.
    """
    given = backbone_weights, weights, pretrained, check_hash
    return _depther("dinov3_vit7b16_dd", "dinov3_vit7b16", *given, **fields)


def dinov3_vitl16_chmv2(
    *,
    pretrained: bool = True,
    weights: str | _Path | None = None,
    backbone_weights: str | _Path | None = None,
    check_hash: bool = False,
    **fields: _Any,
) -> _Any:
    """The published canopy height on ViT-L/16: normalized images [B, 3, H, W] to m [B, 1, h, w].

    h and w are the image's sides, padded to whole patches, and at odd numbers of patches 16 more.

    ``weights`` are the head's (``CHMV2``, a path or a URL), ``backbone_weights`` the backbone's
    (``SAT493M`` unless another is named), ``fields`` change the backbone's config. A module of
    ``backbone`` and ``head``, in eval mode. Images are normalized with the mean 0.420, 0.411, 0.296
    and the deviation 0.213, 0.156, 0.143, as its published examples do; ``backbone.images`` are
    those of the backbone's training, with 0.430.
    """
    satellite = "SAT493M" if backbone_weights is None else backbone_weights
    given = satellite, weights, pretrained, check_hash
    return _depther("dinov3_vitl16_chmv2", "dinov3_vitl16", *given, **fields)
