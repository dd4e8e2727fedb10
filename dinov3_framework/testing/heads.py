"""Promises of a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dinov3_framework.contracts.data import SampleBatch, Target, Transform
from dinov3_framework.contracts.networks import FeatureInfo, FeatureNeeds, Head, HeadFeatures
from dinov3_framework.errors import UserError, first_few
from dinov3_framework.testing.backbones import in_bfloat16
from dinov3_framework.testing.suite import NetworkSuite
from dinov3_framework.testing.transforms import SCHEMA
from dinov3_framework.training.simulation import made_up_sample

_BATCH = 3


class _Collate(Transform):
    """The batches that are made unless a transform says otherwise."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.targets = targets

    def __call__(self, sample: Any) -> Any:
        return sample


class HeadSuite(NetworkSuite):
    """Promises of a head on a backbone with layers of ``features``, for targets of ``schema``."""

    kind = "head"
    contract = Head
    features: Sequence[FeatureInfo] = (FeatureInfo(16, 8),) * 4
    schema: Mapping[str, Target] = SCHEMA
    size: tuple[int, int] = (32, 48)  # pixels
    channels: int = 3  # of images

    def arguments(self) -> dict[str, Any]:
        return {"features": self.features, "targets": self.schema}

    @cached_property
    def batch(self) -> SampleBatch:
        samples = [made_up_sample(self.schema, self.size, seed=seed) for seed in range(_BATCH)]
        return _Collate(self.schema).collate(samples)

    def made_up_features(self, dtype: torch.dtype = torch.float32) -> HeadFeatures:
        """Features as the head needs them, that gradient flows to."""
        generator = torch.Generator().manual_seed(1)
        needs: FeatureNeeds = self.network.needs

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

        infos = [self.features[layer] for layer in needs.layers]
        height, width = self.size
        maps = [drawn(_BATCH, i.channels, height // i.stride, width // i.stride) for i in infos]
        cls = [drawn(_BATCH, i.channels) for i in infos] if needs.class_token else []
        image = drawn(_BATCH, self.channels, height, width) if needs.image else None
        storage = [drawn(_BATCH, 2, i.channels) for i in infos] if needs.storage else []
        return HeadFeatures(maps, cls, self.size, image, storage)

    # ------------------------------------------------------------------ promises
    def test_needs(self) -> None:
        """``needs`` names layers that there are, ``targets`` those of the schema."""
        needs, targets = self.network.needs, self.network.targets
        count = len(self.features)
        assert isinstance(needs, FeatureNeeds) and needs.layers, f"needs is {needs!r}"
        assert all(-count <= layer < count for layer in needs.layers), f"needs {needs.layers}"
        assert targets, "targets is empty: it predicts nothing"
        other = [name for name, target in targets.items() if self.schema.get(name) != target]
        assert not other, f"targets are not as in the schema: {first_few(other)}"

    def test_other_targets(self) -> None:
        """Data without the targets that it learns are a ``UserError``."""
        try:
            (self.factory or self.known.build)(self.config, features=self.features, targets={})
        except UserError:
            return
        raise AssertionError("is built for data without any target")

    def test_training(self) -> None:
        """The loss is a finite scalar whose gradient reaches every parameter and the features."""
        features, head = self.made_up_features(), self.network.train()
        result = head.loss(head(features), self.batch.targets)
        assert result.loss.ndim == 0 and bool(result.loss.isfinite()), f"the loss is {result.loss}"
        for name, value in result.metrics.items():
            attached = isinstance(value, Tensor) and value.requires_grad
            assert not attached, f"{name!r} holds on to the graph; detach() it"
        result.loss.backward()
        unreached = [name for name, p in head.named_parameters() if p.grad is None]
        assert not unreached, f"no gradient reaches {first_few(unreached)}"
        assert any(each.grad is not None for each in tree_leaves(features) if each is not None)

    def test_outputs(self) -> None:
        """Outputs are tensors, or dicts, lists and tuples of them, which sharding goes through."""
        leaves = tree_leaves(self.network.eval()(self.made_up_features()))
        other = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
        assert not other, f"outputs hold {first_few(other)}, which sharding cannot look into"

    def test_predictions(self) -> None:
        """Predictions have the form that belongs to their target's kind, for any size."""
        head = self.network.eval()
        for size in (self.size, (self.size[0] + 5, self.size[1] - 3)):
            with torch.no_grad():
                found = head.predict(head(self.made_up_features()), size)
            for name, target in head.targets.items():
                if name in found:
                    _expect_prediction(name, target, found[name], size)
            assert found.keys() & head.targets.keys(), "predicts none of its targets"

    def test_rows(self) -> None:
        """Some rows of predictions alone are those of all, where the head offers them."""
        head, (height, width) = self.network.eval(), self.size
        if not head.predicts_rows:
            return
        size = (height + 5, width - 3)
        with torch.no_grad():
            outputs = head(self.made_up_features())
            whole, part = head.predict(outputs, size), head.predict_rows(outputs, size, 3, height)
        assert part, "predicts_rows is set, and predict_rows gives nothing"
        for name, rows in part.items():
            torch.testing.assert_close(rows, whole[name][..., 3:height, :].float())

    def test_bfloat16(self) -> None:
        """With parameters and features in bfloat16 loss and predictions are finite."""
        head = in_bfloat16(self.network.eval())
        with torch.no_grad():
            outputs = head(self.made_up_features(torch.bfloat16))
            assert bool(head.loss(outputs, self.batch.targets).loss.isfinite())
            for leaf in tree_leaves(head.predict(outputs, self.size)):
                assert not isinstance(leaf, Tensor) or bool(leaf.float().isfinite().all())


def _expect_prediction(name: str, target: Target, value: Any, size: tuple[int, int]) -> None:
    if target.kind == "boxes":
        named = all({"boxes", "scores", "labels"} <= each.keys() for each in value)
        assert named and len(value) == _BATCH, f"predictions of {name!r} need boxes, scores, labels"
        return
    shapes: dict[str, tuple[Any, ...]] = {
        "class": (_BATCH, target.count),
        "mask": (_BATCH, target.count, *size),
        "map": (_BATCH, *size),
    }
    wanted = shapes.get(target.kind)
    shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    assert wanted is None or shown == wanted, f"predictions of {name!r} are {shown}, not {wanted}"
