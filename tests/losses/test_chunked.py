"""DINO and iBOT, some prototypes at a time, are what they are in one piece, and hold less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attrs import field, frozen
from dinov3_losses.configs import DinoConfig, IbotConfig, ProjectorConfig
from dinov3_losses.dino import DinoLoss
from dinov3_losses.ibot import IbotLoss
from dinov3_losses.projector import PrototypeProjector
from dinov3_losses.sinkhorn import balance, sinkhorn_knopp
from loss_support import features, randn, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3_framework import Constant, InvalidOption, LossResult, UserError

TEACHER_TEMP, STUDENT_TEMP = 0.5, 0.2
K, WIDTH = 509, 4  # prototypes, more than anything else has columns; and their width
HEAD = ProjectorConfig(n_prototypes=K, bottleneck_dim=WIDTH, hidden_dim=6)
SAMPLES, DIM = 5, 8
LOSSES: dict[str, tuple[type, type]] = {
    "dino": (DinoLoss, DinoConfig),
    "ibot": (IbotLoss, IbotConfig),
}
KINDS = pytest.mark.parametrize("kind", LOSSES)


def heads(
    dtype: torch.dtype = torch.float32, rounded: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module]:
    """Projectors of student and teacher whose prototypes lie far enough apart to matter."""
    found = []
    for seed in (0, 1):
        head = PrototypeProjector(HEAD, DIM)
        for place, parameter in enumerate(head.parameters()):
            parameter.data = randn(*parameter.shape, seed=10 * place + seed)
            parameter.data = parameter.data.to(rounded).to(dtype)
        found.append(head)
    return found[0], found[1].requires_grad_(False)


@frozen
class Trial:
    """A loss on features that depend on the arguments alone."""

    kind: str
    crops: tuple[int, int] = (2, 3)  # global and local
    dtype: torch.dtype = torch.float32
    rounded: torch.dtype = torch.float32  # what tokens and parameters were in before
    options: dict[str, Any] = field(factory=dict)
    masked: float = 0.4

    def tokens(self) -> dict[str, Tensor]:
        n_global, n_local = self.crops
        shapes = {
            "global": (n_global, SAMPLES, DIM),
            "local": (n_local, SAMPLES, DIM),
            "patches": (n_global, SAMPLES, 9, DIM),
            "teacher": (n_global, SAMPLES, DIM),
            "teacher patches": (n_global, SAMPLES, 9, DIM),
        }
        return {
            name: randn(*shape, seed=seed).to(self.rounded).to(self.dtype)
            for seed, (name, shape) in enumerate(shapes.items())
        }

    @property
    def masks(self) -> Tensor:
        drawn = torch.rand(self.crops[0], SAMPLES, 9, generator=torch.Generator().manual_seed(7))
        return drawn < self.masked

    def loss(self, tokens: dict[str, Tensor], networks: Any, chunk: int | None) -> LossResult:
        cls, config = LOSSES[self.kind]
        temperatures = {"teacher_temp": Constant(value=TEACHER_TEMP), "student_temp": STUDENT_TEMP}
        loss = cls(config(**{**temperatures, "head": HEAD, "chunk": chunk, **self.options}))
        student = {"global": features(cls=tokens["global"], patches=tokens["patches"])}
        if self.crops[1]:
            student["local"] = features(cls=tokens["local"])
        given = step(
            student=student,
            teacher=features(cls=tokens["teacher"], patches=tokens["teacher patches"]),
            masks=self.masks,
            project=networks[0],
            project_teacher=torch.no_grad()(networks[1]),
        )
        return loss(given)

    def run(
        self, chunk: int | None, upstream: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and metrics; and the gradients of ``upstream`` times the loss."""
        tokens, networks = self.tokens(), heads(self.dtype, self.rounded)
        leaves = {name: tokens[name].requires_grad_() for name in ("global", "local", "patches")}
        result = self.loss(tokens, networks, chunk)
        (upstream * result.loss).backward()
        leaves |= dict(networks[0].named_parameters())
        figures = {"loss": result.loss.detach(), **result.metrics}
        return figures, {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


def assert_same(
    actual: tuple[dict[str, Tensor], dict[str, Tensor]],
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
    rtol: float,
) -> None:
    """To ``rtol`` of each tensor's largest value."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype, name
            atol = rtol * value.abs().max().item()
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=name)


VARIANTS = {
    "dino": Trial("dino"),
    "dino with the diagonal": Trial("dino", options={"ignore_diagonal": False}),
    "dino without local crops": Trial("dino", options={"local_weight": Constant(value=0.0)}),
    "dino, light local crops": Trial("dino", options={"local_weight": Constant(value=0.3)}),
    "dino, one global crop": Trial("dino", crops=(1, 4)),
    "dino, more global crops": Trial("dino", crops=(3, 1)),
    "dino, other iterations": Trial("dino", options={"sinkhorn_iterations": 1}),
    "ibot": Trial("ibot"),
    "ibot, all masked": Trial("ibot", masked=1.0),
    "ibot, other iterations": Trial("ibot", options={"sinkhorn_iterations": 6}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_change_nothing(variant: str) -> None:
    trial = VARIANTS[variant]
    expected = trial.run(None, upstream=0.7)
    for chunk in (7, K - 1, 1000):
        # Rounding is up to 4e-6 of the largest gradient, in another order on another processor.
        assert_same(trial.run(chunk, upstream=0.7), expected, rtol=1e-4)


def by_hand(trial: Trial) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by their definitions, in float64."""
    tokens = {name: value.double() for name, value in trial.tokens().items()}
    student, teacher = heads(torch.float64)
    leaves = {name: tokens[name].requires_grad_() for name in ("global", "local", "patches")}
    leaves |= dict(student.named_parameters())

    def logits(head: Any, values: Tensor) -> Tensor:
        return F.normalize(head.mlp(values), dim=-1) @ head.last_layer.weight.T

    def targets(values: Tensor) -> Tensor:
        q = (logits(teacher, values) / TEACHER_TEMP).exp()
        for _ in range(3):
            q = q / q.sum(dim=0)
            q = q / q.sum(dim=1, keepdim=True)
        return q

    def entropy(values: Tensor, target: Tensor) -> Tensor:
        return -(target * (logits(student, values) / STUDENT_TEMP).log_softmax(dim=-1)).sum(dim=-1)

    loss: Any = 0.0
    if trial.kind == "dino":
        seen = targets(tokens["teacher"].flatten(0, 1)).view(*tokens["teacher"].shape[:2], -1)
        crops = [*tokens["global"], *tokens["local"]]
        pairs = [(s, t) for s in range(len(crops)) for t in range(len(seen)) if s != t]
        for s, t in pairs:
            loss = loss + entropy(crops[s], seen[t]).mean() / len(pairs)
    else:
        masks = trial.masks
        target = targets(tokens["teacher patches"][masks])
        losses = torch.zeros(masks.shape, dtype=torch.float64)
        losses[masks] = entropy(tokens["patches"][masks], target)
        loss = (losses.sum(dim=-1) / masks.sum(dim=-1).clamp(min=1)).mean()
    loss.backward()
    return loss.detach(), {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


@KINDS
def test_by_definition(kind: str) -> None:
    loss, gradients = by_hand(Trial(kind))
    figures, ours = Trial(kind).run(30)
    assert figures["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert ours.keys() == gradients.keys()
    for name, wanted in gradients.items():
        atol = 1e-5 * wanted.abs().max().item()
        torch.testing.assert_close(ours[name].double(), wanted, rtol=1e-4, atol=atol, msg=name)


# ------------------------------------------------------------------------- what may be missing
@pytest.mark.parametrize("chunk", [40, 1000])
def test_without_masked_patches(chunk: int) -> None:
    figures, gradients = Trial("ibot", masked=0.0).run(chunk)
    assert figures == {"loss": torch.zeros(())}
    parameters = {name for name, _ in heads()[0].named_parameters()}
    assert gradients.keys() == {"patches", *parameters}
    for name, gradient in gradients.items():
        assert gradient.abs().sum() == 0, name


def test_no_pairs() -> None:
    with pytest.raises(UserError, match="no pair of crops to compare"):
        Trial("dino", crops=(1, 0)).run(3)


@KINDS
def test_impossible_temperature(kind: str) -> None:
    with pytest.raises(UserError, match="temperature must be above 0, is 0"):
        Trial(kind, options={"teacher_temp": Constant(value=0.0)}).run(3)


@KINDS
def test_impossible_chunks(kind: str) -> None:
    for chunk in (0, -1):
        with pytest.raises(InvalidOption, match="chunk: must be above 0"):
            LOSSES[kind][1](chunk=chunk)


@KINDS
def test_frozen_prototypes(kind: str) -> None:
    trial, tokens, networks = Trial(kind), Trial(kind).tokens(), heads()
    networks[0].last_layer.weight.requires_grad_(False)
    trial.loss(tokens, networks, 40).loss.backward()
    _, expected = trial.run(None)
    for name, parameter in networks[0].mlp.named_parameters():
        wanted = expected[f"mlp.{name}"]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
    assert networks[0].last_layer.weight.grad is None


@KINDS
def test_one_backward_pass(kind: str) -> None:
    loss = Trial(kind).loss(Trial(kind).tokens(), heads(), 40).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a chunked loss can be sent back once"):
        loss.backward()


# ------------------------------------------------------------------------- precision
@KINDS
def test_bfloat16_is_rounded_little_more(kind: str) -> None:
    plain, chunked = (Trial(kind, dtype=torch.bfloat16).run(chunk) for chunk in (None, 64))
    exact = Trial(kind, rounded=torch.bfloat16).run(None)[1]
    torch.testing.assert_close(chunked[0]["loss"], plain[0]["loss"], rtol=1e-5, atol=0)
    assert chunked[0]["loss"].dtype == torch.float32

    def error(found: Tensor, name: str) -> float:
        return ((found.float() - exact[name]).norm() / exact[name].norm()).item()

    for name, wanted in plain[1].items():
        ours = chunked[1][name]
        assert ours.dtype == torch.bfloat16
        # Those of the prototypes are the same; the others' are sums of rounded ones.
        worse = 1.01 if name == "last_layer.weight" else 1.5
        assert error(ours, name) < worse * error(wanted, name), name
        assert error(wanted, name) < 0.05, name


@KINDS
def test_autocast(kind: str) -> None:
    """Autocast reaches the networks, not the loss; the prototypes are cast like everything."""
    figures = []
    for chunk in (None, 30):
        trial, networks = Trial(kind), heads()
        with torch.autocast("cpu", torch.bfloat16):
            loss = trial.loss(trial.tokens(), networks, chunk).loss
        loss.backward()
        figures.append((loss.detach(), networks[0].last_layer.weight.grad))
    (plain, wanted), (chunked, found) = figures
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=0)
    assert found.dtype == wanted.dtype == torch.float32
    assert (found - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e3, 1e6])
@pytest.mark.parametrize("iterations", [1, 3, 7])
def test_sinkhorn_in_slices(scale: float, iterations: int) -> None:
    scaled = randn(6, 16) * scale / 0.04
    scaled[0] -= scale * 10  # a sample far below, and a prototype that nobody is near
    scaled[:, 3] -= scale * 20
    slices = [slice(0, 5), slice(5, 10), slice(10, 15), slice(15, 16)]
    found = balance(lambda some: scaled[:, some].clone(), slices, 6, scaled.device, iterations)
    ours = torch.cat([found.assign(scaled[:, some].clone(), some) for some in slices], dim=1)
    assert ours.isfinite().all()
    expected = sinkhorn_knopp(scaled, 1.0, iterations)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------- memory
class Allocations(TorchDispatchMode):
    """Notes all storages that operations make, kept so that no two are taken for one."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: dict[int, tuple[Any, tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for value in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.made.setdefault(storage.data_ptr(), (storage, tuple(value.shape)))
        return outputs

    def elements(self) -> list[tuple[int, tuple[int, ...]]]:
        """Of float32 storages, largest first, with the shape that each was made in."""
        sizes = [(storage.nbytes() // 4, shape) for storage, shape in self.made.values()]
        return sorted(sizes, reverse=True)


def allocations(trial: Trial, chunk: int | None, way: str = "learning") -> Allocations:
    tokens, networks = trial.tokens(), heads(trial.dtype)
    known = [*tokens.values(), *networks[0].parameters(), *networks[1].parameters()]
    if way == "frozen":
        networks[0].requires_grad_(False)
    with torch.set_grad_enabled(way != "no_grad"), Allocations(known) as noted:
        result = trial.loss(tokens, networks, chunk)
        if way == "learning":
            result.loss.backward()
    return noted


def rows_of(trial: Trial) -> int:
    """Of the student, who has at least as many as the teacher."""
    return int(trial.masks.sum()) if trial.kind == "ibot" else 5 * SAMPLES


@KINDS
@pytest.mark.parametrize("chunk", [30, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_tensor_is_wider_than_a_chunk(kind: str, chunk: int, dtype: torch.dtype) -> None:
    trial = Trial(kind, dtype=dtype)
    rows = rows_of(trial)
    assert allocations(trial, None).elements()[0][0] == rows * K, "sees what is large"
    found = allocations(trial, chunk).elements()
    # The gradient of the prototypes, once: it is handed over without a copy, and no sum of it.
    gradients = [size for size, shape in found if shape == (K, WIDTH)]
    assert gradients == [K * WIDTH * dtype.itemsize // 4]
    assert max(size for size, shape in found if shape != (K, WIDTH)) <= rows * chunk


@KINDS
@pytest.mark.parametrize("way", ["no_grad", "frozen"])
def test_no_gradients_where_nobody_learns(kind: str, way: str) -> None:
    noted = allocations(Trial(kind), 90, way)
    assert noted.elements()[0][0] == rows_of(Trial(kind)) * 90
    assert not [shape for _, shape in noted.elements() if shape == (K, WIDTH)]


# ------------------------------------------------------------------------- the projector
def test_projector_gives_what_the_logits_are_made_of() -> None:
    head, tokens = heads()[0], randn(3, DIM)
    logits = head(tokens, lambda embeddings, prototypes: embeddings @ prototypes.T)
    torch.testing.assert_close(logits, head(tokens))
