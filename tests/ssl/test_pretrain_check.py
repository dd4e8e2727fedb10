"""``--check`` of a pretraining recipe finds what would go wrong, and takes nothing for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from run_support import TINY, environment
from torch import nn
from trainer_support import NO_LOSSES, pretrain, tiny_config

from dinov3_framework import ExitCode, Plan, RecipeError
from dinov3_framework.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"


def check(*overrides: str, world: int = 1) -> Plan:
    return pretrain(*overrides).check(world)


def row(report: Plan, section: str, label: str) -> str:
    return dict(report.sections[section])[label]


# --------------------------------------------------------------------------- what it says
def test_a_sound_recipe() -> None:
    report = check()
    assert report.missing == []
    assert {"parameters", "batch", "parallel", "schedule", "data"} <= set(report.sections)
    assert row(report, "batch", "images per step") == "12"
    assert row(report, "batch", "crops per image") == "2 global of 28 px, 2 local of 14 px"
    assert row(report, "data", "images seen") == "72"
    assert row(report, "data", "passes over the data") == "0.0144"
    assert "5,000 images" in row(report, "data", "dataset")
    backbone = pretrain().method.prepare().blueprint.backbone
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert row(report, "parameters", "backbone") == f"{count:,}"


def test_split_and_what_sees_one_pass() -> None:
    report = check("accumulation_steps=3", world=2)
    assert row(report, "batch", "split") == "2 x 3 micro-batches x 2 images"
    assert row(report, "batch", "see one pass at a time") == "dino, ibot, koleo"
    assert "see one pass at a time" not in dict(check().sections["batch"])


def test_schedules_are_shown_scaled() -> None:
    report = check("optimizer.lr=0.001", "optimizer.lr_scaling=linear_wrt_256", "batch_size=512")
    assert row(report, "schedule", "lr") == "0.002"
    assert row(report, "schedule", "lr factor") == "2 (linear_wrt_256)"


# --------------------------------------------------------------------------- what it finds
@pytest.mark.parametrize(
    ("overrides", "world", "where", "words"),
    [
        (["batch_size=10"], 4, "batch_size", "10 images cannot be split over 4 processes"),
        (["batch_size=10", "accumulation_steps=3"], 1, "batch_size", "take 9 or 12"),
        (["batch_size=2"], 4, "batch_size", "take 4"),
        (["iterations=1"], 1, "optimizer.lr", "warmup = 2 iterations, the whole run has 1"),
        (
            ['losses.dino.teacher_temp={use="warmup_cosine", peak=1.0, end=1.0, span=99}'],
            1,
            "losses.dino.teacher_temp",
            "span = 99 iterations, the whole run has 6",
        ),
        (["backbone.in_chans=3"], 1, "backbone.in_chans", "is 3, but images.channels is 1"),
        (["augmentation.global_size=30"], 1, "augmentation.global_size", "try 28 or 35"),
        (["augmentation.local_size=13"], 1, "augmentation.local_size", "try 7 or 14"),
        ([NO_LOSSES], 1, "losses", "no loss: nothing would be learnt"),
        (["augmentation.local_crops=0"], 1, "losses.dino", "needs 'student.local.class'"),
        (["losses.gram.use=gram"], 1, "losses.gram", "crops only"),
        (['losses."a.b".use="koleo"'], 1, "losses.a.b", "a name is made of letters"),
        (["losses.lr.use=koleo"], 1, "losses.lr", "the engine has this name for itself"),
        (["losses.loss.use=koleo"], 1, "losses.loss", "choose another"),
        (["losses.values.use=koleo"], 1, "losses.values", "choose another"),
    ],
)
def test_mistakes(overrides: list[str], world: int, where: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(*overrides, world=world)
    (problem,) = caught.value.problems
    assert problem.where == where
    assert words in str(problem)


def test_mistakes_of_a_kind_come_together() -> None:
    with pytest.raises(RecipeError) as caught:
        check("batch_size=11", "iterations=1", "backbone.in_chans=3", world=2)
    assert [problem.where for problem in caught.value.problems] == [
        "batch_size",
        "optimizer.lr",
        "backbone.in_chans",
    ]


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"parallel\.device: no CUDA device is visible"):
        check("parallel.device=cuda")


# --------------------------------------------------------------------------- what is missing
MISSING = ("dataset.use=image_folder", "dataset.root=no/such/folder")


def test_a_recipe_for_far_more_data_is_said_to_be_one() -> None:
    """Somebody's few photographs under a published recipe."""
    small = pretrain("iterations=5000", "batch_size=16_000").check(1)
    notes = [text for key, text in small.sections["data"] if key == "note"]
    assert "a step shows 16,000 images, the data are 5,000" in notes
    assert any("fewer iterations may do" in text for text in notes)
    assert not [key for key, _ in pretrain().check(1).sections["data"] if key == "note"]


def test_a_dataset_that_is_not_there_is_no_mistake_of_the_recipe() -> None:
    report = check(*MISSING)
    (lack,) = report.missing
    assert "'no/such/folder' does not exist" in lack
    assert "dataset" not in dict(report.sections["data"])
    with pytest.raises(RecipeError):
        check(*MISSING, "batch_size=11", world=2)


def test_the_command_line_warns_in_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(TINY), "--check", *MISSING]) == 2, "so that --check && sbatch is safe"
    shown = capsys.readouterr()
    assert "warning: the recipe is sound, but could not run here as it stands" in shown.out
    assert "- image_folder: root = 'no/such/folder' does not exist" in shown.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("launcher", [(), ("launcher.use=local", "launcher.processes=2")])
def test_the_command_line_refuses_to_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launcher: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(TINY), *MISSING, *launcher]) == 2
    message, advice = capsys.readouterr().err.splitlines()
    assert message == "image_folder: root = 'no/such/folder' does not exist"
    assert "root is the folder of your images" in advice
    assert not list(tmp_path.iterdir())


def test_running_statistics_are_refused_by_name() -> None:
    """Each process has its own, and nobody would update the teacher's."""
    method = pretrain().method
    prepared = method.prepare()
    assert not method.problems(prepared, 0)
    prepared.blueprint.backbone.stem = nn.Sequential(nn.BatchNorm2d(3))
    (problem,) = method.problems(prepared, 0)
    assert problem.where == "backbone"
    assert "running statistics" in problem.message
    assert "stem.0" in problem.message


# --------------------------------------------------------------------------- what it costs
_MEASURE = """
import pathlib, re, sys
from dinov3_framework.cli import main
code = main(sys.argv[1:])
# Not getrusage(): what it says of a new program begins with the peak of the one that started it.
status = pathlib.Path("/proc/self/status").read_text()
print("peak MB", int(re.search(r"VmHWM: *\\t*(.*) kB", status)[1]) // 1024)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_check_of_the_7b_recipe_takes_no_memory(tmp_path: Path) -> None:
    recipe = str(RECIPES / "vit7b_pretrain.toml")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, recipe, "--check"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.WRONG_INPUT, "its data are not here"
    assert "6,716," in done.stdout, "parameters of the backbone"
    assert int(done.stdout.rpartition("peak MB")[2]) < 2000
    assert not list(tmp_path.iterdir())


def test_a_config_is_not_changed_by_its_check() -> None:
    task = pretrain()
    task.check(1)
    assert task.config == tiny_config()
