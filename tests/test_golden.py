"""Every folder of golden figures, in tests/golden or under $GOLDEN_DIR, against this project.

$GOLDEN_SKIP lists kinds or names of cases to leave out, separated by commas. A case of an unknown
kind is a failure, and so is one with a value that its check does not use.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
from golden_checks import check_case
from golden_support import case_folders, read_case
from golden_train_step import check_train_step

SKIPPED = {name.strip() for name in os.environ.get("GOLDEN_SKIP", "").split(",")}


def skip_if_left_out(folder: Path) -> None:
    if SKIPPED & {folder.name, read_case(folder).kind}:
        pytest.skip(f"{folder.name} is in GOLDEN_SKIP")


@pytest.mark.parametrize("folder", case_folders(), ids=lambda folder: folder.name)
def test_golden(folder: Path) -> None:
    skip_if_left_out(folder)
    check_case(read_case(folder))


@pytest.mark.parametrize("folder", case_folders("train_step"), ids=lambda folder: folder.name)
def test_train_steps_in_chunks(folder: Path) -> None:
    skip_if_left_out(folder)
    check_case(read_case(folder), partial(check_train_step, chunk=3))


def test_there_are_cases() -> None:
    assert case_folders(), "no case.json found; is $GOLDEN_DIR right?"
