"""What a backbone says of a batch of images, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dinov3_framework.contracts.networks import Backbone, FeatureNeeds, HeadFeatures
from dinov3_framework.errors import DataError

OUTPUTS = ("class", "mean_patch", "patches", "storage")


class TokenReader(nn.Module):
    """Reads chosen outputs of chosen layers off a backbone.

    ``outputs`` are some of ``class`` [B, D], ``mean_patch`` [B, D], ``patches`` [B, h, w, D] and
    ``storage`` [B, R, D]; ``layers`` indices from 0, or from -1 backwards; ``norm`` says whether
    the final norm is applied. With one layer the names are those; with several they are
    ``layer<index>.class`` and so on, indices from 0. Raises ``DataError`` for a wrong choice.
    """

    def __init__(
        self,
        backbone: Backbone,
        outputs: Sequence[str] = ("class",),
        layers: Sequence[int] = (-1,),
        norm: bool = True,
    ) -> None:
        super().__init__()
        for complaint in (
            outputs_complaint(outputs),
            layers_complaint(layers, backbone.n_layers),
        ):
            if complaint:
                raise DataError(complaint)
        self.backbone, self.outputs, self.norm = backbone, tuple(outputs), norm
        self.layers = tuple(sorted(layer % backbone.n_layers for layer in layers))

    def prefix(self, layer: int) -> str:
        """What the names of a layer's outputs begin with."""
        return f"layer{layer}." if len(self.layers) > 1 else ""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Outputs by name, of normalized pixels [B, C, H, W]; means in float32.

        Raises ``UserError`` for layers that the backbone does not give, and ``DataError`` for
        storage tokens that it does not have.
        """
        last = self.backbone.n_layers - 1
        if self.outputs == ("class",) and self.layers == (last,) and self.norm:
            return {"class": self.backbone(pixels)}
        storage = "storage" in self.outputs
        found = self.backbone.get_intermediate_layers(
            pixels,
            n=list(self.layers),
            reshape=True,
            return_class_token=True,
            return_extra_tokens=storage,
            norm=self.norm,
        )
        named: dict[str, Tensor] = {}
        for layer, (grid, cls, *extra) in zip(self.layers, found, strict=True):
            if storage and not extra[0].shape[1]:
                raise DataError("this backbone has no storage tokens; leave storage out")
            parts = {"class": cls, "patches": grid.permute(0, 2, 3, 1)}
            if storage:
                parts["storage"] = extra[0]
            if "mean_patch" in self.outputs:
                parts["mean_patch"] = grid.float().mean((2, 3))
            named |= {self.prefix(layer) + name: parts[name] for name in self.outputs}
        return named


def outputs_complaint(outputs: Sequence[str]) -> str | None:
    """What is wrong with a choice of outputs."""
    if outputs and len(set(outputs)) == len(outputs) and set(outputs) <= set(OUTPUTS):
        return None
    return f"outputs are some of {', '.join(OUTPUTS)}, each once, not {list(outputs)}"


def layers_complaint(layers: Sequence[int], count: int) -> str | None:
    """What is wrong with a choice among ``count`` layers."""
    if not layers:
        return "layers must name at least one"
    if any(not -count <= layer < count for layer in layers):
        return f"layers are {list(layers)}, this backbone has 0 to {count - 1} (or -{count} to -1)"
    if len({layer % count for layer in layers}) < len(layers):
        return f"layers {list(layers)} name one of this backbone's {count} layers twice"
    return None


def even_layers(count: int, n: int = 4) -> tuple[int, ...]:
    """The last layer of each of ``n`` equal parts of ``count`` layers, from 0.

    The reference's dense heads take four such; of 24 layers, a ViT-L, its first is 4, not 5.
    Raises ``ValueError`` for fewer layers than parts.
    """
    if not 0 < n <= count:
        raise ValueError(f"{count} layers have no {n} parts")
    if (count, n) == (24, 4):
        return (4, 11, 17, 23)
    return tuple((part + 1) * count // n - 1 for part in range(n))


def head_features(backbone: Backbone, pixels: Tensor, needs: FeatureNeeds) -> HeadFeatures:
    """The features of normalized pixels [B, C, H, W] that a head needs, layers in its order."""
    layers = [layer % backbone.n_layers for layer in needs.layers]
    order = sorted(set(layers))
    found = backbone.get_intermediate_layers(
        pixels,
        n=order,
        reshape=True,
        return_class_token=needs.class_token,
        return_extra_tokens=needs.storage,
        norm=needs.norm,
    )
    parts = [found[order.index(layer)] for layer in layers]
    size = (pixels.shape[-2], pixels.shape[-1])
    image = pixels if needs.image else None
    if not (needs.class_token or needs.storage):
        return HeadFeatures(parts, (), size, image)
    grids, *extra = zip(*parts, strict=True)
    storage = extra.pop() if needs.storage else ()
    return HeadFeatures(list(grids), list(*extra), size, image, list(storage))
