"""DINO, iBOT and their projection head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dinov3_losses.configs import DinoConfig, IbotConfig, ProjectorConfig
from dinov3_losses.dino import DinoLoss
from dinov3_losses.ibot import IbotLoss
from dinov3_losses.projector import PrototypeProjector
from dinov3_losses.sinkhorn import sinkhorn_knopp
from loss_support import features, randn, step
from torch import Tensor

from dinov3_framework import Constant, Cosine, InvalidOption, UserError

TEACHER_TEMP, STUDENT_TEMP = 0.5, 0.2


def dino(**options: Any) -> DinoLoss:
    temperatures = {"teacher_temp": Constant(value=TEACHER_TEMP), "student_temp": STUDENT_TEMP}
    return DinoLoss(DinoConfig(**{**temperatures, **options}))


def ibot(**options: Any) -> IbotLoss:
    temperatures = {"teacher_temp": Constant(value=TEACHER_TEMP), "student_temp": STUDENT_TEMP}
    return IbotLoss(IbotConfig(**{**temperatures, **options}))


def entropy(logits: Tensor, target: Tensor) -> float:
    """Cross-entropy of one token, by its definition."""
    exponentials = (logits.double() / STUDENT_TEMP).exp()
    return -(target * (exponentials / exponentials.sum()).log()).sum().item()


# ------------------------------------------------------------------------- projector
def projector(**options: int) -> PrototypeProjector:
    sizes = {"n_prototypes": 12, "bottleneck_dim": 4, "hidden_dim": 6, **options}
    return PrototypeProjector(ProjectorConfig(**sizes), embed_dim=5)


def test_projector_names_and_shapes() -> None:
    assert {name: list(value.shape) for name, value in projector().state_dict().items()} == {
        "mlp.0.weight": [6, 5],
        "mlp.0.bias": [6],
        "mlp.2.weight": [6, 6],
        "mlp.2.bias": [6],
        "mlp.4.weight": [4, 6],
        "mlp.4.bias": [4],
        "last_layer.weight": [12, 4],
    }
    assert list(projector(n_layers=1).state_dict()) == [
        "mlp.weight",
        "mlp.bias",
        "last_layer.weight",
    ]


def test_projector_normalizes_before_the_prototypes() -> None:
    head = projector()
    tokens = randn(3, 5)
    embedding = head.mlp(tokens)
    cosines = torch.nn.functional.normalize(embedding, dim=-1) @ head.last_layer.weight.T
    torch.testing.assert_close(head(tokens), cosines)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_projector_of_zero_is_finite(dtype: torch.dtype) -> None:
    head = projector().to(dtype)
    tokens = torch.zeros(2, 5, dtype=dtype, requires_grad=True)  # biases are 0 at first
    logits = head(tokens)
    assert logits.isfinite().all()
    logits.sum().backward()
    # The direction of a vector of length 0 turns without limit, which float16 cannot hold.
    assert tokens.grad.isfinite().all() or dtype == torch.float16


def test_projector_from_the_meta_device() -> None:
    with torch.device("meta"):
        head = PrototypeProjector(
            ProjectorConfig(n_prototypes=100, bottleneck_dim=64, hidden_dim=64), embed_dim=64
        )
    head.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(float("nan"))
    head.init_weights()
    for name, parameter in head.named_parameters():
        expected = 0.02 if name.endswith("weight") else 0.0
        assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


def test_losses_build_their_projector() -> None:
    for cls, config in ((DinoLoss, DinoConfig), (IbotLoss, IbotConfig)):
        loss = cls(config(head=ProjectorConfig(n_prototypes=7, bottleneck_dim=3, hidden_dim=4)))
        assert loss.build_projector(5)(randn(2, 5)).shape == (2, 7)
        assert not list(loss.parameters())


# ------------------------------------------------------------------------- dino
@pytest.mark.parametrize("ignore_diagonal", [True, False])
@pytest.mark.parametrize("local_weight", [1.0, 0.5])
def test_dino_by_definition(ignore_diagonal: bool, local_weight: float) -> None:
    student = {"global": features(seed=1), "local": features(crops=3, seed=2)}
    teacher = features(seed=3)
    loss = dino(ignore_diagonal=ignore_diagonal, local_weight=Constant(value=local_weight))
    result = loss(step(student=student, teacher=teacher))

    targets = sinkhorn_knopp(teacher.cls.flatten(0, 1), TEACHER_TEMP).view(2, 4, 8).double()
    terms: dict[str, list[float]] = {"global": [], "local": []}
    for kind, values in terms.items():
        for s, crop in enumerate(student[kind].cls):
            for t, target in enumerate(targets):
                if kind == "global" and ignore_diagonal and s == t:
                    continue
                pairs = zip(crop, target, strict=True)
                values.append(sum(entropy(*pair) for pair in pairs) / 4)
    pairs = len(terms["global"]) + len(terms["local"])
    expected = (sum(terms["global"]) + local_weight * sum(terms["local"])) / pairs
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    for kind, values in terms.items():
        assert result.metrics[kind].item() == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_dino_projects_all_student_crops_in_one_call() -> None:
    calls: list[tuple[str, int]] = []

    def counting(name: str) -> Any:
        return lambda tokens: calls.append((name, len(tokens))) or tokens

    student = {"global": features(), "local": features(crops=3)}
    dino()(step(student=student, project=counting("student"), project_teacher=counting("teacher")))
    assert calls == [("student", 5 * 4), ("teacher", 2 * 4)]


def test_dino_without_local_crops() -> None:
    loss = dino(local_weight=Constant(value=0.0))
    assert loss.needs == {"student.global.class", "teacher.global.class"}
    assert dino().needs == {*loss.needs, "student.local.class"}
    alone = step(student={"global": features(seed=1)})
    with_local = step(student={"global": features(seed=1), "local": features(crops=3, seed=2)})
    expected = loss(alone)
    assert expected.loss == expected.metrics["global"]
    assert expected.metrics.keys() == {"global"}
    assert loss(with_local).loss == expected.loss
    assert dino()(alone).loss == expected.loss
    none = features(crops=0)
    assert dino()(step(student={"global": features(seed=1), "local": none})).loss == expected.loss


def test_dino_schedules() -> None:
    student = {"global": features(seed=1), "local": features(crops=3, seed=2)}
    moving = dino(
        teacher_temp=Cosine(start=0.1, peak=0.5, end=0.5, warmup=4),
        local_weight=Cosine(start=0.0, peak=1.0, end=1.0, warmup=4),
    )
    for iteration, temp, weight in ((0, 0.1, 0.0), (2, 0.3, 0.5), (9, 0.5, 1.0)):
        fixed = dino(
            teacher_temp=Constant(value=temp),
            local_weight=Cosine(start=weight, peak=weight, end=weight),
        )
        a, b = (loss(step(student=student, iteration=iteration)).loss for loss in (moving, fixed))
        torch.testing.assert_close(a, b)


def test_dino_with_one_global_crop() -> None:
    student = {"global": features(crops=1), "local": features(crops=3)}
    result = dino()(step(student=student, teacher=features(crops=1)))
    assert result.metrics.keys() == {"local"}
    torch.testing.assert_close(result.loss.detach(), result.metrics["local"])
    with pytest.raises(UserError, match="no pair of crops to compare"):
        dino()(step(student={"global": features(crops=1)}, teacher=features(crops=1)))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_dino_in_bf16(scale: float) -> None:
    logits = (randn(2, 4, 8) * scale).bfloat16().requires_grad_()
    student = {"global": features(cls=logits)}
    teacher = features(cls=(randn(2, 4, 8, seed=9) * scale).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        result = dino()(step(student=student, teacher=teacher))
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert result.loss.isfinite()
    assert logits.grad.isfinite().all()
    exact = dino()(
        step(
            student={"global": features(cls=logits.detach().float())},
            teacher=features(cls=teacher.cls.float()),
        )
    )
    torch.testing.assert_close(result.loss.detach(), exact.loss)


# ------------------------------------------------------------------------- ibot
def some_masks() -> Tensor:
    masks = torch.zeros(2, 4, 9, dtype=torch.bool)
    masks[0, 1, :5] = True
    masks[1, 0, 3] = True
    masks[1, 3, 7:] = True
    return masks


def test_ibot_by_definition() -> None:
    student, teacher, masks = features(seed=1), features(seed=2), some_masks()
    result = ibot()(step(student={"global": student}, teacher=teacher, masks=masks))
    targets = torch.zeros_like(teacher.patches, dtype=torch.float64)
    targets[masks] = sinkhorn_knopp(teacher.patches[masks], TEACHER_TEMP).double()
    expected = 0.0
    for crop in range(2):
        for sample in range(4):
            places = masks[crop, sample].nonzero().flatten().tolist()
            for place in places:
                where = (crop, sample, place)
                expected += entropy(student.patches[where], targets[where]) / len(places) / 8
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert ibot().needs == {"student.global.patches", "teacher.global.patches", "masks"}


def test_ibot_projects_masked_patches_only() -> None:
    student, teacher, masks = features(seed=1), features(seed=2), some_masks()
    seen: list[Tensor] = []

    def keep(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return tokens

    views = {"student": {"global": student}, "teacher": teacher}
    ibot()(step(**views, masks=masks, project=keep, project_teacher=keep))
    assert torch.equal(seen[0], student.patches[masks])
    assert torch.equal(seen[1], teacher.patches[masks])


def test_ibot_without_masked_patches() -> None:
    loss = ibot(head=ProjectorConfig(n_prototypes=6, bottleneck_dim=3, hidden_dim=4))
    student, teacher = loss.build_projector(8), loss.build_projector(8)
    masks = torch.zeros(2, 4, 9, dtype=torch.bool)
    result = loss(step(masks=masks, project=student, project_teacher=teacher))
    assert result.loss == 0
    result.loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() == 0, name


def test_ibot_without_masks() -> None:
    with pytest.raises(UserError, match="ibot loss needs masks"):
        ibot()(step())


# ------------------------------------------------------------------------- configs
@pytest.mark.parametrize("config", [DinoConfig, IbotConfig])
def test_impossible_options(config: type) -> None:
    for name in ("student_temp", "sinkhorn_iterations"):
        with pytest.raises(InvalidOption, match=f"{name}: must be above 0"):
            config(**{name: 0})


@pytest.mark.parametrize("name", ["n_prototypes", "bottleneck_dim", "hidden_dim", "n_layers"])
def test_impossible_projectors(name: str) -> None:
    with pytest.raises(InvalidOption, match=f"{name}: must be above 0"):
        ProjectorConfig(**{name: 0})


def test_both_see_the_batch() -> None:
    assert DinoLoss.sees_batch
    assert IbotLoss.sees_batch
