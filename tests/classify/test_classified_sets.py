"""The evaluations of classifiers on sets of images: what is compared with what, what is counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from classify_support import GRAY
from dinov3_classify.classification import ClassificationEvaluation
from dinov3_classify.configs_heads import (
    ClassificationConfig,
    LinearProbesConfig,
    ProbesEvaluationConfig,
)
from dinov3_classify.probes import LinearProbes
from dinov3_classify.probes_evaluation import ProbesEvaluation
from heads_fixed import FixedHead
from process_groups import run_processes
from torch import Tensor

from dinov3_framework import (
    Component,
    CorruptSampleError,
    DataError,
    Dataset,
    DatasetConfig,
    Model,
    Registry,
    Sample,
    Target,
    config,
    option,
)
from dinov3_framework.testing import EvaluationSuite
from dinov3_framework.testing.toy_backbone import ToyBackbone

FOUR = Target("class", classes=("a", "b", "c", "d"))


@config
class TaggedConfig(DatasetConfig):
    """Gray images: ``label`` is the index, ``color`` 1, both of four classes."""

    labels: tuple[int, ...] = option("labels", default=(0, 1, 2, 3, 0, 1))
    several: bool = option("labels, also the next class; of -1 none", default=False)
    corrupt: tuple[int, ...] = option("images that cannot be decoded", default=())


class Tagged(Dataset):
    def __init__(self, config: TaggedConfig, *, channels: int) -> None:
        self.config, self.channels = config, channels
        label = {"labels": Target("class", classes=FOUR.classes, per_object=True)}
        self.targets = {**(label if config.several else {"label": FOUR}), "color": FOUR}

    def __len__(self) -> int:
        return len(self.config.labels)

    def __getitem__(self, index: int) -> Sample:
        if index in self.config.corrupt:
            raise CorruptSampleError(f"image {index}", "broken on purpose")
        label = self.config.labels[index]
        several = torch.tensor([] if label < 0 else [label, (label + 1) % 4], dtype=torch.int64)
        known: dict[str, Any] = {"labels": several} if self.config.several else {"label": label}
        pixels = torch.full((self.channels, 8, 8), 20 * index, dtype=torch.uint8)
        return Sample(pixels, {**known, "color": 1})


class ColorHead(FixedHead):
    """Always color 1."""

    def __init__(self) -> None:
        super().__init__()
        self.targets = {"color": FOUR}

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Any]:
        return {"color": outputs}


def registry() -> Registry:
    made = Registry()
    made.add("dataset", Component("tagged", TaggedConfig, Tagged), "tests", "tests")
    for name, cls, factory in (
        ("classification", ClassificationConfig, ClassificationEvaluation),
        ("linear_probes", ProbesEvaluationConfig, ProbesEvaluation),
    ):
        made.add("evaluation", Component(name, cls, factory), "tests", "tests")
    return made


def model(head: Any) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Model(ToyBackbone(1).eval(), GRAY, head.eval(), 8)


def probes(target: str = "label", classes: Target = FOUR) -> LinearProbes:
    values = LinearProbesConfig(learning_rates=(0.1, 1.0), target=target)
    infos = ToyBackbone(1).feature_info
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        head = LinearProbes(values, features=infos, targets={target: classes})
        head.init_weights()
    return head


def measured(head: Any, data: TaggedConfig, **options: Any) -> tuple[dict[str, Any], Any]:
    """Metrics and the protocol of ``classification``."""
    evaluation = ClassificationEvaluation(ClassificationConfig(sets={"a": data}, **options))
    evaluation.prepare(registry().build, GRAY)
    assert not evaluation.problems(model(head))
    found = dict(evaluation.run(model(head)))
    return found, evaluation.protocol(model(head))


class TestClassification(EvaluationSuite):
    config = ClassificationConfig(sets={"a": TaggedConfig(), "b": TaggedConfig(several=True)})
    registry = registry()
    images = GRAY
    head = FixedHead().eval()
    size = 8


class TestProbes(EvaluationSuite):
    config = ProbesEvaluationConfig(val=TaggedConfig(), sets={"b": TaggedConfig(several=True)})
    registry = registry()
    images = GRAY
    head = probes().eval()
    size = 8


# ---------------------------------------------------------------------------- what is compared
def test_a_prediction_is_compared_with_the_target_of_its_name() -> None:
    assert measured(FixedHead(), TaggedConfig())[0]["a/accuracy"] == pytest.approx(
        100 / 3, abs=1e-4
    )
    assert measured(ColorHead(), TaggedConfig(), target="color")[0]["a/accuracy"] == 100


def test_data_without_the_target_are_refused() -> None:
    head = ColorHead()
    head.targets = {"shape": FOUR}
    evaluation = ClassificationEvaluation(
        ClassificationConfig(sets={"a": TaggedConfig()}, target="shape")
    )
    evaluation.prepare(registry().build, GRAY)
    (problem,) = evaluation.problems(model(head))
    assert problem.where == "sets.a"
    assert "no classes 'shape'" in str(problem)


def test_probes_of_another_target_are_refused() -> None:
    evaluation = ProbesEvaluation(ProbesEvaluationConfig(val=TaggedConfig()))
    evaluation.prepare(registry().build, GRAY)
    assert not evaluation.problems(model(probes()))
    (problem,) = evaluation.problems(model(probes("color")))
    assert "the target 'label'" in str(problem)


# ---------------------------------------------------------------------------- what is counted
def test_of_several_classes_any_counts_and_images_without_any_are_left_out() -> None:
    found, protocol = measured(FixedHead(), TaggedConfig(labels=(0, 1, 2, -1, -1), several=True))
    assert found["a/accuracy"] == pytest.approx(100 * 2 / 3, abs=1e-4)
    assert not [key for key in protocol if key.startswith("unreadable")]
    assert protocol["without a class in a"] == 2


def test_images_that_cannot_be_read_are_in_the_protocol() -> None:
    found, protocol = measured(FixedHead(), TaggedConfig(corrupt=(0, 4)))
    assert found["a/accuracy"] == 50  # of labels 1, 2, 3, 1
    assert protocol["unreadable in a"] == 2
    assert "without a class in a" not in protocol


@pytest.mark.parametrize("several", [False, True])
def test_labels_out_of_range_are_said(several: bool) -> None:
    labels = (0, 1, 7) if not several else (0, 1, 70)
    data = TaggedConfig(labels=labels, several=several)
    with pytest.raises(DataError, match=r"sample 2: a: label .*7.* where 4 classes are expected"):
        measured(FixedHead(), data)


# ---------------------------------------------------------------------------- processes
@pytest.mark.parametrize("count", [2, 11])
def test_no_image_is_counted_twice(count: int, tmp_path: Path) -> None:
    """By three processes, of which one may have no image at all."""
    alone = everything(count)
    assert alone["images"] == [count, count]
    for found in run_processes(3, tmp_path, everything, count):
        assert found == alone


def test_labels_out_of_range_end_all_processes(tmp_path: Path) -> None:
    for said in run_processes(2, tmp_path, complaints):
        assert len(said) == 2
        assert all("9" in each and "4 classes are expected" in each for each in said)


def everything(count: int) -> dict[str, Any]:
    """What both evaluations find of ``count`` images, by this process."""
    data = TaggedConfig(labels=tuple(index % 4 for index in range(count)))
    shared: dict[str, Any] = {"batch_size": 2, "class_mean": True}
    found: dict[str, Any] = {"images": []}
    for each in (
        ClassificationConfig(sets={"a": data}, **shared),
        ProbesEvaluationConfig(val=data, sets={"a": data}, **shared),
    ):
        evaluation = registry().build(each)
        evaluation.prepare(registry().build, GRAY)
        metrics = dict(evaluation.run(model(probes())))
        details = evaluation.details()
        found[type(each).__name__] = (metrics, details.intervals, details.tables)
        found["images"].append(int(details.arrays["a_confusion"].sum()))
    return found


def complaints() -> list[str]:
    """What either evaluation says of a label that there is no class for."""
    data = TaggedConfig(labels=(0, 1, 9))
    said = []
    for each in (ClassificationConfig(sets={"a": data}), ProbesEvaluationConfig(val=data)):
        evaluation = registry().build(each)
        evaluation.prepare(registry().build, GRAY)
        try:
            evaluation.run(model(probes()))
        except DataError as error:
            said.append(str(error))
    return said
