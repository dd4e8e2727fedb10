"""Rotary positions: precision, randomness, caching."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dinov3_vit.configs import VitConfig
from dinov3_vit.rope import RotaryPositions, RotaryTable
from torch import Tensor


def positions(**options: object) -> RotaryPositions:
    options = {f"pos_embed_rope_{name}": value for name, value in options.items()}
    return RotaryPositions(VitConfig(embed_dim=64, num_heads=2, **options))


def angle_cosines(rows: list[float], columns: list[float], periods: list[float]) -> torch.Tensor:
    """The table by its definition, in float64: [P, head_dim]."""
    lines = []
    for y in rows:
        for x in columns:
            half = [2 * math.pi * place / period for place in (y, x) for period in periods]
            lines.append([math.cos(angle) for angle in half + half])
    return torch.tensor(lines, dtype=torch.float64)


@pytest.mark.parametrize(
    ("normalize", "rows", "columns"),
    [
        ("separate", [-0.5, 0.5], [-0.75, -0.25, 0.25, 0.75]),
        ("max", [-0.75, -0.25], [-0.75, -0.25, 0.25, 0.75]),
        ("min", [-0.5, 0.5], [-0.5, 0.5, 1.5, 2.5]),
    ],
)
def test_table_by_definition(normalize: str, rows: list[float], columns: list[float]) -> None:
    rope = positions(normalize_coords=normalize)
    periods = [100 ** (i / 8) for i in range(8)]
    expected = angle_cosines(rows, columns, periods)
    torch.testing.assert_close(rope(2, 4).cos[5:].double(), expected, rtol=0, atol=2e-6)


def test_periods_between_two_ends() -> None:
    periods = positions(min_period=0.5, max_period=64.0).periods
    expected = torch.tensor([0.5 * 128 ** (i / 7) for i in range(8)])
    torch.testing.assert_close(periods, expected)


def test_tokens_before_the_patches_are_not_turned() -> None:
    for count in (0, 3):
        config = VitConfig(embed_dim=64, num_heads=2, n_storage_tokens=count)
        table = RotaryPositions(config)(2, 3)
        assert table.cos.shape == table.sin.shape == (1 + count + 6, 32)
        assert (table.cos[: 1 + count] == 1).all()
        assert (table.sin[: 1 + count] == 0).all()


def test_rotation_turns_pairs_half_a_head_apart() -> None:
    cos = torch.tensor([[1.0] * 4, [0.0, 1.0] * 2])
    sin = torch.tensor([[0.0] * 4, [1.0, 0.0] * 2])
    tokens = torch.tensor([[9.0] * 4, [1.0, 2.0, 3.0, 4.0]])
    qkv = torch.stack([tokens, 10 * tokens, tokens], dim=1)[None, :, :, None]  # [1, 2, 3, 1, 4]
    query, key, value = RotaryTable(cos, sin).rotate(qkv)
    assert query[0, 0].tolist() == [[9, 9, 9, 9], [-3, 2, 1, 4]]
    assert torch.equal(key, 10 * query)
    assert torch.equal(value[0, 0], tokens)


def by_formula(table: RotaryTable, qkv: Tensor) -> list[Tensor]:
    """The rotation as complex numbers times complex numbers, in float64."""
    turn = torch.complex(*(part.double().chunk(2, -1)[0] for part in (table.cos, table.sin)))
    query, key, value = qkv.double().permute(2, 0, 3, 1, 4)
    turned = [torch.complex(*part.chunk(2, -1)) * turn for part in (query, key)]
    return [*(torch.cat([part.real, part.imag], -1) for part in turned), value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rotation_and_its_gradient_by_formula(dtype: torch.dtype, precision: str) -> None:
    table = positions(dtype=precision)(3, 4)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 17, 3, 2, 32, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(3, 2, 2, 17, 32, generator=generator).to(dtype)
    expected = by_formula(table, qkv)
    (wanted,) = torch.autograd.grad(expected, qkv, list(weights.double()))
    actual = table.rotate(qkv)
    (gradient,) = torch.autograd.grad(actual, qkv, list(weights))
    # Rounded once, to the tokens' precision, where the table's is float32.
    rough = 3e-2 if precision == "bf16" else 1e-2 if dtype == torch.bfloat16 else 1e-5
    for found, exact in zip(actual, expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=rough, atol=rough)
    torch.testing.assert_close(gradient.double(), wanted.double(), rtol=rough, atol=rough)


def test_rotation_under_function_transforms() -> None:
    table, batch = positions()(2, 2), torch.randn(3, 9, 3, 2, 32)

    def rotated(qkv: Tensor) -> Tensor:
        return torch.stack(table.rotate(qkv))

    expected = rotated(batch)
    mapped = torch.func.vmap(lambda sample: rotated(sample[None])[:, 0], out_dims=1)(batch)
    torch.testing.assert_close(mapped, expected)
    # The rotation is linear: along any direction it changes by that direction turned.
    tangent = torch.func.jvp(rotated, (torch.zeros_like(batch),), (batch,))[1]
    torch.testing.assert_close(tangent, expected)


def test_a_model_in_bf16_keeps_float32_tables() -> None:
    rope = positions(base=100.0)
    exact = rope(5, 7)
    for cast in (copy.deepcopy(rope).bfloat16(), copy.deepcopy(rope).to("cpu", torch.float16)):
        assert cast.periods.dtype == torch.float32
        table = cast(5, 7)
        assert table.cos.dtype == torch.float32
        assert torch.equal(table.cos, exact.cos)
        assert torch.equal(table.sin, exact.sin)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_tables_have_the_configured_precision(name: str, dtype: torch.dtype) -> None:
    table = positions(dtype=name)(3, 3)
    assert table.cos.dtype == table.sin.dtype == dtype
    exact = positions()(3, 3)
    # Rounded once, at the end: angles in low precision would be off by far more.
    assert torch.equal(table.cos, exact.cos.to(dtype))


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_periods_count(assign: bool) -> None:
    rope = positions()
    before = rope(2, 2).cos[5:]
    rounded = rope.periods.bfloat16()
    assert not torch.equal(rounded.float(), rope.periods)
    rope.load_state_dict({"periods": rounded}, assign=assign)
    expected = angle_cosines([-0.5, 0.5], [-0.5, 0.5], rounded.tolist())
    after = rope(2, 2).cos[5:]
    torch.testing.assert_close(after.double(), expected, rtol=0, atol=2e-6)
    assert after.dtype == torch.float32
    assert not torch.equal(after, before)


def test_tables_are_made_once_and_again_when_the_periods_change() -> None:
    rope = positions(rescale_coords=2.0).eval()
    first = rope(4, 4)
    assert rope(4, 4) is first
    assert rope(4, 3) is not first
    with torch.no_grad():
        rope.periods.mul_(2)
    assert not torch.equal(rope(4, 4).cos, first.cos)
    for size in range(1, 60):
        rope(size, 1)
    assert len(rope._cache) <= 16


def test_tables_of_inference_mode_do_not_spoil_training() -> None:
    rope = positions().eval()
    with torch.inference_mode():
        rope(2, 2)
    qkv = torch.randn(1, 9, 3, 2, 32, requires_grad=True)
    rope(2, 2).rotate(qkv)[0].sum().backward()
    assert qkv.grad is not None


def test_random_coordinates() -> None:
    rope = positions(shift_coords=0.1, jitter_coords=1.5, rescale_coords=2.0).train()
    torch.manual_seed(0)
    base = rope._coordinates(1, 4)
    drawn = torch.stack([rope._augment(base) for _ in range(500)])  # [500, 4, 2]
    # Along x the four patches lie 0.5 apart, times jitter and rescale of 1/3 to 3 in all.
    spacing = (drawn[:, 1:, 1] - drawn[:, :-1, 1]) / 0.5
    assert torch.allclose(spacing, spacing[:, :1].expand_as(spacing), atol=1e-5)
    factor = spacing[:, 0].log() / math.log(3)
    assert 0.8 < factor.abs().max() <= 1
    assert abs(factor.mean()) < 0.1
    # What is left of the middle is the shift, scaled alike.
    shift = drawn[:, :, 1].mean(dim=1) / spacing[:, 0]
    assert 0.09 < shift.abs().max() <= 0.1 + 1e-6


def test_no_randomness_outside_training() -> None:
    rope = positions(shift_coords=0.1, jitter_coords=1.5, rescale_coords=2.0)
    assert not torch.equal(rope.train()(4, 4).cos, rope(4, 4).cos)
    state = torch.get_rng_state()
    assert torch.equal(rope.eval()(4, 4).cos, positions()(4, 4).cos)
    assert torch.equal(torch.get_rng_state(), state)
