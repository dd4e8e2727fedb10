"""Download weights into torch.hub's cache: whole and checked, or not at all."""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch.hub

from dinov3_framework.errors import CheckpointError
from dinov3_framework.runtime.durable import NO_ROOM, written_aside
from dinov3_framework.weights import _file_diagnosis as diagnosis

_LICENSE = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
_COLLECTION = "https://huggingface.co/collections/facebook/dinov3-68924841bd6b561778e31009"
_ELSEWHERE = "make room, or set TORCH_HOME to a folder on another disk"
_QUIET = 60.0  # seconds without a byte after which the server is given up


def is_url(text: str) -> bool:
    """Whether ``text`` names something that :func:`fetch_weights` can get."""
    return re.match(r"(https?|file)://", text, re.IGNORECASE) is not None


def fetch_weights(url: str, *, check_hash: str | None = None, cache: Path | None = None) -> Path:
    """The file at ``url``, downloaded unless it was before.

    It lies in ``cache``, which is torch.hub's own if left out (``TORCH_HOME`` moves it), under its
    name on the server; a ``file://`` URL stays where it is. ``check_hash``, hex digits that its
    SHA-256 must begin with, is compared with a file that was there already too. Raises
    ``CheckpointError`` for whatever goes wrong; then no part of the file is left behind.
    """
    path, local = _place(url, cache)
    if not local and not path.is_file():
        _download(url, path, check_hash and check_hash.lower())
    elif check_hash is not None:
        check_digest(path, check_hash)
    elif not path.is_file():
        raise CheckpointError(diagnosis.missing(path))
    return path


def check_digest(path: Path, digits: str) -> None:
    """Raise ``CheckpointError`` unless the SHA-256 of a file begins with these hex digits."""
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()[: len(digits)]
    except FileNotFoundError:
        raise CheckpointError(diagnosis.missing(path)) from None
    except OSError as error:
        raise diagnosis.unreadable(path, error) from error
    if found != digits.lower():
        raise CheckpointError(
            f"{path}: its SHA-256 begins with {found} instead of {digits.lower()}: it is damaged, "
            "or not the file it is called\ndelete it and download it again"
        )


def _place(url: str, cache: Path | None) -> tuple[Path, bool]:
    """Where the file lies or will lie, and whether the URL names a file of this machine."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise CheckpointError(f"{_shown(url)!r} is not a valid address: {error}") from error
    path = Path(unquote(parts.path))
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return path, True
    name = unquote(parts.path).rpartition("/")[2]
    if not is_url(url):
        fault = "is no address of weights: it must begin with https://, http:// or file://"
    elif parts.scheme == "file":
        fault = f"names the host {parts.netloc!r}; for this machine: file:///folder/weights.pth"
    elif name.startswith(".") or name == "" or set(name) & set("\\\0"):
        fault = "names no file: it must end in the name of one"
    else:
        folder = Path(torch.hub.get_dir()) / "checkpoints" if cache is None else Path(cache)
        return folder / name, False
    raise CheckpointError(f"{_shown(url)} {fault}")


def _shown(url: str) -> str:
    """A URL without its query, which may be a signature that is nobody else's business."""
    return url.partition("?")[0]


def _download(url: str, path: Path, digits: str | None) -> None:
    with _errors(url, path):
        size = _ask(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size is not None and size > free:
            raise _failed(url, f"it has {size:,} bytes, {path.parent} {free:,} free", _ELSEWHERE)
        with written_aside(path) as aside:
            progress = sys.stderr.isatty()
            torch.hub.download_url_to_file(url, str(aside), hash_prefix=digits, progress=progress)
            received = aside.stat().st_size
            if size not in (None, received):
                what = f"the connection ended after {received:,} of {size:,} bytes"
                raise _failed(url, what, "try again")


def _ask(url: str) -> int | None:
    """The size of the file, if the server tells; raises where it answers with something else."""
    request = urllib.request.Request(url, headers={"User-Agent": "dinov3-framework"})
    with urllib.request.urlopen(request) as answer:
        first = answer.read(512)
        what = diagnosis.web_answer(first)
        if what is None and answer.headers.get_content_type() == "text/html":
            what = diagnosis.WEB_PAGE
        if what == diagnosis.JSON_TEXT:  # the server's own words
            what += f": {' '.join(first[:80].decode(errors='replace').split())!r}"
        if what or not first:
            raise _failed(url, f"the server gave {what or 'an empty file'}", _access(url))
        length = answer.headers["Content-Length"]
        return int(length) if length is not None and length.isdecimal() else None


@contextmanager
def _errors(url: str, path: Path) -> Iterator[None]:
    """Say what went wrong, and what to do about it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_QUIET)  # torch.hub would wait for a silent server without end
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:  # an answer too, and so to be closed
            gated = error.code in (401, 403)
            advice = _access(url) if gated else "check the address, or try again later"
            raise _failed(url, f"the server answers {error.code} {error.reason}", advice) from error
    except urllib.error.URLError as error:
        raise _unreachable(url, error.reason) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _unreachable(url, error) from error
    except RuntimeError as error:  # of torch.hub, for another hash
        raise _failed(url, str(error), "try again, or ask those who offer the file") from error
    except OSError as error:
        what = "the disk is full" if error.errno in NO_ROOM else f"{path} cannot be written"
        raise _failed(url, f"{what} ({error.strerror})", _ELSEWHERE) from error
    finally:
        socket.setdefaulttimeout(before)


def _failed(url: str, what: str, advice: str) -> CheckpointError:
    return CheckpointError(f"{_shown(url)} was not downloaded: {what}; nothing was kept\n{advice}")


def _unreachable(url: str, reason: object) -> CheckpointError:
    host = urlsplit(url).hostname
    what, advice = f"{host} cannot be reached ({reason})", "try again"
    if isinstance(reason, TimeoutError):
        what = f"{host} sent nothing for {_QUIET:g} seconds"
    elif isinstance(reason, ssl.SSLError):
        advice = "install the certificates that your network needs (SSL_CERT_FILE)"
    else:
        advice += "; this machine may be offline or behind a proxy (HTTPS_PROXY)"
    elsewhere = "download the file elsewhere, copy it here and give its path"
    return _failed(url, what, f"{advice}, or {elsewhere}")


def _access(url: str) -> str:
    """How to get at a file that is not offered to everybody."""
    parts = urlsplit(url)
    if (parts.hostname or "").endswith("huggingface.co"):
        return (
            "accept the license on the model's page, log in (hf auth login), download the model "
            "(hf download) and give the path of its folder"
        )
    if "dinov3" not in url:
        return "download it with what grants you access, and give its local path"
    cut = "Policy=" in parts.query and "Signature=" not in parts.query
    fault = "; this one was cut at its first &" if cut else " and expire"
    return (
        f"the published weights are gated: accept their license at {_LICENSE}, and links come by "
        f"e-mail; they are signed{fault}\nthen: wget -O {Path(parts.path).name} '<link>' (quoted, "
        f"since it contains &), and give the path; or the folder of a model from {_COLLECTION}"
    )
