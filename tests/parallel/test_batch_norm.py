"""Batch normalization over all processes' images."""

from __future__ import annotations

from pathlib import Path

import torch
from batch_norm_processes import images, layer, loss_of, share
from process_groups import run_processes
from torch import nn
from torch.testing import assert_close


def reference() -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(3)
    made.load_state_dict(layer().state_dict())  # the names are the same
    return made


def test_alone_it_is_torchs() -> None:
    ours, theirs = layer(), reference()
    for _ in range(3):
        found, wanted = (each.requires_grad_() for each in (images(), images()))
        assert_close(ours(found), theirs(wanted))
    loss_of(ours(found)).backward()
    loss_of(theirs(wanted)).backward()
    assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert_close(ours.eval()(images()), theirs.eval()(images()))


def test_two_processes_are_one(tmp_path: Path) -> None:
    """With unequal shares of the images: outputs, gradients and running statistics."""
    found = run_processes(2, tmp_path, share)
    theirs, pixels = reference(), images().requires_grad_()
    outputs = theirs(pixels)
    loss_of(outputs).backward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert_close(torch.cat([each["outputs"] for each in found]), outputs.detach(), **close)
    assert_close(torch.cat([each["pixels"] for each in found]), pixels.grad, **close)
    for name in ("weight", "bias"):
        total = sum(each[name] for each in found)
        assert_close(total, getattr(theirs, name).grad, **close)
    for each in found:
        for name in ("running_mean", "running_var"):
            assert_close(each[name], getattr(theirs, name), **close)


def test_parameters_in_bfloat16() -> None:
    norm = layer()
    norm.weight.data, norm.bias.data = norm.weight.bfloat16(), norm.bias.bfloat16()
    found = norm(images().bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), reference()(images()), rtol=0.05, atol=0.05)
    assert norm.running_mean is not None
    assert norm.running_mean.dtype == torch.float32
