"""Promises of a backbone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import UserError
from dinov3_framework.kinds import BackboneConfig
from dinov3_framework.registry import Registry
from dinov3_framework.testing.modules import check_weights, in_bfloat16
from dinov3_framework.testing.subject import Subject, some

TOKENS = ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm")


def check_backbone(
    config: BackboneConfig,
    *,
    registry: Registry | None = None,
    factory: Callable[..., Any] | None = None,
    image_size: int | None = None,
    without_gradient: Collection[str] = (),
) -> None:
    """Check that a backbone keeps its contract; choose a config that is small.

    ``image_size`` is the side of a global crop in pixels (left out, four patches); local crops
    have half of it. A backbone whose ``takes_masks`` is False must refuse masks by a ``UserError``.
    ``without_gradient`` names parameters that no
    gradient is meant to reach.

    Promises: weights as of ``check_head``; tokens of the right names and shapes, finite, also of
    images that are not square and with parameters in bfloat16; masked patches are not seen, the
    others are, row by row; several batches in one pass equal single ones in eval mode; in training,
    torch's seed alone decides and gradient reaches every parameter; ``layer_of`` and
    ``blocks_to_shard`` fit the network; the last intermediate layer is what a forward pass gives.
    """
    subject = Subject.of("backbone", config, registry, factory)
    twins = check_weights(subject, Backbone)
    backbone: Backbone = twins.first.eval()
    _check_sizes(subject, backbone, config)
    side = image_size if image_size is not None else 4 * backbone.patch_size
    subject.require(
        side >= 2 * backbone.patch_size and side % (2 * backbone.patch_size) == 0,
        f"image_size = {side} must be an even number of patches of {backbone.patch_size} pixels",
    )
    trial = _Trial(subject, backbone, side, backbone.takes_masks)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trial.check_tokens()
        trial.check_masks()
        trial.check_several_batches()
        trial.check_last_layer()
        trial.check_equal(twins.second.eval(), "after load_state_dict, its features differ")
        trial.check_bfloat16()
        trial.check_seed()
    trial.check_gradient(without_gradient)
    _check_layers(subject, backbone)
    trial.check_blocks()


def _check_sizes(subject: Subject, backbone: Backbone, config: BackboneConfig) -> None:
    for name in ("embed_dim", "patch_size", "in_chans", "n_layers"):
        value = getattr(backbone, name, None)
        subject.require(
            type(value) is int and value > 0, f"{name} must be an integer above 0, is {value!r}"
        )
    wanted = config.in_chans if config.in_chans is not None else 3
    subject.require(
        backbone.in_chans == wanted,
        f"in_chans is {backbone.in_chans} where the config's in_chans = {config.in_chans} "
        f"means {wanted}",
    )


@frozen
class _Trial:
    subject: Subject
    backbone: Backbone
    side: int
    takes_masks: bool

    # ------------------------------------------------------------------ input
    def images(self, height: int, width: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, self.backbone.in_chans, height, width, generator=generator)

    def mask(self, height: int, width: int) -> Tensor:
        """About a third of the patches of two images, in an order that is no symmetry's."""
        patch = self.backbone.patch_size
        count = height // patch * (width // patch)
        mask = torch.arange(2 * count).view(2, count) % 3 == 0
        mask[0, -1] = True
        return mask

    def crops(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """A batch of global and one of local crops, and the masks of the first."""
        masks = self.mask(self.side, self.side) if self.takes_masks else None
        batches = [self.images(self.side, self.side), self.images(self.side // 2, self.side // 2)]
        return batches, [masks, None]

    def run(self, backbone: Backbone, images: Any, masks: Any = None) -> Any:
        with self.subject.doing("forward_features()"):
            return backbone.forward_features(images, masks)

    # ------------------------------------------------------------------ tokens
    def check_tokens(self) -> None:
        for height, width in ((self.side, self.side), (self.side, self.side // 2)):
            images = self.images(height, width)
            output = self.run(self.backbone, images)
            self._check_output(output, images)
            with self.subject.doing("calling it"):
                tokens = self.backbone(images)
            self.subject.require(
                torch.equal(tokens, output["x_norm_clstoken"]),
                "calling it gives something else than x_norm_clstoken",
            )

    def check_last_layer(self) -> None:
        images = self.images(self.side, self.side)
        with self.subject.doing("get_intermediate_layers()"):
            layers = self.backbone.get_intermediate_layers(
                images, n=1, reshape=True, return_class_token=True
            )
        require, dim = self.subject.require, self.backbone.embed_dim
        require(
            isinstance(layers, tuple) and len(layers) == 1 and len(layers[0]) == 2,
            "get_intermediate_layers() of one layer and its class token gives no tuple of a pair",
        )
        (patches, cls) = layers[0]
        require(
            patches.ndim == 4 and list(patches.shape[:2]) == [len(images), dim],
            f"get_intermediate_layers() gives a grid {list(patches.shape)} where "
            f"[{len(images)}, {dim}, h, w] is expected",
        )
        expected = self.run(self.backbone, images)["x_norm_clstoken"]
        require(
            torch.allclose(cls, expected, rtol=1e-4, atol=1e-5),
            "the last of get_intermediate_layers() has another class token than forward_features()",
        )

    def _check_output(self, output: Any, images: Tensor, where: str = "") -> None:
        require, dim = self.subject.require, self.backbone.embed_dim
        require(isinstance(output, Mapping), f"a batch gives a {type(output).__name__}, no dict")
        missing = [name for name in (*TOKENS, "masks") if name not in output]
        require(not missing, f"forward_features() leaves out {', '.join(missing)}")
        grid = [side // self.backbone.patch_size for side in images.shape[-2:]]
        batch, patches = len(images), grid[0] * grid[1]
        storage = output["x_storage_tokens"]
        require(storage.ndim == 3, "x_storage_tokens must be [B, R, D], also where R is 0")
        registers = storage.shape[1]
        shapes = {
            "x_norm_clstoken": [batch, dim],
            "x_storage_tokens": [batch, registers, dim],
            "x_norm_patchtokens": [batch, patches, dim],
            "x_prenorm": [batch, 1 + registers + patches, dim],
        }
        for name, shape in shapes.items():
            tokens = output[name]
            require(
                list(tokens.shape) == shape,
                f"{name} is {list(tokens.shape)} where images {list(images.shape)} make {shape}",
            )
            require(bool(tokens.isfinite().all()), f"{name} is not finite{where}")

    def check_masks(self) -> None:
        height, width = self.side, self.side // 2
        images, mask = self.images(height, width), self.mask(height, width)
        if not self.takes_masks:
            self._check_refusal(images, mask)
            return
        require = self.subject.require
        masked = self.run(self.backbone, images, mask)
        self._check_output(masked, images)
        given = masked["masks"]
        require(isinstance(given, Tensor) and torch.equal(given, mask), "masks are not handed back")
        pixels = self._pixels(mask, height, width)
        elsewhere = torch.where(pixels, self.images(height, width, seed=1), images)
        self._require_same(
            masked,
            self.run(self.backbone, elsewhere, mask),
            "masked patches are seen: other pixels there (row by row) change",
        )
        plain = self.run(self.backbone, images)
        differ = (masked["x_norm_patchtokens"] != plain["x_norm_patchtokens"]).any(-1)
        require(bool(differ[mask].all()), "a mask does not change the patches that it hides")
        self._require_same(
            plain,
            self.run(self.backbone, images, torch.zeros_like(mask)),
            "a mask that hides nothing changes",
        )

    def _check_refusal(self, images: Tensor, mask: Tensor) -> None:
        try:
            self.backbone.forward_features(images, mask)
        except UserError:
            return
        self.subject.require(False, "takes no masks, but does not refuse them by a UserError")

    def _pixels(self, mask: Tensor, height: int, width: int) -> Tensor:
        """The mask of patches, pixel by pixel: [B, 1, H, W]."""
        patch = self.backbone.patch_size
        grid = mask.view(-1, 1, height // patch, width // patch)
        return grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)

    def check_several_batches(self) -> None:
        batches, masks = self.crops()
        together = self.run(self.backbone, batches, masks)
        self.subject.require(
            isinstance(together, list | tuple) and len(together) == 2,
            "two batches of images must give a list of two dicts",
        )
        for images, mask, output in zip(batches, masks, together, strict=True):
            self._check_output(output, images)
            alone = self.run(self.backbone, images, mask)
            self._require_same(alone, output, "in eval mode, several batches in one pass change")

    def check_equal(self, other: Backbone, complaint: str) -> None:
        images = self.images(self.side, self.side)
        self._require_same(self.run(self.backbone, images), self.run(other, images), complaint)

    def _require_same(self, one: Any, other: Any, complaint: str) -> None:
        for name in TOKENS:
            same = one[name].shape == other[name].shape and torch.allclose(
                one[name], other[name], rtol=1e-4, atol=1e-5
            )
            self.subject.require(same, f"{complaint}: {name}")

    # ------------------------------------------------------------------ training
    def check_bfloat16(self) -> None:
        low = in_bfloat16(self.backbone)
        images = self.images(self.side, self.side).bfloat16()
        with self.subject.doing("forward_features() with parameters in bfloat16"):
            output = low.forward_features(images)
        self._check_output(output, images, " with parameters in bfloat16")

    def check_seed(self) -> None:
        """R5: a resumed run draws what the uninterrupted one drew."""
        batches, masks = self.crops()
        self.backbone.train()
        runs = []
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(self.run(self.backbone, batches, masks))
        self.backbone.eval()
        for one, other in zip(*runs, strict=True):
            self._require_same(one, other, "in training, the same seed of torch's generator gives")

    def check_gradient(self, without: Collection[str]) -> None:
        batches, masks = self.crops()
        self.backbone.train()
        generator = torch.Generator().manual_seed(7)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            total = torch.zeros(())
            for output in self.run(self.backbone, batches, masks):
                for tokens in (output[name] for name in TOKENS[:3]):
                    total = total + (tokens * torch.randn(tokens.shape, generator=generator)).sum()
            with self.subject.doing("the backward pass"):
                total.backward()
        self.backbone.eval()
        trained = {n: p for n, p in self.backbone.named_parameters() if p.requires_grad}
        missed = [n for n, p in trained.items() if p.grad is None and n not in without]
        self.subject.require(not missed, f"no gradient reaches {some(missed)}")
        bad = [n for n, p in trained.items() if p.grad is not None and not p.grad.isfinite().all()]
        self.subject.require(not bad, f"the gradient is not finite: {some(bad)}")

    def check_blocks(self) -> None:
        """A sharded block gathers its parameters when it is called, and only then."""
        require = self.subject.require
        blocks = list(self.backbone.blocks_to_shard())
        inside = {id(module) for module in self.backbone.modules() if module is not self.backbone}
        require(
            all(isinstance(b, nn.Module) and id(b) in inside for b in blocks),
            "blocks_to_shard() gives something that is no submodule of the backbone",
        )
        require(len(set(map(id, blocks))) == len(blocks), "blocks_to_shard() repeats a block")
        called: set[int] = set()
        handles = [b.register_forward_pre_hook(lambda m, _: called.add(id(m))) for b in blocks]
        with torch.no_grad():
            self.run(self.backbone, self.images(self.side, self.side))
        for handle in handles:
            handle.remove()
        silent = {id(block) for block in blocks} - called
        idle = [name for name, module in self.backbone.named_modules() if id(module) in silent]
        require(
            not idle,
            f"blocks_to_shard() gives modules that forward_features() does not call: {some(idle)}",
        )


def _check_layers(subject: Subject, backbone: Backbone) -> None:
    depths = set()
    for name, _ in backbone.named_parameters():
        with subject.doing(f"layer_of({name!r})"):
            layer, layers = backbone.layer_of(name)
        subject.require(
            type(layer) is int and type(layers) is int and 0 <= layer <= layers,
            f"layer_of({name!r}) is {(layer, layers)}; 0 <= layer <= layers must hold",
        )
        depths.add(layers)
    subject.require(
        len(depths) == 1, f"layer_of() disagrees on how many layers there are: {sorted(depths)}"
    )
