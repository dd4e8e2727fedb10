"""Processes that start at once: forks of one process that has imported everything.

To import torch and this project takes seconds, to fork takes none. A fork is a process of its own,
with its own signals, environment, exit code and group; only its command line is the server's.
Started as a program, this file is the server.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from dinov3_framework.runtime.stopping import LAUNCHER

ADDRESS = "DINOV3_TESTS_FORK_SERVER"  # in the environment of its children, who may fork others
# Packages of which everything is imported; what needs optional libraries is left to who uses it.
PACKAGES = (
    "dinov3_framework",
    *(f"dinov3_{name}" for name in ("convnext", "crops", "datasets", "launchers", "losses")),
    *(f"dinov3_{name}" for name in ("optimizers", "ssl", "vit")),
)


# --------------------------------------------------------------------------- clients
class Forked:
    """A process of the server, with some of what ``subprocess.Popen`` has."""

    def __init__(
        self,
        what: Mapping[str, Any],
        *,
        env: Mapping[str, str],
        stdout: Any = None,
        stderr: Any = None,
        start_new_session: bool = False,
        cwd: str | Path | None = None,
    ) -> None:
        self.returncode: int | None = None
        folder = os.path.abspath(cwd or os.getcwd())
        request = {**what, "env": dict(env), "cwd": folder, "session": start_new_session}
        payload = pickle.dumps((sys.path, pickle.dumps(request)))
        streams = [
            default if given is None else given.fileno()
            for given, default in ((stdout, 1), (stderr, 2))
        ]
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.environ.get(ADDRESS) or address())
        socket.send_fds(self._socket, [struct.pack("q", len(payload))], streams)
        self._socket.sendall(payload)
        self.pid = self._number()
        assert self.pid is not None

    def _number(self) -> int | None:
        """The server's next answer; None if it has ended."""
        found = b""
        while len(found) < 8:
            more = self._socket.recv(8 - len(found))
            if not more:
                return None
            found += more
        return int(struct.unpack("q", found)[0])

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(["a forked process"], timeout or 0)
        return self.returncode  # type: ignore[return-value]

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._socket], [], [], timeout)[0]:
            code = self._number()
            self.returncode = -signal.SIGKILL if code is None else code
            self._socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)  # type: ignore[arg-type]

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def popen(args: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> Any:
    """As ``subprocess.Popen``, by a fork where that is possible: ``python -m dinov3_framework``."""
    env = os.environ if env is None else env
    if list(args[:3]) == [sys.executable, "-m", "dinov3_framework"]:
        env = {k: v for k, v in env.items() if k != LAUNCHER}  # its parent is the server
        return Forked({"arguments": list(args[3:])}, env=env, **options)
    return subprocess.Popen(args, env=env, **options)


def call_in_processes(
    count: int, folder: Path, function: Callable[..., Any], *args: Any, timeout: float = 300
) -> list[Any]:
    """What ``function(rank, *args)`` gives on each of some processes; fails if any of them does."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"result_{rank}" for rank in range(count)]
    processes = [
        Forked(
            {"function": function, "args": (rank, *args), "result": str(result)},
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count)},
        )
        for rank, result in enumerate(results)
    ]
    deadline = time.monotonic() + timeout
    try:
        while (codes := [process.poll() for process in processes]).count(0) < count:
            if any(codes) or time.monotonic() > deadline:
                time.sleep(1)  # what the others have to say of it
                raise AssertionError(f"processes ended with {codes}; see what they printed")
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
    return [pickle.loads(result.read_bytes()) for result in results]


@cache
def address() -> str:
    """Start the server of this process; where it listens."""
    path = str(Path(tempfile.mkdtemp(prefix="fork-")) / "server")
    subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE)  # ends with its stdin
    deadline = time.monotonic() + 120
    while not os.path.exists(path):
        assert time.monotonic() < deadline, "the fork server did not start"
        time.sleep(0.02)
    return path


# --------------------------------------------------------------------------- children
def run_child(request: Mapping[str, Any], server: str) -> int:
    """Do what was asked for in the new process; its exit code."""
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"], **{ADDRESS: server})
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    importlib.invalidate_caches()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    try:
        if "arguments" in request:
            _fork_ranks()
            sys.argv = ["dinov3_framework", *request["arguments"]]
            runpy.run_module("dinov3_framework", run_name="__main__", alter_sys=True)
        else:
            found = request["function"](*request["args"])
            Path(request["result"]).write_bytes(pickle.dumps(found))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _fork_ranks() -> None:
    """Let torchrun's agent in this process start ranks as forks, too."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = popen  # type: ignore[misc,assignment]


def _child(connection: socket.socket, payload: bytes, streams: list[int], server: str) -> NoReturn:
    code = 1
    try:
        for target, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
            os.dup2(stream, target)
            os.close(stream)
        connection.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path[:], request = pickle.loads(payload)
        code = run_child(pickle.loads(request), server)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


# --------------------------------------------------------------------------- the server
def serve(path: str) -> None:
    """Answer requests until stdin ends."""
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.new")
    listening.listen(64)
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(woken.fileno())
    os.rename(f"{path}.new", path)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([0, listening, wake], [], [])
        if wake in ready:
            wake.recv(4096)
            _report_ends(running)
        if listening in ready:
            connection, _ = listening.accept()
            header, streams, _, _ = socket.recv_fds(connection, 8, 2)
            payload = _received(connection, struct.unpack("q", header)[0])
            pid = os.fork()
            if pid == 0:
                listening.close()
                _child(connection, payload, streams, path)
            for stream in streams:
                os.close(stream)
            running[pid] = connection
            connection.sendall(struct.pack("q", pid))
        if 0 in ready and not os.read(0, 1):
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(Path(path).parent)
            return


def _received(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += connection.recv(size - len(found))
    return found


def _report_ends(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        connection = running.pop(pid)
        with suppress(OSError):  # nobody waits for it any more
            connection.sendall(struct.pack("q", os.waitstatus_to_exitcode(status)))
        connection.close()


if __name__ == "__main__":
    serve(sys.argv[1])
