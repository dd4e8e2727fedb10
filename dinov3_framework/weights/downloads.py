"""Files of weights from the web, into torch.hub's cache: whole and checked, or not at all."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import secrets
import shutil
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import SplitResult, unquote, urlsplit

import torch.hub

from dinov3_framework.errors import CheckpointError
from dinov3_framework.weights import looks

_BASE = "https://dl.fbaipublicfiles.com/dinov3"
_LICENCE = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
_COLLECTION = "https://huggingface.co/collections/facebook/dinov3-68924841bd6b561778e31009"
_ELSEWHERE = "make room, or set TORCH_HOME to a folder on another disk"
_QUIET = 60.0  # seconds without a byte after which the server is given up
_CHUNK = 1 << 20  # bytes


def is_url(text: str) -> bool:
    """Whether ``text`` names something that :func:`fetch_weights` can get."""
    return re.match(r"(https?|file)://", text, re.IGNORECASE) is not None


def published_url(name: str, file: str) -> str:
    """Where ``file``, of the backbone that torch.hub calls ``name``, lies.

    Without access, that is without a signed link, the server answers 403.
    """
    return f"{_BASE}/{name}/{file}"


def digest_in(name: str) -> str | None:
    """The beginning of a SHA-256 that a file's name carries (``-08c60483.pth``), if it does."""
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    return found[1] if found else None


def check_digest(path: Path, digits: str) -> None:
    """Raise ``CheckpointError`` unless the SHA-256 of a file begins with these hex digits."""
    wanted = _hex(digits)
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError(looks.missing(path)) from None
    except OSError as error:
        raise looks.unreadable(path, error) from error
    if not found.startswith(wanted):
        raise CheckpointError(
            f"{path}: its SHA-256 begins with {found[: len(wanted)]} instead of {wanted}: it is "
            "damaged, or not the file it is called\ndelete it and download it again"
        )


def fetch_weights(url: str, *, check_hash: str | None = None, cache: Path | None = None) -> Path:
    """The file at ``url``, downloaded unless it was before.

    It lies in ``cache``, which is torch.hub's own if left out (``TORCH_HOME`` moves it), under its
    name on the server; a ``file://`` URL stays where it is. ``check_hash``, hex digits that its
    SHA-256 must begin with, is compared with a file that was there already too. Raises
    ``CheckpointError`` for whatever goes wrong; then no part of the file is left behind.
    """
    wanted = None if check_hash is None else _hex(check_hash)
    path = _local(url)
    if path is None:
        folder = Path(torch.hub.get_dir()) / "checkpoints" if cache is None else Path(cache)
        path = folder / _name(url)
        if not path.is_file():
            _download(url, path, wanted)
            return path
    if wanted is not None:
        check_digest(path, wanted)
    elif not path.is_file():
        raise CheckpointError(looks.missing(path))
    return path


# --------------------------------------------------------------------------- names
def _hex(digits: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{1,64}", digits):
        raise CheckpointError(f"{digits!r} is not the beginning of a SHA-256 in hexadecimal digits")
    return digits.lower()


def _local(url: str) -> Path | None:
    """The path of a ``file://`` URL; None for one on the web."""
    if not is_url(url):
        raise CheckpointError(
            f"{_shown(url)!r} is no address that weights are fetched from: it must begin with "
            "https://, http:// or file://"
        )
    parts = _parts(url)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise CheckpointError(
            f"{url!r} names the host {parts.netloc!r}; a path of this machine has three slashes: "
            "file:///folder/weights.pth"
        )
    return Path(unquote(parts.path))


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise CheckpointError(f"{_shown(url)!r} is not a valid address: {error}") from error


def _name(url: str) -> str:
    name = unquote(_parts(url).path).rpartition("/")[2]
    if name in ("", ".", "..") or set(name) & set("\\\0") or name.startswith("."):
        raise CheckpointError(f"{_shown(url)} names no file: it must end in the name of one")
    return name


def _shown(url: str) -> str:
    """A URL without its query, which may be a signature that is nobody else's business."""
    return url.partition("?")[0]


# --------------------------------------------------------------------------- the download
def _download(url: str, path: Path, wanted: str | None) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "dinov3-framework"})
    with _network(url):
        answer = urllib.request.urlopen(request, timeout=_QUIET)
    with answer:
        first = _read(answer, url)
        _require_file(url, answer.headers.get_content_type(), first)
        length = answer.headers["Content-Length"]
        size = int(length) if length is not None and length.isdecimal() else None
        with _disk(path), _written_aside(path, size) as stream:
            found = _receive(url, answer, first, size, stream)
            if wanted is not None and not found.startswith(wanted):
                raise CheckpointError(
                    f"{_shown(url)}: the SHA-256 of what came begins with {found[: len(wanted)]} "
                    f"instead of {wanted}; nothing was kept\n"
                    "try again, or ask those who offer the file"
                )


