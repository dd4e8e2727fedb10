"""A rehearsed step of students that a frozen teacher teaches: one, or several side by side."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from dinov3_estimate.findings import Findings
from dinov3_estimate.memory import Kind
from dinov3_estimate.several import PretendedStudent, _fullest
from dinov3_estimate.stage import Seat
from dinov3_ssl.configs import MultiDistillConfig, of_student
from dinov3_ssl.multi_distill import spans_of
from distill_support import DISTILL, MULTI, distill
from trainer_support import pretrain, registry

from dinov3_framework import UserError, cli
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.weights import downloads
from dinov3_framework.weights.locations import published_file

NEEDS = {"wide": {"class", "patches"}, "narrow": {"class", "patches"}, "conv": {"class"}}
PUBLISHED = "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
RGB = "images={channels=3, mean=[0, 0, 0], std=[1, 1, 1]}"
SIZES = ("augmentation.global_size=64", "augmentation.local_size=32", "backbone.patch_size=16")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a run leaves but values."""
    folder = tmp_path_factory.mktemp("teacher")
    wide = ("backbone.embed_dim=48", "backbone.num_heads=4", "backbone.patch_size=16")
    assert pretrain(*wide, *SIZES[:2]).write_expected_artifacts(folder)
    return folder


@pytest.fixture(scope="module")
def config(teacher: Path) -> MultiDistillConfig:
    found = structure_recipe(registry(), compose(MULTI, [f"teacher.weights={teacher}"]))
    assert isinstance(found, MultiDistillConfig)
    return found


@pytest.fixture(scope="module")
def found(config: MultiDistillConfig) -> Findings:
    """Of the student that has two of four processes."""
    own, spans = of_student(config, "wide", None), spans_of(config, 4)
    student = PretendedStudent(own, registry=registry(), name="wide", spans=spans, needs=NEEDS)
    seat = _fullest(own, spans, "wide")
    # Of ten images the four show 2, 3, 2 and 3 to the teacher.
    assert seat == Seat(4, 1, [range(2), range(2, 3), range(3, 4)])
    return student.rehearsed(seat)


# --------------------------------------------------------------------------- several
def test_the_teacher_is_over_all_and_the_student_over_its_own(found: Findings) -> None:
    assert (found.layout.world_size, found.layout.per_pass, found.taught) == (2, 5, 3)
    whole, held = found.parameters[Kind.STUDENT]
    assert held == pytest.approx(whole / 2, rel=0.05)
    sent = Counter(
        {(m.name, m.processes): n for m, n in found.tally.messages.items() if n and m.bytes}
    )
    assert {processes for name, processes in sent if name == "reduce_scatter"} == {2}
    assert {processes for name, processes in sent if name == "all_gather"} == {2, 4}
    gathered = sum(
        n for m, n in found.tally.messages.items() if (m.name, m.processes) == ("all_gather", 4)
    )
    assert gathered == 3  # the teacher's two blocks and the rest of its backbone


def test_crops_and_features_are_exchanged(found: Findings) -> None:
    """The process gives its three images to one process of each student, and gets its five."""
    exchanged = Counter(
        {m.bytes: n for m, n in found.tally.messages.items() if m.name == "all_to_all"}
    )
    width, patches, fp32 = 48, 16, 4
    expected: Counter[int] = Counter()
    for size in (64, 32):
        expected[9 * 2 * size * size] += 1  # as bytes; nine are given away
    expected[9 * 2 * width * fp32] += 1  # class tokens
    # Two of the students alone look at patches.
    expected[6 * 2 * patches * width * fp32] += 1
    assert exchanged == expected


def test_masks_are_those_of_the_images_that_the_student_sees(
    found: Findings, config: MultiDistillConfig
) -> None:
    own = of_student(config, "wide", None)
    alone = distill(Path(config.teacher.weights), *SIZES, "batch_size=10")
    alone.rehearses = True
    of_two = alone.rehearsed(Seat(2))
    assert own.augmentation == alone.config.augmentation
    assert found.hidden == of_two.hidden is not None
    assert found.tokens.teacher == of_two.tokens.teacher


@pytest.mark.slow
def test_the_report_on_several(
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"teacher.weights={teacher}", "--rehearse", "--world-size", "8", "batch_size=20"]
    assert cli.main([str(MULTI), *words]) == 0
    out = "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    for part in (
        "images per step 20, all of which every student sees",
        "of the teacher 8 x 1 passes x 3 at most",
        "of wide 4 x 1 passes x 5",
        "of conv 2 x 1 passes x 10",
        "narrow: memory of a process",
        "conv: estimated on H100 SXM 80 GB",
        ": all wait for it",
        "US dollars",
    ):
        assert part in out, part
    assert out.count("assumptions (estimates") == out.count("GPU hours") == 1
    assert list(tmp_path.iterdir()) == []
    assert cli.main([str(MULTI), *words[:2], "--world-size", "3"]) == 2
    assert "students: cannot share 3 processes" in capsys.readouterr().err


# --------------------------------------------------------------------------- what the teacher is
@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a rehearsal fetches nothing")

    monkeypatch.setattr(downloads, "_download", refuse)
    monkeypatch.setattr(downloads, "_local", refuse)


@pytest.mark.usefixtures("offline")
def test_a_published_teacher_is_known_by_the_name_of_its_file() -> None:
    weights = f"nowhere/{PUBLISHED}"
    report = distill(Path("x"), RGB, *SIZES, f"teacher.weights={weights}").rehearse(2, "h100")
    told = dict(report.sections["teacher"])
    assert told["backbone"] == "vit_small, 21,601,152 parameters"
    assert told["known as"] == f"the published {PUBLISHED}"
    assert any(f"there is no {weights}" in line for line in report.missing)


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("dinov3_vits16", PUBLISHED),
        ("dinov3_vitl16@sat493m", "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"),
        (f"https://example.com/{PUBLISHED}?Policy=a/b", PUBLISHED),
        (PUBLISHED, PUBLISHED),
        ("dinov3_vits16@nothing", None),
        (f"{PUBLISHED}/else", None),
    ],
)
def test_what_a_source_stands_for(source: str, file: str | None) -> None:
    found = published_file(source, registry())
    assert (found and found.file) == file


@pytest.mark.usefixtures("offline")
def test_published_weights_of_anchors_and_beginnings_are_not_fetched() -> None:
    begin = "init_from={weights='dinov3_vits16', new=['*'], unused=['*']}"
    anchor = "losses.gram={use='gram', anchor={weights='dinov3_vits16'}}"
    task = pretrain(RGB, *SIZES, "augmentation.anchor_size=64", begin, anchor)
    anchors = dict(task.rehearse(1, "h100").sections["parameters"])["anchors"]
    assert anchors.startswith("21,601,152, ")


@pytest.mark.parametrize("recipe", [DISTILL, MULTI])
def test_an_unknown_teacher(recipe: Path) -> None:
    weights = "https://example.com/teacher.pth"
    config = structure_recipe(registry(), compose(recipe, [f"teacher.weights={weights}", RGB]))
    task = registry().build(config, registry=registry())
    with pytest.raises(UserError, match=r"there is no https.* here\n .*a published name"):
        task.rehearse(4, "h100")
