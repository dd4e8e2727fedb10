"""Features that were extracted before: in memory, and in a folder that runs share.

In the folder all that is known of the same images has a folder, named by a hash of what decides on
it: the weights, the data with the state of their files, how images are seen, and the dtype that was
computed in. In it each extraction has one, by what tokens it gave. A process writes its share; any
number of processes reads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from dinov3_framework.contracts.data import Dataset
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import UserError
from dinov3_framework.parallel.state_dicts import weights_hash
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import RankFailure, broadcast_from_rank0, run_on_all_ranks
from dinov3_framework.runtime.durable import parse_json, read_file, sync, write_and_sync

if TYPE_CHECKING:
    from dinov3_framework.data.features import Features

log = logging.getLogger(__name__)

_CONTENT = "features.json"  # written last
_TOKENS = "tokens."  # what names of tokens begin with in files


class FeatureCache:
    """Keeps features for as long as it lives; with a ``folder`` for later runs, too.

    Its weights must not change while it lives.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        # What costs nothing besides memory, and spares a later run the backbone.
        self.also: Sequence[str] = () if folder is None else ("class", "mean_patch")
        self._known: dict[tuple[int, int, str], list[Features]] = {}
        self._hashes: dict[int, str] = {}
        self._alive: list[Any] = []

    def features(
        self,
        backbone: Backbone,
        dataset: Dataset,
        seen: Mapping[str, Any],
        wanted: Sequence[str],
        extract: Callable[[], Features],
    ) -> Features:
        """This process's share, with at least the tokens ``wanted``.

        ``seen`` is how images are seen. To be called by every process.
        """
        content = broadcast_from_rank0(_content, dataset, seen)
        # Without a version it is this very object, which is kept so that nothing else has its id.
        which = 0 if content["data"] is not None else id(dataset)
        known = self._known.setdefault((id(backbone), which, _digest(content)), [])
        found = next((each for each in known if each.tokens.keys() >= set(wanted)), None)
        if found is None:
            found = self._kept(backbone, content, wanted, extract)
            known.append(found)
            self._alive += [backbone, dataset]
        return found

    def _kept(
        self,
        backbone: Backbone,
        content: Mapping[str, Any],
        wanted: Sequence[str],
        extract: Callable[[], Features],
    ) -> Features:
        """Read from the folder, or extracted and written there."""
        if self.folder is None or content["data"] is None:
            return extract()
        if id(backbone) not in self._hashes:
            self._hashes[id(backbone)] = weights_hash(backbone)
        content = {"weights": self._hashes[id(backbone)], **content}
        place = self.folder.expanduser() / _digest(content)
        part = broadcast_from_rank0(_find, place, wanted)
        if part is not None:
            found: Features | None = _on_all_ranks(_read, part, what="cannot read")
            if found is not None:
                if collectives.is_main():
                    log.info("Features of %s: from %s", content["data"], part)
                return found
        share = extract()
        part = place / _digest({"tokens": sorted(share.tokens)})
        _on_all_ranks(_write, part, share, content, _mark(), what="cannot keep")
        return share


def _content(dataset: Dataset, seen: Mapping[str, Any]) -> dict[str, Any]:
    """What decides on features besides the weights, as JSON holds it."""
    cls = type(dataset)
    return {
        "dataset": f"{cls.__module__}.{cls.__qualname__}",
        "data": dataset.version(),
        "targets": {name: str(attrs.asdict(each)) for name, each in dataset.targets.items()},
        "seen": {name: str(value) for name, value in seen.items()},
    }


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _mark() -> str:
    """A random name, the same on all processes."""
    return str(collectives.all_gather_object(secrets.token_hex(4))[0])


def _on_all_ranks(action: Callable[..., Any], *args: Any, what: str) -> Any:
    """The result of ``action``; None, with a warning, if it fails on any process."""
    try:
        return run_on_all_ranks(action, *args)
    except RankFailure as failure:
        if failure.own is not None and not isinstance(
            failure.own, OSError | ValueError | UserError
        ):
            raise failure.own from failure
        if collectives.is_main():
            paths = [each for each in args if isinstance(each, Path)]
            log.warning("%s features at %s: %s", what, paths[0], failure)
        return None


# --------------------------------------------------------------------------- files
def _write(place: Path, share: Features, content: Mapping[str, Any], mark: str) -> None:
    from safetensors.torch import save_file

    aside = place.with_name(f".{place.name}.{mark}")
    part = aside / f"{collectives.rank():05}.safetensors"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        tensors = {_TOKENS + name: each.contiguous() for name, each in share.tokens.items()}
        tensors["indices"] = share.indices
        if share.labels is not None:
            tensors["labels"] = share.labels
        save_file(tensors, part)
        sync(part)
    finally:
        sizes = collectives.all_gather_object(part.stat().st_size if part.exists() else 0)
        if collectives.is_main():
            _conclude(place, aside, content, share, sizes)


def _conclude(
    place: Path, aside: Path, content: Mapping[str, Any], share: Features, sizes: list[Any]
) -> None:
    try:
        if all(sizes):
            known = {"tokens": sorted(share.tokens), "total": share.total, "sizes": sizes}
            found = {**content, **known, "skipped": share.skipped}
            write_and_sync(aside / _CONTENT, json.dumps(found, indent=1).encode())
            shutil.rmtree(place, ignore_errors=True)  # unreadable, or of a run that was faster
            os.rename(aside, place)
            sync(place.parent)
    finally:
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _find(place: Path, wanted: Sequence[str]) -> Path | None:
    """The folder of features with all the tokens that are wanted."""
    # What is being written has a name that starts with a dot.
    for part in sorted(place.glob("[!.]*")):
        try:
            if set(parse_json(read_file(part / _CONTENT))["tokens"]) >= set(wanted):
                return part
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("cannot read features at %s: %s", part, error)
    return None


def _read(place: Path) -> Features:
    """This process's share of what a folder holds."""
    from safetensors import SafetensorError, safe_open

    from dinov3_framework.data.features import Features

    try:
        content = parse_json(read_file(place / _CONTENT))
        total, skipped, sizes = content["total"], content["skipped"], content["sizes"]
        files = [place / f"{number:05}.safetensors" for number in range(len(sizes))]
        for file, size in zip(files, sizes, strict=True):
            if file.stat().st_size != size:
                raise ValueError(f"{file} has another size than it was written with")
        parts: list[Any] = [safe_open(file, "pt") for file in files]
        indices = torch.cat([part.get_tensor("indices") for part in parts])
        order = indices.argsort()
        world, rank = collectives.world_size(), collectives.rank()
        own = order[rank * total // world : (rank + 1) * total // world]
        tensors = {}
        for name in list(parts[0].keys()):
            rows = [part.get_tensor(name) for part in parts]
            tensors[name] = torch.cat(rows)[own] if len(parts) > 1 or world > 1 else rows[0]
        return Features(
            {n.removeprefix(_TOKENS): t for n, t in tensors.items() if n.startswith(_TOKENS)},
            tensors.get("labels"),
            skipped,
            tensors["indices"],
            total,
        )
    except (KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
