"""Disks that run full, for tests."""

from __future__ import annotations

import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, kind: str) -> Iterator[None]:
    """3 MB of room in ``folder``.

    ``tmpfs`` mounts one where that is permitted; otherwise, and with ``limit``, no file may grow
    beyond 3 MB.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if kind == "tmpfs" and _succeeds(mount):
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)


def with_shared_memory(size: str, command: list[str]) -> list[str]:
    """The command with a /dev/shm of its own, of so many bytes; skips where none can be mounted."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if not _succeeds(["unshare", "-rm", "sh", "-c", mount]):
        pytest.skip("no /dev/shm can be mounted here")
    return ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
