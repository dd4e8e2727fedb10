"""Deformable attention: by definition, with gradients, and as initialized."""

from __future__ import annotations

import math

import pytest
import torch
from dinov3_segment.deformable import DeformableAttention, centers, sample
from torch import Tensor

SIZES = [(3, 4), (2, 2)]


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [2, 16, 2, 3], places [5, 2], offsets [2, 5, 2, 2, 3, 2], weights [2, 5, 2, 2, 3]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = normal(2, 5, 2, 6).softmax(-1).view(2, 5, 2, 2, 3)
    return normal(2, 16, 2, 3), normal(5, 2).sigmoid(), 2 * normal(2, 5, 2, 2, 3, 2), weights


def test_it_is_the_definition() -> None:
    values, places, offsets, weights = drawn()
    expected = torch.zeros(2, 5, 2, 3, dtype=torch.float64)
    for image in range(2):
        for query in range(5):
            for head in range(2):
                start = 0
                for level, (height, width) in enumerate(SIZES):
                    grid = values[image, start : start + height * width, head]
                    grid = grid.view(height, width, 3)
                    start += height * width
                    for point in range(3):
                        dx, dy = offsets[image, query, head, level, point].tolist()
                        x = float(places[query, 0]) * width + dx - 0.5
                        y = float(places[query, 1]) * height + dy - 0.5
                        share = weights[image, query, head, level, point]
                        expected[image, query, head] += share * bilinear(grid, y, x)
    found = sample(values, places, offsets, weights, SIZES)
    torch.testing.assert_close(found.view(2, 5, 2, 3), expected, rtol=1e-10, atol=1e-12)
    found = sample(values.float(), places.float(), offsets.float(), weights.float(), SIZES)
    torch.testing.assert_close(found.view(2, 5, 2, 3).double(), expected, rtol=1e-4, atol=1e-5)


def bilinear(grid: Tensor, y: float, x: float) -> Tensor:
    """A value between the centers of positions, 0 beyond the edge."""
    found = torch.zeros(grid.shape[-1], dtype=grid.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]:
                found += (1 - abs(y - row)) * (1 - abs(x - column)) * grid[row, column]
    return found


def test_gradients_are_those_of_differences() -> None:
    """For values, places, offsets and weights."""
    given = [tensor.requires_grad_() for tensor in drawn()]
    assert torch.autograd.gradcheck(lambda *tensors: sample(*tensors, SIZES), given)


def test_centers_lie_between_the_edges() -> None:
    found = centers([(2, 4)], torch.device("cpu"))
    assert found.tolist() == [[x, y] for y in (0.25, 0.75) for x in (0.125, 0.375, 0.625, 0.875)]


def test_at_first_heads_look_around_evenly() -> None:
    attention = DeformableAttention(16, levels=2, heads=4, points=2)
    attention.init_weights()
    offsets = attention.sampling_offsets.bias.detach().view(4, 2, 2, 2)
    ways = [[1, 0], [0, 1], [-1, 0], [0, -1]]
    expected = torch.tensor(ways, dtype=torch.float32)
    torch.testing.assert_close(offsets[:, 0, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(offsets[:, 1, 1], 2 * expected, atol=1e-6, rtol=0)
    assert not attention.attention_weights.weight.any()


def test_half_precision_is_sampled_in_single() -> None:
    torch.manual_seed(0)
    attention = DeformableAttention(16, levels=2, heads=4, points=2)
    attention.init_weights()
    queries, values = torch.randn(1, 5, 16), torch.randn(1, 16, 16)
    places = torch.rand(5, 2)
    whole = attention(queries, places, values, SIZES)
    half = attention.bfloat16()(queries.bfloat16(), places, values.bfloat16(), SIZES)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=0.1, atol=0.05)


@pytest.mark.slow  # imports transformers
def test_it_is_that_of_transformers() -> None:
    """The encoder's attention of its Mask2Former, which has the same names."""
    pytest.importorskip("transformers")
    from transformers.models.mask2former import modeling_mask2former

    name = "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention"
    theirs = getattr(modeling_mask2former, name)(16, num_heads=4, n_levels=2, n_points=3)
    ours = DeformableAttention(16, levels=2, heads=4, points=3)
    torch.manual_seed(0)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict(ours.state_dict())
    queries, values, places = torch.randn(2, 5, 16), torch.randn(2, 16, 16), torch.rand(5, 2)
    expected, _ = theirs(
        queries,
        encoder_hidden_states=values,
        reference_points=places[None, :, None].expand(2, -1, 2, -1),
        spatial_shapes_list=SIZES,
    )
    torch.testing.assert_close(ours(queries, places, values, SIZES), expected, rtol=1e-4, atol=1e-5)
