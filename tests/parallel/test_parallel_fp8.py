"""Float8 products: their rounding, which layers they concern, and where they are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_support import pretrain, registry, tiny_config

from dinov3_framework import Problem, RecipeError
from dinov3_framework.parallel import ParallelConfig
from dinov3_framework.parallel.fp8 import chip_complaint, linear_emulated, linear_on_chip
from dinov3_framework.parallel.fp8_linears import layer_problems, use_fp8
from dinov3_framework.parallel.sharder import Sharder, initialize
from dinov3_framework.runtime.processes import process_group
from dinov3_framework.training.optimizer import parameter_settings

CPU = torch.device("cpu")
EMULATED = ParallelConfig(fp8="emulated")
# All that float8 can say: sign, 4 bits of exponent, 3 of mantissa; without its two NaNs.
GRID = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
GRID = GRID[GRID.isfinite()].sort().values


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal values whose rows are of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 6, shape[0], base=2.0)[torch.randperm(shape[0], generator=generator)]
    return torch.randn(*shape, generator=generator) * sizes[:, None]


def rounded(rows: Tensor, scales: Tensor) -> Tensor:
    """Values as float8 holds them over their scales: the nearest of all that it can say."""
    scaled = rows.double() / scales
    above = torch.searchsorted(GRID, scaled).clamp(1, len(GRID) - 1)
    low, high = GRID[above - 1], GRID[above]
    return torch.where(scaled - low < high - scaled, low, high) * scales


def by_rows(rows: Tensor) -> Tensor:
    return rounded(rows, rows.double().abs().amax(1, keepdim=True) / 448)


def by_tensor(values: Tensor) -> Tensor:
    return rounded(values, values.double().abs().max() / 448)


def run(linear: Callable[..., Tensor], *inputs: Tensor, gradient: Tensor) -> list[Tensor]:
    """The output of a linear layer, and the gradients of tokens, weight and bias."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = linear(*leaves)
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    shapes = {"tokens": (24, 48), "weight": (32, 48), "gradient": (24, 32)}
    values = {name: drawn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    return values | {"bias": drawn(1, 32, seed=9)[0]}


def test_emulation_is_rowwise_float8(case: dict[str, Tensor]) -> None:
    tokens, weight, bias, gradient = (case[k] for k in ("tokens", "weight", "bias", "gradient"))
    found = run(linear_emulated, tokens, weight, bias, gradient=gradient)
    expected = [
        by_rows(tokens) @ by_rows(weight).T + bias,
        by_rows(gradient) @ by_tensor(weight),
        gradient.double().T @ tokens.double(),
        gradient.double().sum(0),
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        # float32 sums of 48 terms, of which some cancel.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max())


def test_the_error_is_that_of_three_bits_of_mantissa(case: dict[str, Tensor]) -> None:
    tokens, weight, gradient = (case[name].double() for name in ("tokens", "weight", "gradient"))

    def error(values: Tensor, scales: Tensor) -> Tensor:
        """Half a step: 1/16 of the value, or half of the smallest number, 2^-9, near zero."""
        return torch.maximum(values.abs() / 16, scales * 2.0**-10)

    def bound(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
        da, db = error(a, a_scales), error(b, b_scales)
        return a.abs() @ db.T + da @ b.abs().T + da @ db.T

    def scales(rows: Tensor) -> Tensor:
        return rows.abs().amax(1, keepdim=True) / 448

    found = run(linear_emulated, case["tokens"], case["weight"], gradient=case["gradient"])
    exact = run(F.linear, tokens, weight, gradient=gradient)
    bounds = [
        bound(tokens, scales(tokens), weight, scales(weight)),
        bound(gradient, scales(gradient), weight.T, weight.abs().max() / 448),
    ]
    for ours, theirs, most in zip(found, exact, bounds, strict=False):
        off = (ours.double() - theirs).abs()
        assert (off <= 1.0001 * most).all()
        assert (off > 0.01 * most).any(), "in float8, not in float32"


def test_the_kernel_computes_what_is_emulated(case: dict[str, Tensor]) -> None:
    """torch has the kernel's operator for the CPU too; a GPU's own is not tested here."""
    tokens, weight, bias, gradient = (
        case[name].bfloat16() for name in ("tokens", "weight", "bias", "gradient")
    )
    ours = run(linear_on_chip, tokens, weight, bias, gradient=gradient)
    theirs = run(linear_emulated, tokens, weight, bias, gradient=gradient)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * b.abs().mean().item())


def test_shapes_and_special_rows() -> None:
    weight, bias = drawn(16, 32), drawn(1, 16)[0]
    tokens = drawn(6, 32, seed=1).view(2, 3, 32)
    tokens[0, 0] = 0
    output = linear_emulated(tokens, weight, bias)
    assert output.shape == (2, 3, 16)
    assert torch.equal(output[0, 0], bias)
    assert torch.equal(output, linear_emulated(tokens.flatten(0, 1), weight, bias).view(2, 3, 16))
    for bad in (float("nan"), float("inf")):
        tokens[1, 2, 5] = bad
        output = linear_emulated(tokens, weight, bias)
        assert output[1, 2].isnan().all(), "never a number that looks sound"
        assert output[0].isfinite().all()


# --------------------------------------------------------------------------- in a backbone
def backbone(**values: Any) -> Any:
    sizes = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 1}
    with torch.device("meta"):
        return registry().build("backbone", "vit", **sizes, **values)


def placed(config: ParallelConfig, **values: Any) -> Any:
    blueprint = backbone(**values)
    with process_group(CPU, timeout=60):
        network = Sharder(config, CPU).place(backbone(**values))
        initialize(network, blueprint, seed=3)
    return network


def features(network: Any) -> Tensor:
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return network.forward_features(images)["x_prenorm"]  # type: ignore[no-any-return]


def test_names_and_groups_of_parameters_stay() -> None:
    plain, ours = placed(ParallelConfig()), placed(EMULATED)
    assert list(ours.state_dict()) == list(plain.state_dict())
    rates = tiny_config().optimizer
    assert parameter_settings(ours, rates) == parameter_settings(plain, rates)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert not torch.equal(features(ours), features(plain))
    torch.testing.assert_close(features(ours), features(plain), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("masked", [True, False])
def test_the_filter_chooses_layers(masked: bool) -> None:
    calls: list[str] = []

    def watched(network: Any) -> set[str]:
        calls.clear()
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear) and "product" in vars(module):
                module.product = lambda *a, n=name: calls.append(n) or linear_emulated(*a)
        features(network)
        return set(calls)

    everything = placed(EMULATED, mask_k_bias=masked)
    linears = {name for name, m in everything.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) == 8
    assert watched(everything) == linears
    some = ParallelConfig(fp8="emulated", fp8_filter=r"blocks\.1\..*(qkv|fc2)$")
    assert watched(placed(some, mask_k_bias=masked)) == {"blocks.1.attn.qkv", "blocks.1.mlp.fc2"}


def test_a_bias_on_the_keys_stays_masked() -> None:
    network = placed(EMULATED, mask_k_bias=True)
    qkv = network.blocks[0].attn.qkv
    before = features(network)
    with torch.no_grad():
        qkv.bias[32:64] = 5.0
    assert torch.equal(features(network), before)
    with torch.no_grad():
        qkv.bias[64:] = 5.0
    assert not torch.equal(features(network), before)


def test_projectors_stay_as_they_are() -> None:
    head = pretrain().method.prepare().blueprint.projectors["dino"]
    with process_group(CPU, timeout=60):
        placed_head = Sharder(ParallelConfig(fp8="emulated", fp8_filter=""), CPU).place(head)
    linears = [m for m in placed_head.modules() if isinstance(m, nn.Linear)]
    assert linears
    assert not any("product" in vars(linear) for linear in linears)


# --------------------------------------------------------------------------- what is refused
class Own(nn.Linear):
    """A layer whose product nobody can replace."""


def complaints(config: ParallelConfig, network: nn.Module) -> list[Problem]:
    return list(layer_problems(config, network))


def test_layers_that_do_not_fit() -> None:
    on = ParallelConfig(fp8="on", param_dtype="bf16")
    network = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 24))})
    (problem,) = complaints(on, network)
    assert problem.where == "parallel.fp8_filter"
    assert "multiples of 16" in problem.message
    assert "blocks.1 (32 to 24)" in problem.message
    assert "blocks.0" not in problem.message
    assert complaints(EMULATED, network) == []
    network["blocks"].append(Own(16, 16))
    (problem,) = complaints(EMULATED, network)
    assert "cannot be told to multiply in float8: blocks.2" in problem.message
    (problem,) = complaints(ParallelConfig(fp8="emulated", fp8_filter="layers"), network)
    assert "'layers' is in no linear layer's name" in problem.message
    assert "there are blocks.0, blocks.1, blocks.2" in problem.hint
    (problem,) = complaints(EMULATED, nn.Sequential(nn.Conv2d(1, 1, 1)))
    assert problem.hint == "it has none"


