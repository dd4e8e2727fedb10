"""What each kind of component must offer.

Base classes rather than protocols where a default saves every author the same lines. The letters
in shapes: B samples, G crops of a view, C channels, H and W pixels, P patches, R storage tokens,
D the backbone's width.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from dinov3_framework.configs import AnchorConfig, ImagesConfig
from dinov3_framework.errors import UserError
from dinov3_framework.schedules import Schedule


# --------------------------------------------------------------------------- data
@attrs.frozen
class Sample:
    """One image, uint8 [C, H, W], and its label (None where there is none)."""

    image: Tensor
    label: int | None = None


class Dataset(abc.ABC):
    """Images by index."""

    n_classes: int | None = None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``; raises ``CorruptSampleError`` where it cannot be decoded."""

    def name(self, index: int) -> str:
        """What the sample is called, such as its path below the dataset's folder."""
        return str(index)

    def describe(self) -> str:
        """One line for the summary of a run."""
        return f"{type(self).__name__}, {len(self):,} images"


@attrs.frozen
class View:
    """A set of crops that an augmentation cuts from each image."""

    crops: int
    size: int  # pixels, square


class Augmentation(abc.ABC):
    """One image in, crops out; and the masks of a whole batch.

    ``views`` says what it makes: ``{"global": View(2, 224), "local": View(8, 96)}``. The engine
    knows ``global`` (student and teacher), ``local`` (student), ``anchor`` (anchors) and
    ``teacher`` (the teacher's version of the global crops, where the two differ).

    There may be several variants of it, such as crops of several sizes, of which each step has
    one: see ``at``. They make the same views, as many crops of each, and differ in sizes alone.
    What has variants shows ``views``, and makes crops and masks, of the largest of them.
    """

    views: Mapping[str, View]
    makes_masks: bool = False
    share: float = 1.0  # of the steps that have it, where it is one of several variants

    def at(self, seed: int, step: int) -> Augmentation:
        """The augmentation of one step, one of ``variants()``; by default itself.

        It depends on seed and step alone, so that all processes and passes of a step have the
        same, and a resumed run the same again.
        """
        return self

    def variants(self) -> Sequence[Augmentation]:
        """All that ``at`` may return, by default itself alone; their ``share`` sums to 1."""
        return (self,)

    @abc.abstractmethod
    def __call__(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Crops of one uint8 image [C, H, W], by view: [crops, C, size, size].

        uint8 crops are scaled and normalised on the device; float crops are taken as they are. All
        randomness comes from ``rng``, which depends on the sample's place in the stream alone.
        """

    def masks(self, *, rows: Sequence[int], total: int, seed: int, step: int) -> Tensor:
        """Which patches of the global crops the student does not see, bool [len(rows), P].

        ``rows`` are this process's rows among the ``total`` crop-major rows of the global batch
        (crop g of sample j is row g * B + j). The masks of a step depend on (seed, step, row)
        alone, however the rows are spread over processes.
        """
        raise TypeError(f"{type(self).__name__} makes no masks")


# --------------------------------------------------------------------------- networks
class Backbone(nn.Module, abc.ABC):
    """A network from images to tokens."""

    embed_dim: int
    patch_size: int  # pixels along the side of a patch token's cell
    in_chans: int
    n_layers: int = 1  # what get_intermediate_layers counts
    takes_masks: bool = True  # whether masked patches can be replaced; if not, masks are refused
    images: ImagesConfig | None = None  # what its weights were trained on, where that is known

    @abc.abstractmethod
    def init_weights(self) -> None:
        """Give every parameter *and buffer* its initial value (they come from the meta device)."""

    @abc.abstractmethod
    def forward_features(
        self,
        images: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Any:
        """Tokens of a batch [B, C, H, W], or of several batches of other sizes in one pass.

        Each batch gives a dict: ``x_norm_clstoken`` [B, D], ``x_storage_tokens`` [B, R, D],
        ``x_norm_patchtokens`` [B, P, D], ``x_prenorm`` [B, 1 + R + P, D], ``masks``. ``masks`` is
        bool [B, P]: those patches are replaced by the mask token. Several batches are a list; the
        first holds global crops, those after it local crops.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Class tokens [B, D]."""
        tokens: Tensor = self.forward_features(images)["x_norm_clstoken"]
        return tokens

    def get_intermediate_layers(
        self,
        images: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """What some of the ``n_layers`` layers put out, in the network's order.

        ``n`` is a number of last layers, or their indices from 0. Each gives its patches
        [B, P, D], or a grid [B, D, h, w] with ``reshape``; with ``return_class_token`` and
        ``return_extra_tokens`` a tuple of patches, class token [B, D] and storage tokens
        [B, R, D]. ``norm`` applies the final norm. The width D may differ from layer to layer.

        A backbone that does not say more gives its last layer, after the norm, alone; anything
        else is a ``UserError``.
        """
        last = self.n_layers - 1
        if n not in (1, [last], (last,)) or not norm:
            raise UserError(
                f"{type(self).__name__} gives its last layer after the norm alone, not n = {n}"
                + ("" if norm else " without the norm")
            )
        tokens = self.forward_features(images)
        patches = tokens["x_norm_patchtokens"]
        if reshape:
            height, width = (side // self.patch_size for side in images.shape[-2:])
            patches = patches.transpose(1, 2).reshape(len(patches), -1, height, width)
        parts = [patches]
        if return_class_token:
            parts.append(tokens["x_norm_clstoken"])
        if return_extra_tokens:
            parts.append(tokens["x_storage_tokens"])
        return (tuple(parts) if len(parts) > 1 else patches,)

    def layer_of(self, name: str) -> tuple[int, int]:
        """(layer, layers) of a parameter, for layer-wise learning-rate decay.

        0 is the embedding, ``layers`` what comes after the last block. By default no decay.
        """
        return 0, 0

    def blocks_to_shard(self) -> Iterable[nn.Module]:
        """The submodules that are sharded (and recomputed, and compiled) as units."""
        return ()


class Projector(nn.Module, abc.ABC):
    """A loss's own network on top of tokens; the engine makes its momentum twin."""

    @abc.abstractmethod
    def init_weights(self) -> None: ...

    def fit(self, tokens: Tensor) -> bool:
        """Make the projector of a frozen teacher that came without one say something of its tokens.

        Called once in a distillation, after ``init_weights``, on the CPU, with tokens [n, D] of
        training images as the loss projects them. Whatever is random comes from torch's global
        generator. False if nothing was changed.
        """
        return False


class Head(nn.Module, abc.ABC):
    """An evaluation head on top of a backbone's features."""

    @abc.abstractmethod
    def init_weights(self) -> None: ...


# --------------------------------------------------------------------------- losses
@attrs.frozen
class ViewFeatures:
    """What one network said of one view, crops apart from samples."""

    cls: Tensor  # [G, B, D]
    storage: Tensor  # [G, B, R, D]
    patches: Tensor  # [G, B, P, D]
    grid: tuple[int, int]  # patches along height and width


@attrs.frozen
class Anchor:
    """A frozen backbone that a loss wants to be held to.

    It sees the view ``view``; ``config`` says where it comes from and when it is refreshed: with
    ``period``, after every iteration whose number (from 1) is a multiple of it from
    ``first_refresh`` on, at most ``max_refreshes`` times. While there is none yet (``start``) the
    loss is left out.
    """

    view: str = "anchor"
    config: AnchorConfig = attrs.field(factory=AnchorConfig)


@attrs.frozen
class StepOutputs:
    """All that a loss may look at in one step."""

    iteration: int
    total_iterations: int
    student: Mapping[str, ViewFeatures]
    teacher: Mapping[str, ViewFeatures]
    anchor: ViewFeatures | None  # of the anchor that this loss asked for
    masks: Tensor | None  # bool [G, B, P], of the global crops
    # This loss's projector in the student; what else it is given goes to the projector too.
    project: Callable[..., Tensor]
    project_teacher: Callable[..., Tensor]  # and in the teacher, without gradient
    masked: Tensor | None = None  # int64 [M]: the masked ones among the G * B * P patches

    def masked_patches(self) -> Tensor:
        """The masked ones among the G * B * P patches of ``masks``, int64 [M], ascending.

        The loader counts them beforehand: to ask the device would wait for it.
        """
        if self.masks is None:
            raise ValueError("this step has no masks")
        if self.masked is not None:
            return self.masked
        return self.masks.flatten().nonzero().squeeze(1)

    def value(self, schedule: Schedule) -> float:
        """A schedule's value in this step."""
        return schedule.at(self.iteration, self.total_iterations)


@attrs.frozen
class LossResult:
    """A scalar to minimise, before its weight, and figures to log by name."""

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = attrs.field(factory=dict)


class Loss(nn.Module, abc.ABC):
    """A term of the objective.

    It has no parameters of its own, only buffers, which are checkpointed: what is to be trained
    belongs into its projector. ``needs`` names what it reads, as ``network.view.output``, with
    networks student, teacher and anchor and outputs class, storage and patches, or ``masks``; the
    engine refuses a recipe that does not offer it, and computes nothing that no loss needs.
    """

    needs: frozenset[str] = frozenset()
    # Whether halves of a batch give other values than the batch (said when accumulating).
    sees_batch: bool = False

    def build_projector(self, embed_dim: int) -> Projector | None:
        """A new projector for tokens of width ``embed_dim``; the engine calls it for each network.

        In state dicts it is ``<name of the loss in the recipe>_head``.
        """
        return None

    def build_teacher_projector(self, embed_dim: int) -> Projector | None:
        """The projector of a frozen teacher of width ``embed_dim``, for a distillation."""
        return self.build_projector(embed_dim)

    def anchor(self) -> Anchor | None:
        """The anchor this loss wants, if any."""
        return None

    @abc.abstractmethod
    def forward(self, step: StepOutputs) -> LossResult: ...


# --------------------------------------------------------------------------- running
@attrs.frozen
class Job:
    """What a launcher is to get done."""

    command: Sequence[str]  # runs one process of the job, found by its environment variables
    output_dir: Path
    run: Callable[[], int]  # the same, in this process


class Launcher(abc.ABC):
    """Gets processes for a job."""

    @abc.abstractmethod
    def launch(self, job: Job) -> int:
        """Run the job to its end (or hand it over) and return the exit code."""

    def describe(self) -> str:
        """One line: what would be started."""
        return type(self).__name__

    def world_size(self) -> int:
        """How many processes there will be."""
        return 1


@attrs.frozen
class Report:
    """What a task has to say of itself before it runs: sections of (label, value) rows.

    ``missing`` lists what the recipe may well be right about and this machine does not have, such
    as a dataset: a check says so, a run refuses to start.
    """

    sections: Mapping[str, Sequence[tuple[str, str]]]
    missing: Sequence[str] = ()


class Task(abc.ABC):
    """What a recipe runs."""

    @abc.abstractmethod
    def check(self, world_size: int) -> Report:
        """Build everything on the meta device, raise every mistake, write and allocate nothing."""

    def rehearse(self, world_size: int, accelerator: str) -> Report:
        """Say what a step on so many processes takes, without doing it; only training can.

        ``accelerator`` names what times are estimated for. Mistakes are raised as by ``check``.
        """
        raise UserError(
            f"a {type(self).__name__} cannot be rehearsed: only tasks that train can; --check says "
            "what this recipe would do"
        )

    @abc.abstractmethod
    def run(self, output_dir: Path) -> None:
        """Do the work. Called in each process, after the process group is up."""

    def stand_in(self, folder: Path) -> bool:
        """Put into an empty folder what the run will leave for others, all but tensors' values.

        Names, shapes and types are right, so that a recipe that reads the run's folder can be
        checked before there is one. What the run will have removed again by its end is not there.
        False, and nothing written, if that cannot be told beforehand.
        """
        return False


class Run(Protocol):
    """A training run as an observer sees it: to read, not to change."""

    @property
    def output_dir(self) -> Path: ...
    @property
    def images(self) -> ImagesConfig: ...
    @property
    def total_iterations(self) -> int: ...
    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        ...

    @property
    def device(self) -> torch.device: ...
    @property
    def patch_size(self) -> int: ...

    def build(self, config: Any, **runtime: Any) -> Any:
        """Build any component, as ``Registry.build`` does."""
        ...

    def teacher_backbone(self) -> Backbone:
        """The momentum teacher's backbone, in eval mode; call it on every process or on none."""
        ...

    def initial_backbone(self) -> Backbone:
        """A backbone as it was before the first iteration, whole, in eval mode."""
        ...

    def sample_batch(self, count: int) -> Mapping[str, Tensor]:
        """The crops of the stream's first ``count`` samples, [crops, count, C, size, size] by view
        (uint8 or normalised float, as the augmentation of step 0 gives them), and ``masks`` if
        any."""
        ...


@attrs.frozen
class StepRecord:
    """One finished step."""

    iteration: int  # from 1: how many are done
    metrics: Mapping[str, float]  # averaged over processes


class Observer:
    """Watches a training run. Every method is called on every process; each may be left out."""

    def check(self, build: Callable[..., Any], images: ImagesConfig) -> None:
        """Before anything is written: raise ``UserError`` for what would fail later.

        ``build`` is ``Registry.build``; data that this machine lacks are a ``DataError``.
        """

    def on_start(self, run: Run, iteration: int) -> Mapping[str, float] | None:
        """Before the first step of this process; ``iteration`` steps are already done."""

    def on_step(self, run: Run, step: StepRecord) -> Mapping[str, float] | None:
        """After every ``every``-th step and the last; what it returns is added to the metrics."""

    def on_end(self, run: Run) -> Mapping[str, Any] | None:
        """After the last step; what it returns is added to ``results.json``.

        A value that is a list of flat dicts is shown as a table at the end of the run.
        """
