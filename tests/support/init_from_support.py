"""Weights in every kind of file, for runs of the tiny recipe to start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dinov3_vit.configs import VitConfig
from dinov3_vit.huggingface import HuggingFaceLayout
from dinov3_vit.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trainer_support import registry

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.configs import WEB_IMAGES
from dinov3_framework.weights.export import export_backbone

# The tiny recipe on images that every format knows of.
RGB = ("images.channels=3", "images.mean=[0.485, 0.456, 0.406]", "images.std=[0.229, 0.224, 0.225]")
# The tiny recipe's backbone.
TINY: dict[str, Any] = {
    "patch_size": 7,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "n_storage_tokens": 1,
}
HEADS = {
    "dino_head.mlp.0.weight": (16, 32),
    "dino_head.mlp.0.bias": (16,),
    "dino_head.mlp.2.weight": (16, 16),
    "dino_head.mlp.2.bias": (16,),
    "dino_head.mlp.4.weight": (8, 16),
    "dino_head.mlp.4.bias": (8,),
    "dino_head.last_layer.weight": (32, 8),
}


def vit(seed: int = 1, **options: Any) -> VisionTransformer:
    """A network unlike any that is just initialized."""
    torch.manual_seed(seed)
    backbone = VisionTransformer(VitConfig(**{**TINY, **options})).eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("qkv.bias"):
                parameter.chunk(3)[1].zero_()  # the keys', which a mask holds there
    return backbone


def heads(seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in HEADS.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


# --------------------------------------------------------------------------- kinds of files
def own_export(folder: Path, backbone: VisionTransformer) -> Path:
    component, values = registry().values_of(backbone.config)
    export_backbone(
        folder / "own.safetensors",
        backbone.state_dict(),
        component=component,
        config=values,
        images=WEB_IMAGES,
        size=28,
        provenance={"run": "before"},
    )
    return folder / "own.safetensors"


def meta(folder: Path, backbone: VisionTransformer) -> Path:
    torch.save(backbone.state_dict(), folder / "meta.pth")
    return folder / "meta.pth"


def hugging_face(folder: Path, backbone: VisionTransformer) -> Path:
    layout, tensors = HuggingFaceLayout(), {}
    state, initial = backbone.state_dict(), VisionTransformer(backbone.config).state_dict()
    for rule in layout.rules(backbone.config, list(state)):
        name = rule.official
        tensors |= rule.write(state[name], lambda name=name: initial[name])
    target = folder / "hugging_face"
    target.mkdir()
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, target / "model.safetensors")
    for name, content in layout.settings(backbone.config, WEB_IMAGES, 28).items():
        (target / name).write_text(json.dumps(content))
    return target


def own_checkpoint(folder: Path, backbone: VisionTransformer) -> Path:
    other = under("student.backbone.", vit(seed=7).state_dict())
    moments = {"optimizer.backbone.cls_token.exp_avg": torch.zeros(1, 1, 32)}
    teacher = under("teacher.", under("backbone.", backbone.state_dict()) | heads())
    CheckpointStore(folder / "run" / "checkpoints").save(4, teacher | other | moments, {})
    return folder / "run"


def reference_checkpoint(folder: Path, backbone: VisionTransformer) -> Path:
    """What the reference saves of a training, in one file."""
    networks = {
        "teacher": under("backbone.", backbone.state_dict()) | heads(),
        "student": under("backbone.", vit(seed=7).state_dict()) | heads(seed=7),
    }
    torch.save(networks | {"iteration": 99}, folder / "training.pth")
    return folder / "training.pth"


KINDS: dict[str, Callable[[Path, VisionTransformer], Path]] = {
    kind.__name__: kind
    for kind in (own_export, meta, hugging_face, own_checkpoint, reference_checkpoint)
}


# --------------------------------------------------------------------------- looking at networks
def start(path: Path, **keys: Any) -> list[str]:
    """The overrides that make a run start from ``path``."""
    given = {"weights": str(path), **keys}
    return [*RGB, *(f"init_from.{key}={json.dumps(value)}" for key, value in given.items())]


def whole(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's tensors, gathered; to be called by every process."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in module.state_dict().items()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert different == []


@torch.no_grad()
def features(backbone: nn.Module) -> Tensor:
    """Class and patch tokens [2, 17, 32] in evaluation of images that are always the same."""
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    was = backbone.training
    found = backbone.eval().forward_features(images)
    backbone.train(was)
    return torch.cat([found["x_norm_clstoken"][:, None], found["x_norm_patchtokens"]], dim=1)