def check(*overrides: str) -> Any:
    return pretrain(*overrides).check(1)


def test_a_check_refuses_what_cannot_be_and_shows_the_rest() -> None:
    (said,) = check(
        *("parallel.fp8=on", "parallel.param_dtype=bf16", "parallel.device=cpu")
    ).missing
    assert re.search(r"parallel.fp8: the CPU \(\w+\) has no float8 products", said)
    with pytest.raises(RecipeError, match="float8 products come out in bf16"):
        check("parallel.fp8=on")
    with pytest.raises(RecipeError, match="'stages' is in no linear layer's name"):
        check("parallel.fp8=emulated", "parallel.fp8_filter=stages")
    with pytest.raises(RecipeError, match=r"parallel.fp8_filter: is no regular expression"):
        check("parallel.fp8=emulated", 'parallel.fp8_filter="("')
    rows = dict(check("parallel.fp8=emulated").sections["parallel"])
    assert rows["fp8"] == "emulated, 8 linear layers with 'blocks' in their names"


def test_a_process_refuses_it_too() -> None:
    config = ParallelConfig(fp8="on", param_dtype="bf16")
    with process_group(CPU, timeout=60), pytest.raises(RecipeError, match="no float8 products"):
        Sharder(config, CPU)


@pytest.mark.parametrize(
    ("capability", "complaint"),
    [
        ((8, 0), "NVIDIA A100 (compute capability 8.0) has no float8 products"),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 0), None),
    ],
)
def test_chips(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], complaint: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert chip_complaint(torch.device("cuda", 0)) == complaint


