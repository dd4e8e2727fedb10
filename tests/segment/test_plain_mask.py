"""The plain mask transformer: its contract, the published decoder's numbers, names and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dinov3_segment.configs_plain import PlainMaskTransformerConfig
from dinov3_segment.plain_mask import PlainMaskTransformer
from safetensors.torch import load_file
from torch import Tensor

from dinov3_framework import CheckpointError, FeatureInfo, Registry, Target, UserError
from dinov3_framework.contracts.networks import HeadFeatures
from dinov3_framework.testing import HeadSuite
from dinov3_framework.weights.heads import load_head

GOLDEN = Path(__file__).with_name("plain_mask.safetensors")
TARGETS = {"mask": Target("mask", n_classes=4, ignore_index=255)}
SMALL = PlainMaskTransformerConfig(queries=3, blocks=2, heads=2, hidden=24, layers=(1, 3))


def built(
    config: PlainMaskTransformerConfig = SMALL, width: int = 16, layers: int = 4
) -> PlainMaskTransformer:
    torch.manual_seed(0)
    features = (FeatureInfo(width, 16),) * layers
    return PlainMaskTransformer(config, features=features, targets=TARGETS)


class TestPlainMaskTransformer(HeadSuite):
    config = PlainMaskTransformerConfig(queries=6, blocks=2, points=64)


class TestPlainMaskTransformerWithoutMasks(HeadSuite):
    config = PlainMaskTransformerConfig(
        queries=6,
        blocks=2,
        points=64,
        masked_attention=False,
        batch_norm=False,
        lateral="linear",
        layers=(-1, 0),
    )


# ---------------------------------------------------------------------------- the published one
def by_formula(head: PlainMaskTransformer) -> None:
    """Fill a head with the values that the golden numbers were made with."""
    for name, tensor in head.state_dict().items():
        short = name.partition(".")[2]
        if tensor.is_floating_point() and "probs" not in name:
            count = torch.arange(tensor.numel(), dtype=torch.float64)
            size = 0.02 if "bias" in short else 0.4
            values = torch.sin(count * 12.9898 + len(short) * 5.3) * size
            values = values.abs() + 0.5 if "running_var" in name else values
            tensor.copy_(values.view(tensor.shape))


def test_it_computes_what_the_published_decoder_does() -> None:
    """Made by the public code (MIT) in float32, from weights and tokens by formula."""
    head = built().train()  # to see the outputs before each block, too
    head.bn.eval()
    by_formula(head)
    count = torch.arange(2 * 9 * 16, dtype=torch.float64)
    levels = [torch.cos(count * (78.233 + i)).view(2, 9, 16).float() for i in range(2)]
    features = HeadFeatures(
        [each[:, 3:].transpose(1, 2).unflatten(2, (3, 2)) for each in levels],
        [each[:, 0] for each in levels],
        (48, 32),
        storage=[each[:, 1:3] for each in levels],
    )
    with torch.no_grad():
        outputs = head(features)
    wanted = load_file(GOLDEN)
    found = [*outputs["aux_outputs"], outputs]
    assert len(wanted) == 2 * len(found)
    for name, tensor in wanted.items():
        key, _, layer = name.partition(".")
        torch.testing.assert_close(found[int(layer)][key], tensor, rtol=1e-4, atol=1e-5)


def test_a_published_file_loads_onto_its_backbone(tmp_path: Path) -> None:
    """The decoder for ADE20K on a ViT-L has these names, below ``network``, and no backbone."""
    registry = Registry.load()
    head = built(PlainMaskTransformerConfig(queries=5, heads=1), width=16, layers=8)
    assert head.needs.layers == (1, 3, 5, 7)
    state = {f"network.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    backbone = registry.build("backbone", "vit", embed_dim=16, depth=8, num_heads=1)
    loaded = load_head(tmp_path / "pytorch_model.bin", backbone, registry=registry).head
    assert loaded.targets["mask"].count == 4
    assert loaded.config.queries == 5
    assert loaded.config.blocks == 6
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[f"network.{name}"])


def test_a_file_that_does_not_say_its_layers_is_refused(tmp_path: Path) -> None:
    torch.save(built().state_dict(), tmp_path / "head.pth")
    backbone = Registry.load().build("backbone", "vit", embed_dim=16, depth=8, num_heads=1)
    with pytest.raises(CheckpointError, match="does not say which"):
        load_head(tmp_path / "head.pth", backbone)


def test_the_layers_of_the_published_decoders() -> None:
    for count, wanted in {24: (5, 11, 17, 23), 12: (2, 5, 8, 11), 3: (0, 1, 2)}.items():
        assert built(PlainMaskTransformerConfig(), layers=count).needs.layers == wanted


# ---------------------------------------------------------------------------- masked attention
def chances(head: PlainMaskTransformer, iteration: int, total: int = 20208) -> list[float]:
    head.before_step(iteration, total)
    return head.decoder.attn_mask_probs.tolist()


def test_masks_are_given_up_block_by_block_as_published() -> None:
    head = built(PlainMaskTransformerConfig(queries=3, heads=1))
    assert chances(head, 0) == [1.0] * 6
    assert chances(head, 16826) == [0.0] * 6
    first, second, *rest = chances(head, 1500)
    assert first == pytest.approx(0.5**0.9)
    assert second == 1.0
    assert rest == [1.0] * 4
    found = chances(head, (7403 + 10769) // 2)
    assert found == pytest.approx([0.0, 0.0, 0.5**0.9, 1.0, 1.0, 1.0])


def test_other_numbers_of_blocks_lie_between_the_published_ones() -> None:
    head = built()
    assert chances(head, 1500) == pytest.approx([0.5**0.9, 1.0])
    own = PlainMaskTransformerConfig(
        queries=3, blocks=2, heads=2, unmask_from=(0.0, 0.5), unmask_until=(0.5, 1.0),
        unmask_power=1.0,
    )  # fmt: skip
    assert chances(built(own), 25, 100) == [0.5, 1.0]
    with pytest.raises(ValueError, match="has 1 numbers for blocks = 2"):
        PlainMaskTransformerConfig(blocks=2, unmask_from=(0.5,))


def features_of(batch: int, width: int = 16, seed: int = 0) -> HeadFeatures:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return HeadFeatures(
        [drawn(width, 3, 2), drawn(width, 3, 2)],
        [drawn(width), drawn(width)],
        (48, 32),
        storage=[drawn(2, width), drawn(2, width)],
    )


def test_a_trained_head_needs_no_masks() -> None:
    head, features = built().eval(), features_of(2)
    by_formula(head)
    with torch.no_grad():
        masked = head(features)
        head.decoder.attn_mask_probs.zero_()
        free = head(features)
    assert masked.keys() == free.keys() == {"pred_logits", "pred_masks"}
    assert not torch.allclose(masked["pred_logits"], free["pred_logits"])


def test_queries_are_unmasked_by_chance_that_the_seed_decides() -> None:
    head, features = built().train(), features_of(2)
    by_formula(head)
    head.decoder.attn_mask_probs.fill_(0.5)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(head(features)["pred_logits"])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


# ---------------------------------------------------------------------------- mistakes
def test_what_does_not_fit_the_backbone_is_told() -> None:
    with pytest.raises(UserError, match="heads = 3"):
        built(PlainMaskTransformerConfig(heads=3))
    with pytest.raises(UserError, match="differ in width or stride: "):
        PlainMaskTransformer(
            PlainMaskTransformerConfig(),
            features=(FeatureInfo(96, 4), FeatureInfo(192, 8)),
            targets=TARGETS,
        )
    with pytest.raises(UserError, match="how many classes"):
        PlainMaskTransformer(
            SMALL, features=(FeatureInfo(16, 16),) * 4, targets={"mask": Target("mask")}
        )
