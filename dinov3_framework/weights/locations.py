"""Where weights are: paths, folders of runs, URLs, and published names."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from pathlib import Path

from dinov3_framework.checkpoints.folder import CheckpointFolder, name_of
from dinov3_framework.contracts.layouts import Published, PublishedFile
from dinov3_framework.errors import CheckpointError
from dinov3_framework.weights import sharded
from dinov3_framework.weights._files import OpenWeights, open_weights
from dinov3_framework.weights._recognition import Catalog
from dinov3_framework.weights.downloads import check_digest, fetch_weights, is_url

EXPORT = "exports/teacher_backbone.safetensors"  # below a run's folder
TUNED = "exports/backbone.safetensors"  # of a run that trained it with a head
HEAD = "exports/head.safetensors"
_EXPORTS = {"backbone": (EXPORT, TUNED), "head": (HEAD,)}  # by kind
RECIPE = "recipe.toml"
_HUB_MODEL = re.compile(r"(hf[-_]hub:|hf://)?([\w.-]+/([\w.-]+))")
_FILES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".tar", ".onnx")


def exists(source: str | Path, catalog: Catalog) -> bool:
    """Whether ``source`` is at least a path that is there, a URL, or a published name."""
    text = str(source)
    if Path(text).expanduser().exists() or is_url(text) or _downloaded(text) is not None:
        return True
    return text.partition("@")[0] in catalog.published or _run_and_step(text) is not None


def missing_hint(source: str | Path, catalog: Catalog, kind: str = "backbone") -> str:
    """What may be meant by a source that is neither a path that is there nor published."""
    known = sorted(n for n, published in catalog.published.items() if published.kind == kind)
    return _hub_hint(str(source)) or f"published names: {', '.join(known) or 'none'}"


def _hub_hint(text: str) -> str:
    """How to get at a model of the Hugging Face hub; "" for what cannot be the name of one."""
    model = _HUB_MODEL.fullmatch(text)
    if model and (model[1] or not (text.endswith(_FILES) or Path(text).parent.is_dir())):
        return (
            "it looks like a model on the Hugging Face hub, which is to be downloaded first: "
            f"hf download {model[2]} --local-dir {model[3]}, then give {model[3]}"
        )
    return ""


def _run_and_step(text: str) -> tuple[Path, int] | None:
    """A run's folder, or that of its checkpoints, and the step in ``runs/x@12000``."""
    folder, _, step = text.rpartition("@")
    path = Path(folder).expanduser()
    return (path, int(step)) if folder and step.isdecimal() and path.is_dir() else None


def _step_of_run(text: str) -> Path | None:
    """The checkpoint of one step; ``CheckpointError`` where a run has others."""
    found = _run_and_step(text)
    if found is None:
        return None
    path, step = found
    folder = sharded.checkpoint_in(path)
    steps = [] if folder is None else CheckpointFolder(folder).complete_steps()
    if folder is not None and step in steps:
        return folder / name_of(step)
    known = ", ".join(map(str, steps)) or "none"
    raise CheckpointError(f"{path} has no checkpoint of step {step}; it has {known}")


def _downloaded(text: str) -> Path | None:
    """Where ``hf download`` keeps a model of the Hugging Face hub, if it is on this machine."""
    model = _HUB_MODEL.fullmatch(text)
    if model is None:
        return None
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    folder = cache / f"models--{model[2].replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    return snapshot if snapshot.is_dir() else None


def find_path(source: str | Path, catalog: Catalog, kind: str = "backbone") -> Path:
    """The file or folder that is meant, downloaded if need be.

    Raises ``CheckpointError`` for what is neither there nor published, as is what is published of
    another kind.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if is_url(text):
        return fetch_weights(text)
    if (step := _step_of_run(text)) is not None:
        return step
    if (snapshot := _downloaded(text)) is not None:
        return snapshot
    name, _, training_set = text.partition("@")
    if name not in catalog.published:
        raise CheckpointError(
            f"there is no file {text}, nor are weights published under this name; "
            f"{missing_hint(text, catalog, kind)}"
        )
    published = catalog.published[name]
    if published.kind != kind:
        raise CheckpointError(f"{name} is a published {published.kind}, not a {kind}")
    if published.file(training_set) is None:
        raise CheckpointError(
            f"{name} is not published with weights of {training_set!r}; known: "
            f"{', '.join(published.files)}"
        )
    return local_file(published, training_set or None)


def published_file(source: str, catalog: Catalog) -> PublishedFile | None:
    """The published file that a name, or a path or URL that ends in the file's name, stands for."""
    name, _, training_set = source.partition("@")
    if name in catalog.published:
        return catalog.published[name].file(training_set)
    last = source.partition("?")[0].rpartition("/")[2]
    files = (file for each in catalog.published.values() for file in each.files.values())
    return next((file for file in files if file.file == last), None)


def local_file(
    published: Published, weights: str | Path | None = None, *, check_hash: bool = False
) -> Path:
    """The file of published weights on this machine, downloaded if need be.

    ``weights`` is the name of a training set, a path or a URL.
    """
    text = "" if weights is None else str(weights)
    if (file := published.file(text)) is not None:
        url = published.url(file)
        return fetch_weights(url, check_hash=file.digest if check_hash else None)
    if is_url(text):
        return fetch_weights(text, check_hash=_digits(text.partition("?")[0], check_hash))
    path = Path(text).expanduser()
    if not path.exists():
        sets = ", ".join(published.files)
        hint = f"weights is a path, a URL or the name of a training set ({sets})"
        raise CheckpointError(
            f"{published.name}: there is no file {text}; {_hub_hint(text) or hint}"
        )
    if digits := _digits(path.name, check_hash):
        check_digest(path, digits)
    return path


def _digits(name: str, wanted: bool) -> str | None:
    """The beginning of a SHA-256 in a file's name (``-08c60483.pth``), if it is to be compared."""
    if not wanted:
        return None
    if (found := re.search(r"-([0-9a-f]{8,64})\.\w+$", name)) is None:
        raise CheckpointError(
            f"{name} has no hash in its name to compare with, as in -08c60483.pth; leave "
            "check_hash out"
        )
    return found[1]


def open_path(
    path: Path, stack: ExitStack, *, kind: str, network: str, projectors: bool, thorough: bool
) -> OpenWeights:
    """Open a file or folder of any format, a run's folder or a checkpoint, until ``stack`` closes.

    A run's folder stands for its export, or for its newest sound checkpoint where there is no
    export, or not of this ``network``, or where ``projectors`` are wanted.
    """
    if path.is_dir():
        checkpoints = sharded.checkpoint_in(path)
        exports = [path / name for name in _EXPORTS[kind] if (path / name).exists()]
        kept = projectors and checkpoints is not None
        if exports and network == "teacher" and not kept:
            # Of a run that is only expected the export is a folder, too.
            return open_path(
                exports[0],
                stack,
                kind=kind,
                network=network,
                projectors=projectors,
                thorough=thorough,
            )
        if sharded.is_checkpoint(path):
            return sharded.open_checkpoint(path, kind, thorough)
        if checkpoints is not None:
            return sharded.open_newest(checkpoints, kind, thorough)
        if (newest := sharded.numbered_in(path)) is not None:
            return sharded.open_checkpoint(newest, kind, thorough)
    return stack.enter_context(open_weights(path))