def test_a_chip_that_can_uses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without one can tell: the CPU stands in for the chip."""
    calls: list[torch.dtype] = []
    kernel = torch._scaled_mm

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(options["out_dtype"])
        return kernel(*args, **options)

    monkeypatch.setattr("dinov3_framework.parallel.check.chip_complaint", lambda device: None)
    monkeypatch.setattr(torch, "_scaled_mm", counted)
    with process_group(CPU, timeout=60):
        seen = {}
        for fp8 in ("on", "emulated"):
            blueprint = backbone()
            config = ParallelConfig(fp8=fp8, param_dtype="bf16")
            network: Any = Sharder(config, CPU).place(backbone())
            initialize(network, blueprint, seed=3)
            output = features(network)
            output.float().square().mean().backward()
            seen[fp8] = [output.detach(), network.blocks[0].mlp.fc1.weight.grad.full_tensor()]
    assert calls == [torch.bfloat16] * 16  # 8 layers forward, and the gradients of 8 inputs
    for on, emulated in zip(*seen.values(), strict=True):
        # Rounding to bf16 carries a few values over the edge to the next float8.
        assert (on - emulated).float().norm() < 0.03 * emulated.float().norm()


def test_use_fp8_leaves_other_layers_alone() -> None:
    network = nn.ModuleDict({"blocks": nn.Linear(16, 16), "head": nn.Linear(16, 16)})
    use_fp8(EMULATED, network)
    assert isinstance(network["blocks"], nn.Linear)
    assert type(network["head"]) is nn.Linear
