"""What the processes of the batch normalization test do."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3_framework.parallel.batch_norm import GlobalBatchNorm2d

PARTS = (5, 2)  # images of each process


def images() -> Tensor:
    return torch.randn(sum(PARTS), 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7


def layer() -> GlobalBatchNorm2d:
    made = GlobalBatchNorm2d(3)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        made.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    return made


def loss_of(outputs: Tensor) -> Tensor:
    """No symmetry that would hide a wrong gradient."""
    weights = torch.linspace(0.1, 1.0, outputs[0].numel()).view(outputs.shape[1:])
    return (outputs.sin() * weights).sum()


def share() -> dict[str, Tensor]:
    """Outputs and gradients of this process's images."""
    torch.manual_seed(0)
    norm = layer()
    pixels = images().split(PARTS)[dist.get_rank()].requires_grad_()
    outputs = norm(pixels)
    loss_of(outputs).backward()
    return {
        "outputs": outputs.detach(),
        "pixels": pixels.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }
