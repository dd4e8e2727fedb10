"""Downloads are whole and checked or not there, and say what went wrong; from a server of ours."""

from __future__ import annotations

import hashlib
import resource
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3_framework import Published, PublishedFile
from dinov3_framework.errors import CheckpointError
from dinov3_framework.weights import downloads
from dinov3_framework.weights.downloads import check_digest, fetch_weights, is_url

CONTENT = bytes(range(256)) * 9000  # more than one piece
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HTML = b"<!DOCTYPE html><title>Log in to go on</title>"


class Handler(BaseHTTPRequestHandler):
    """Answers by the last folder of the path: ``/<answer>/<file>``."""

    asked: list[str]

    def do_GET(self) -> None:
        answer = self.path.split("/")[-2]
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if answer.isdecimal():
            self.send_error(int(answer))
            return
        if answer == "moved":
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved/", "/whole/"))
            self.end_headers()
            return
        body = {"html": HTML, "empty": b"", "json": b'{"error": "expired"}'}.get(answer, CONTENT)
        self.send_response(200)
        if answer != "unsized":
            size = {"truncated": len(body) + 1000, "huge": 1 << 60}.get(answer, len(body))
            self.send_header("Content-Length", str(size))
        if answer == "html":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        if answer == "silent":
            self.server.released.wait(20)  # type: ignore[attr-defined]
            return
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.released = threading.Event()

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up early is what some tests are about."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def failure(url: str, cache: Path, **options: Any) -> str:
    """What is said of a download that fails, and leaves nothing behind."""
    with pytest.raises(CheckpointError) as caught:
        fetch_weights(url, cache=cache, **options)
    assert not cache.exists() or list(cache.iterdir()) == []
    text = str(caught.value)
    assert len(text.splitlines()) <= 3
    return text


@pytest.mark.parametrize("answer", ["whole", "unsized", "moved"])
def test_a_file_is_fetched_once(tmp_path: Path, server: Server, answer: str) -> None:
    url = server.url(f"{answer}/x-{SHA256[:8]}.pth?Policy=a&Signature=b")
    path = fetch_weights(url, check_hash=SHA256[:8].upper(), cache=tmp_path / "new" / "cache")
    assert path == tmp_path / "new" / "cache" / f"x-{SHA256[:8]}.pth"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    asked = len(server.asked)
    assert fetch_weights(url, check_hash=SHA256[:8], cache=path.parent) == path
    assert len(server.asked) == asked


def test_the_cache_is_that_of_torch_hub(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = fetch_weights(server.url("whole/x.pth"))
    assert path == tmp_path / "hub" / "checkpoints" / "x.pth"


def test_a_cached_file_is_checked_too(tmp_path: Path, server: Server) -> None:
    (tmp_path / "x.pth").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"x\.pth: its SHA-256 begins with .*\ndelete it"):
        fetch_weights(server.url("whole/x.pth"), check_hash=SHA256[:8], cache=tmp_path)
    assert (tmp_path / "x.pth").read_bytes() == b"something else"
    assert server.asked == []


def test_a_wrong_digest(tmp_path: Path, server: Server) -> None:
    text = failure(server.url("whole/x.pth"), tmp_path, check_hash="01234567")
    assert "01234567" in text
    assert SHA256[:8] in text


def test_a_connection_that_ends_early(tmp_path: Path, server: Server) -> None:
    text = failure(server.url("truncated/x.pth"), tmp_path)
    assert f"ended after {len(CONTENT):,} of {len(CONTENT) + 1000:,} bytes" in text


