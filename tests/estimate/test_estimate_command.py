"""``dinov3-run --rehearse``."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_support import TINY

from dinov3_framework.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """What came out, without its columns."""
    return "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())


def test_the_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # More processes than images would do, so that all of it can be seen.
    large = ("batch_size=24", "parallel.param_dtype=bf16")
    assert main([str(TINY), "--rehearse", "--world-size", "12", *large]) == 0
    out = printed(capsys)
    for part in (
        "processes 12, 8 to a machine",
        "images per step 24 = 12 x 1 micro-batches x 2",
        "optimizer state",
        "all_gather of 12",
        "estimated on H100 SXM 80 GB",
        "GPU hours",
        "US dollars",
        "not calibrated on a GPU",
    ):
        assert part in out, part
    assert "what would help" not in out
    assert list(tmp_path.iterdir()) == []


def test_another_accelerator_and_the_launchers_processes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--launcher", "local", "launcher.processes=2", "--accelerator", "b200"]
    assert main([str(TINY), "--rehearse", *arguments]) == 0
    out = printed(capsys)
    assert "processes 2\n" in out
    assert "estimated on B200 SXM 180 GB" in out
    assert "5.50 US dollars an hour" in out


def test_cards_of_desks_have_no_price(capsys: pytest.CaptureFixture[str]) -> None:
    bf16 = ("parallel.param_dtype=bf16", "batch_size=24")
    assert main([str(TINY), "--rehearse", "--accelerator", "t4", *bf16]) == 0
    out = printed(capsys)
    assert "estimated on T4 16 GB" in out
    assert "8 (bf16)" in out, "as slow as fp32"
    assert "GPU hours" in out
    assert "dollars" not in out
    assert "RTX 5090 32 GB" in out.partition("memory needed")[2]


def test_data_weights_and_device_may_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    missing = ("dataset={use='image_folder', root='nowhere'}", "images={}")
    absent = ("parallel.device=cuda", "init_from.weights=nowhere.pth")
    assert main([str(TINY), "--rehearse", *absent, *missing]) == 0
    out = printed(capsys)
    assert "warning: the recipe is sound, but could not run here as it stands" in out
    assert "nowhere" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world-size", "5"], "batch_size: 12 images cannot be split over 5 processes"),
        (["--world-size", "0"], "--world-size 0: there is at least one process"),
        (["--accelerator", "tpu"], "--accelerator tpu: unknown; there are a100, h100"),
        (["backbone.patch_size=9"], "28 is no multiple of the patch size 9"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(TINY), "--rehearse", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_not_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main([str(TINY), "--rehearse"]) == 2
    assert "start it alone, without torchrun" in capsys.readouterr().err


def test_options_that_go_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(TINY), "--check", "--world-size", "4"])
    assert ended.value.code == 2
    assert "go with --rehearse" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["knn.toml", "features.toml"])
def test_only_training_can_be_estimated(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPES / recipe), "--rehearse"]) == 2
    assert "cannot be estimated: only trainings can" in capsys.readouterr().err


@pytest.mark.slow
def test_the_7b_on_256_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPES / "vit7b_pretrain.toml"), "--rehearse", "--world-size", "256"]) == 0
    out = printed(capsys)
    assert "7,028,020,096, of which a process holds 27,479,732" in out
    assert "all_gather of 256 129" in out  # 40 blocks and the rest, 3 times; heads
