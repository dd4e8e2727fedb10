"""Promises of a backbone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import UserError, first_few
from dinov3_framework.testing.suite import NetworkSuite

M = TypeVar("M", bound=nn.Module)
TOKENS = ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm")


def in_bfloat16(network: M) -> M:
    """A copy as sharding computes with it: parameters in bfloat16, buffers as they are."""
    low = copy.deepcopy(network)
    for parameter in low.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    return low


class BackboneSuite(NetworkSuite):
    """Promises of a backbone; choose a config that is small.

    ``image_size`` is the side of a global crop in pixels (left out, four patches); local crops have
    half of it. ``without_gradient`` names parameters that no gradient is meant to reach.
    """

    kind = "backbone"
    contract = Backbone
    image_size: int | None = None
    without_gradient: Collection[str] = ()

    # ------------------------------------------------------------------ input
    @cached_property
    def backbone(self) -> Backbone:
        backbone: Backbone = self.network.eval()
        return backbone

    @property
    def side(self) -> int:
        patch = self.backbone.patch_size
        side = self.image_size if self.image_size is not None else 4 * patch
        assert side >= 2 * patch and side % (2 * patch) == 0, (
            f"image_size = {side} must be an even number of patches of {patch} pixels"
        )
        return side

    def images(self, height: int, width: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, self.backbone.in_chans, height, width, generator=generator)

    def square(self) -> Tensor:
        return self.images(self.side, self.side)

    def mask(self, height: int, width: int) -> Tensor:
        """About a third of the patches of two images, in an order that is no symmetry's."""
        patch = self.backbone.patch_size
        count = height // patch * (width // patch)
        mask = torch.arange(2 * count).view(2, count) % 3 == 0
        mask[0, -1] = True
        return mask

    def crops(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """A batch of global and one of local crops, and the masks of the first."""
        masks = self.mask(self.side, self.side) if self.backbone.takes_masks else None
        return [self.square(), self.images(self.side // 2, self.side // 2)], [masks, None]

    def expect_tokens(self, output: Any, images: Tensor) -> None:
        """All outputs by name, in the right shapes, finite."""
        assert isinstance(output, Mapping), f"a batch gives a {type(output).__name__}, no dict"
        missing = [name for name in (*TOKENS, "masks") if name not in output]
        assert not missing, f"forward_features() leaves out {first_few(missing)}"
        storage, dim = output["x_storage_tokens"], self.backbone.embed_dim
        assert storage.ndim == 3, "x_storage_tokens must be [B, R, D], also where R is 0"
        height, width = (side // self.backbone.patch_size for side in images.shape[-2:])
        batch, registers, patches = len(images), storage.shape[1], height * width
        shapes = {
            "x_norm_clstoken": [batch, dim],
            "x_storage_tokens": [batch, registers, dim],
            "x_norm_patchtokens": [batch, patches, dim],
            "x_prenorm": [batch, 1 + registers + patches, dim],
        }
        for name, shape in shapes.items():
            tokens = output[name]
            assert list(tokens.shape) == shape, (
                f"{name} is {list(tokens.shape)} where images {list(images.shape)} make {shape}"
            )
            assert tokens.isfinite().all(), f"{name} is not finite"

    # ------------------------------------------------------------------ promises
    def test_sizes(self) -> None:
        """It says its width, patches, layers and channels; these are the config's."""
        for name in ("embed_dim", "patch_size", "in_chans", "n_layers"):
            value = getattr(self.backbone, name, None)
            is_count = type(value) is int and value > 0
            assert is_count, f"{name} must be an integer above 0, is {value!r}"
        found, asked = self.backbone.in_chans, self.config.in_chans
        wanted = 3 if asked is None else asked
        assert found == wanted, f"in_chans is {found} where the config's {asked} means {wanted}"

    @torch.no_grad()
    def test_tokens(self) -> None:
        """Tokens are finite and in the right shapes, also of images that are not square."""
        for height, width in ((self.side, self.side), (self.side, self.side // 2)):
            images = self.images(height, width)
            output = self.backbone.forward_features(images)
            self.expect_tokens(output, images)
            assert torch.equal(self.backbone(images), output["x_norm_clstoken"]), (
                "calling it gives something else than x_norm_clstoken"
            )

    @torch.no_grad()
    def test_masks(self) -> None:
        """Masked patches are not seen, the others are, row by row; or masks are refused."""
        run, patch = self.backbone.forward_features, self.backbone.patch_size
        height, width = self.side, self.side // 2
        images, mask = self.images(height, width), self.mask(height, width)
        if not self.backbone.takes_masks:
            try:
                run(images, mask)
            except UserError:
                return
            raise AssertionError("takes no masks, but does not refuse them by a UserError")
        masked, plain = run(images, mask), run(images)
        self.expect_tokens(masked, images)
        given = masked["masks"]
        is_given = isinstance(given, Tensor) and torch.equal(given, mask)
        assert is_given, "masks are not handed back"
        pixels = mask.view(-1, 1, height // patch, width // patch)
        pixels = pixels.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        elsewhere = torch.where(pixels, self.images(height, width, seed=1), images)
        seen = "masked patches are seen: other pixels there (row by row) change"
        _expect_same(masked, run(elsewhere, mask), seen)
        differ = (masked["x_norm_patchtokens"] != plain["x_norm_patchtokens"]).any(-1)
        assert differ[mask].all(), "a mask does not change the patches that it hides"
        nothing = run(images, torch.zeros_like(mask))
        _expect_same(plain, nothing, "a mask that hides nothing changes")

    @torch.no_grad()
    def test_several_batches(self) -> None:
        """Several batches in one pass equal single ones in eval mode."""
        batches, masks = self.crops()
        together = self.backbone.forward_features(batches, masks)
        is_list = isinstance(together, list | tuple) and len(together) == 2
        assert is_list, "two batches of images must give a list of two dicts"
        for images, mask, output in zip(batches, masks, together, strict=True):
            self.expect_tokens(output, images)
            alone = self.backbone.forward_features(images, mask)
            _expect_same(alone, output, "in eval mode, several batches in one pass change")

    @torch.no_grad()
    def test_last_layer(self) -> None:
        """The last intermediate layer is what a forward pass gives."""
        images, name = self.square(), "get_intermediate_layers()"
        layers = self.backbone.get_intermediate_layers(
            images, n=1, reshape=True, return_class_token=True
        )
        assert isinstance(layers, tuple) and [len(layer) for layer in layers] == [2], (
            f"{name} of one layer and its class token gives no tuple of a pair"
        )
        ((patches, cls),) = layers
        start = [len(images), self.backbone.embed_dim]
        assert patches.ndim == 4 and list(patches.shape[:2]) == start, (
            f"{name} gives a grid {list(patches.shape)} where {[*start, 'h', 'w']} is expected"
        )
        expected = self.backbone.forward_features(images)["x_norm_clstoken"]
        assert torch.allclose(cls, expected, rtol=1e-4, atol=1e-5), (
            f"the last of {name} has another class token than forward_features()"
        )

    @torch.no_grad()
    def test_loaded_weights(self) -> None:
        """The state dict holds all that decides the features."""
        ours, loaded = (
            each.eval().forward_features(self.square()) for each in (self.backbone, self.twin)
        )
        _expect_same(ours, loaded, "after load_state_dict, its features differ")

    @torch.no_grad()
    def test_bfloat16(self) -> None:
        """It computes with parameters in bfloat16."""
        images = self.square().bfloat16()
        self.expect_tokens(in_bfloat16(self.backbone).forward_features(images), images)

    @torch.no_grad()
    def test_seed(self) -> None:
        """In training, torch's seed alone decides: a resumed run draws the same again."""
        runs = []
        with torch.random.fork_rng(devices=[]):
            for _ in range(2):
                torch.manual_seed(5)
                runs.append(self.initialized().train().forward_features(*self.crops()))
        for one, other in zip(*runs, strict=True):
            _expect_same(one, other, "in training, the same seed of torch's generator gives")

    @torch.no_grad()
    def test_buffers(self) -> None:
        """In training, a forward pass leaves the state as it is: a moving average has no more."""
        network = self.initialized().train()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with torch.random.fork_rng(devices=[]):
            network.forward_features(*self.crops())
        changed = [n for n, t in network.state_dict().items() if not torch.equal(t, before[n])]
        assert not changed, (
            "forward_features() changes its state in training (running statistics?): "
            f"{first_few(changed)}"
        )

    def test_gradient(self) -> None:
        """Finite gradient reaches every parameter."""
        network = self.initialized().train()
        generator = torch.Generator().manual_seed(7)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            total = torch.zeros(())
            for output in network.forward_features(*self.crops()):
                for tokens in (output[name] for name in TOKENS[:3]):
                    total = total + (tokens * torch.randn(tokens.shape, generator=generator)).sum()
            total.backward()
        trained = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
        missed = [n for n, grad in trained.items() if grad is None]
        missed = [name for name in missed if name not in self.without_gradient]
        assert not missed, f"no gradient reaches {first_few(missed)}"
        bad = [n for n, grad in trained.items() if grad is not None and not grad.isfinite().all()]
        assert not bad, f"the gradient is not finite: {first_few(bad)}"

    def test_layers(self) -> None:
        """Every parameter is in one of as many layers."""
        depths = set()
        for name, _ in self.backbone.named_parameters():
            layer, layers = self.backbone.layer_of(name)
            assert type(layer) is type(layers) is int and 0 <= layer <= layers, (
                f"layer_of({name!r}) is {(layer, layers)}; 0 <= layer <= layers must hold"
            )
            depths.add(layers)
        assert len(depths) == 1, f"layer_of() has several numbers of layers: {sorted(depths)}"

    @torch.no_grad()
    def test_blocks(self) -> None:
        """Blocks to shard are submodules that are called: sharding acts on nothing else."""
        blocks = list(self.backbone.blocks_to_shard())
        inside = {id(module) for module in self.backbone.modules() if module is not self.backbone}
        assert all(isinstance(b, nn.Module) and id(b) in inside for b in blocks), (
            "blocks_to_shard() gives something that is no submodule of the backbone"
        )
        assert len(set(map(id, blocks))) == len(blocks), "blocks_to_shard() repeats a block"
        called: set[int] = set()
        handles = [b.register_forward_pre_hook(lambda m, _: called.add(id(m))) for b in blocks]
        self.backbone.forward_features(self.square())
        for handle in handles:
            handle.remove()
        silent = {id(block) for block in blocks} - called
        idle = [name for name, module in self.backbone.named_modules() if id(module) in silent]
        assert not idle, (
            f"blocks_to_shard() gives modules that forward_features() does not call: "
            f"{first_few(idle)}"
        )


def _expect_same(one: Any, other: Any, complaint: str) -> None:
    for name in TOKENS:
        same = one[name].shape == other[name].shape and torch.allclose(
            one[name], other[name], rtol=1e-4, atol=1e-5
        )
        assert same, f"{complaint}: {name}"