def test_a_server_that_falls_silent(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_QUIET", 0.2)
    text = failure(server.url("silent/x.pth"), tmp_path)
    assert "127.0.0.1 sent nothing for 0.2 seconds" in text


@pytest.mark.parametrize("code", [401, 403])
def test_weights_that_are_gated(tmp_path: Path, server: Server, code: int) -> None:
    file = "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    text = failure(server.url(f"dinov3_vits16/{code}/{file}?Policy=secret&Signature=x"), tmp_path)
    assert f"the server answers {code}" in text
    assert "accept their license at https://ai.meta.com/" in text
    assert "signed and expire" in text
    assert f"wget -O {file} '<link>'" in text
    assert "secret" not in text
    cut = failure(server.url(f"dinov3_vits16/{code}/{file}?Policy=secret"), tmp_path)
    assert "signed; this one was cut at its first &" in cut


def test_other_refusals(tmp_path: Path, server: Server) -> None:
    assert "with what grants you access" in failure(server.url("403/x.pth"), tmp_path)
    assert "404 Not Found" in failure(server.url("404/x.pth"), tmp_path)
    assert "503" in failure(server.url("503/x.pth"), tmp_path)


@pytest.mark.parametrize(
    ("answer", "message"),
    [("html", "a web page"), ("json", "expired"), ("empty", "an empty file")],
)
def test_answers_that_are_no_files(
    tmp_path: Path, server: Server, answer: str, message: str
) -> None:
    assert message in failure(server.url(f"{answer}/x.pth"), tmp_path)


def test_hosts_that_cannot_be_reached(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("whole/x.pth")
    server.socket.close()
    assert "127.0.0.1 cannot be reached" in failure(url, tmp_path)

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    text = failure("https://weights.invalid/dinov3.pth", tmp_path)
    assert "weights.invalid cannot be reached" in text
    assert "Name or service not known" in text
    assert "may be offline" in text


def test_a_file_larger_than_the_disk(tmp_path: Path, server: Server) -> None:
    text = failure(server.url("huge/x.pth"), tmp_path)
    assert f"it has {1 << 60:,} bytes" in text
    assert "TORCH_HOME" in text


def test_a_disk_that_runs_full(tmp_path: Path, server: Server) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        text = failure(server.url("whole/x.pth"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the disk is full" in text


def test_a_cache_that_cannot_be_written(tmp_path: Path, server: Server) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        fetch_weights(server.url("whole/x.pth"), cache=tmp_path / "cache" / "inner")


# --------------------------------------------------------------------------- addresses
def test_local_files_stay_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "my weights.pth"
    path.write_bytes(CONTENT)
    cache = tmp_path / "cache"
    assert fetch_weights(path.as_uri(), check_hash=SHA256[:8], cache=cache) == path
    assert not cache.exists()
    with pytest.raises(CheckpointError, match="SHA-256 begins with"):
        fetch_weights(path.as_uri(), check_hash="01234567")
    with pytest.raises(CheckpointError, match="there is no file"):
        fetch_weights((tmp_path / "absent.pth").as_uri())
    with pytest.raises(CheckpointError, match="names the host 'elsewhere'"):
        fetch_weights("file://elsewhere/x.pth")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x.pth", "must begin with https://"),
        ("s3://bucket/x.pth", "must begin with https://"),
        ("/folder/x.pth", "must begin with https://"),
        ("https://host/", "names no file"),
        ("https://host/a/..?x=y", "names no file"),
        ("https://host/%2e%2e%5cx.pth", "names no file"),
        ("https://[host/x.pth", "not a valid address"),
    ],
)
def test_addresses_that_are_none(tmp_path: Path, url: str, message: str) -> None:
    assert message in failure(url, tmp_path / "cache")


def test_is_url() -> None:
    assert all(map(is_url, ("https://h/x", "HTTP://h/x", "file:///x")))
    assert not any(map(is_url, ("x.pth", "/x", "C:/x", "httpsx", "s3://b/x", "LVD1689M")))


def test_where_published_files_lie() -> None:
    name = "dinov3_convnext_tiny_pretrain_lvd1689m-21b726bb.pth"
    usual = PublishedFile(name, config=None)
    elsewhere = PublishedFile(name, config=None, url=f"https://elsewhere/{name}")
    published = Published("dinov3_convnext_tiny", {"LVD1689M": usual, "OTHER": elsewhere})
    assert published.url(usual) == (
        f"https://dl.fbaipublicfiles.com/dinov3/dinov3_convnext_tiny/{name}"
    )
    assert published.url(elsewhere) == f"https://elsewhere/{name}"


def test_digests(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(CONTENT)
    check_digest(path, SHA256)
    check_digest(path, SHA256[:8])
    with pytest.raises(CheckpointError, match="instead of 01234567"):
        check_digest(path, "01234567")
    with pytest.raises(CheckpointError, match="there is no file"):
        check_digest(tmp_path / "absent.pth", "01234567")
