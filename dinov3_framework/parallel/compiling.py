"""Blocks through torch.compile, each by itself, and whether this machine can."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

# How many versions of one block there may be before the compiler gives up and runs it as it is.
# Student and teacher, training and evaluation, crops of several sizes and the stages of a network
# all want their own; the compiler's default of 8 would not always do.
_VERSIONS = 64
BACKEND = "inductor"


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have blocks compiled when they are first called; in place, under the same names.

    Blocks alike share one version. A size that changes is compiled anew once, and from then on as
    a variable.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _VERSIONS)
    for block in blocks:
        block.compile(backend=BACKEND)


def compiler_complaint(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device on this machine; None if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda" and not has_triton():
        return "torch.compile needs Triton for this CUDA device, which is not there"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler, and none is found on this machine"
    return None