def _receive(url: str, answer: IO[bytes], first: bytes, size: int | None, stream: IO[bytes]) -> str:
    """Write what comes to ``stream``; the SHA-256 of all of it."""
    digest = hashlib.sha256()
    received = 0
    chunk = first
    quiet = not sys.stderr.isatty()
    with torch.hub.tqdm(
        total=size, desc=_name(url), unit="B", unit_scale=True, disable=quiet
    ) as bar:
        while chunk:
            stream.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            bar.update(len(chunk))
            chunk = _read(answer, url)
    if size is not None and received != size:
        raise CheckpointError(
            f"{_shown(url)}: the connection ended after {received:,} of {size:,} bytes; nothing "
            "was kept\ntry again"
        )
    return digest.hexdigest()


def _read(answer: IO[bytes], url: str) -> bytes:
    with _network(url):
        return answer.read(_CHUNK)


@contextmanager
def _written_aside(path: Path, size: int | None) -> Iterator[IO[bytes]]:
    """A stream to a file that becomes ``path`` at the end, and vanishes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size is not None and size > free:
        raise CheckpointError(
            f"{path.name} does not fit into {path.parent}: it has {size:,} bytes, {free:,} are "
            f"free\n{_ELSEWHERE}"
        )
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with aside.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# --------------------------------------------------------------------------- what goes wrong
@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "the disk is full" if full else "it cannot be written"
        raise CheckpointError(
            f"{path} was not downloaded: {what} ({error.strerror}); nothing was kept\n{_ELSEWHERE}"
        ) from error


@contextmanager
def _network(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:  # an answer too, and so to be closed
            raise CheckpointError(_refused(url, error.code, str(error.reason))) from error
    except urllib.error.URLError as error:
        raise CheckpointError(_unreachable(url, error.reason)) from error
    except (http.client.HTTPException, OSError) as error:
        raise CheckpointError(_unreachable(url, error)) from error


def _require_file(url: str, content_type: str, first: bytes) -> None:
    """Raise where the server gave a page to read, which many do instead of an error."""
    what = looks.web_answer(first[:512])
    if what is None and content_type == "text/html":
        what = "a web page, so the download gave an error or a login page"
    if what is None and not first:
        what = "nothing, an empty file"
    if what is not None:
        raise CheckpointError(f"{_shown(url)} gave {what}; nothing was kept\n{_access(url)}")


def _refused(url: str, code: int, reason: str) -> str:
    text = f"{_shown(url)} cannot be downloaded: the server answers {code} {reason}"
    if code in (401, 403):
        return f"{text}\n{_access(url)}"
    if code in (404, 410):
        return f"{text}\nthere is no such file; compare the address with where you have it from"
    return f"{text}\ntry again later"


def _unreachable(url: str, reason: object) -> str:
    host = _parts(url).hostname
    if isinstance(reason, ssl.SSLError):
        fault = f"{host} cannot be reached safely ({reason.reason or reason})"
        advice = "install the certificates that your network needs (SSL_CERT_FILE)"
    elif isinstance(reason, TimeoutError):
        fault = f"{host} sent nothing for {_QUIET:g} seconds"
        advice = "try again"
    elif isinstance(reason, socket.gaierror):
        fault = f"there is no way to the host {host} ({reason.strerror})"
        advice = "this machine may be offline or behind a proxy (HTTPS_PROXY)"
    else:
        fault = f"{host} cannot be reached ({reason})"
        advice = "try again; this machine may be offline or behind a proxy (HTTPS_PROXY)"
    return (
        f"{_shown(url)} was not downloaded: {fault}; nothing was kept\n{advice}, or download the "
        "file elsewhere, copy it here and give its path"
    )


def _access(url: str) -> str:
    """How to get at a file that is not offered to everybody."""
    parts = _parts(url)
    file = _name(url)
    if (parts.hostname or "").endswith("huggingface.co"):
        return (
            "accept the licence on the model's page, log in (hf auth login), download the model "
            "(hf download) and give the path of its folder"
        )
    if "dinov3" not in url:
        return "download it with what grants you access, and give its local path"
    cut = "Policy=" in parts.query and "Signature=" not in parts.query
    fault = "; this one was cut at its first &" if cut else " and expire"
    return (
        f"the published weights are gated: accept their licence at {_LICENCE}, and links come by "
        f"e-mail; they are signed{fault}\n"
        f"then: wget -O {file} '<link>' (quoted, since it contains &), and give the path; or the "
        f"folder of a model from {_COLLECTION}"
    )
