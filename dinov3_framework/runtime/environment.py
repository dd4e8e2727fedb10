"""``environment.json`` of a run's folder: with what each start of it computed, and where."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dinov3_framework import __version__
from dinov3_framework.registry import Registry
from dinov3_framework.runtime.durable import parse_json, read_file
from dinov3_framework.runtime.output import write_aside

ENVIRONMENT = "environment.json"


@cache
def software() -> str:
    """This framework, with the commit if it is a checkout, and torch, by version."""
    found = _commit()
    return f"dinov3-framework {__version__}{f' ({found})' if found else ''}, torch " + (
        metadata.version("torch")
    )


def _commit() -> str:
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""
    command = ["git", "-C", str(here), "rev-parse", "--short=10", "HEAD"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def made_with(registry: Registry) -> dict[str, str]:
    """What an export records of the software that made it, the same on every machine."""
    plugins = sorted({_version(each) for each in registry.distributions.values()})
    return {"software": software(), "plugins": ", ".join(plugins)}


def note_start(output_dir: Path, registry: Registry) -> None:
    """Add a start to those that ``environment.json`` lists."""
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "software": software(),
        "python": platform.python_version(),
        "plugins": {name: _version(each) for name, each in sorted(registry.distributions.items())},
        "host": socket.gethostname(),
        "command": sys.argv,
    }
    starts = [*starts_of(output_dir), start]
    write_aside(output_dir / ENVIRONMENT, json.dumps({"starts": starts}, indent=1) + "\n")


def keep_with_export(output_dir: Path, export: Path) -> None:
    """Put the start that made an export beside it: host, command line and the rest.

    Not into it: the same weights are the same bytes wherever they were made, and a file that is
    given away says nothing of the machine.
    """
    if starts := starts_of(output_dir)[-1:]:
        text = json.dumps({"starts": starts}, indent=1) + "\n"
        write_aside(export.parent / ENVIRONMENT, text)


def starts_of(output_dir: Path) -> list[dict[str, Any]]:
    """The starts that a folder's ``environment.json`` lists, the last one last."""
    try:
        starts = parse_json(read_file(output_dir / ENVIRONMENT))["starts"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [start for start in starts if isinstance(start, dict)] if type(starts) is list else []


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:  # a file, or a plugin that a program registered
        return distribution
