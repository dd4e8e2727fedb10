"""Find a component in opened weights: its config, where it is, what images it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from attrs import evolve, frozen

from dinov3_framework.configs import WEB_IMAGES, ImagesConfig
from dinov3_framework.contracts.layouts import Layout, Published, PublishedFile, Shape
from dinov3_framework.errors import CheckpointError, first_few
from dinov3_framework.weights._files import OpenWeights

_SIZE = 224  # pixels, of the published evaluations
_DEPTH = 4  # components of a prefix, at most: model.teacher.backbone.module
# What moving averages of the student are called, the surest first: what else learns from a teacher
# of its own calls that one "teacher".
_MOMENTUM = ("model_ema", "ema", "state_dict_ema", "teacher")

# Parts of the names that PEFT gives to the tensors of its adapters.
_LORA = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}


class Catalog(Protocol):
    """Components, layouts and published weights that are known; a ``Registry`` is one."""

    @property
    def layouts(self) -> Sequence[Layout]: ...
    @property
    def published(self) -> Mapping[str, Published]: ...
    def build(self, config: Any, /) -> Any: ...
    def config_of(self, kind: str, name: str, values: Mapping[str, Any], /) -> Any:
        """The config of a component from plain values."""
        ...


@frozen
class Candidate:
    """A component that a layout recognizes below a prefix."""

    prefix: str
    content: OpenWeights
    layout: Layout
    config: Any
    note: str = ""  # what had to be chosen, in words


def find(opened: OpenWeights, catalog: Catalog, kind: str, network: str) -> Candidate:
    """The one component of a kind that is meant; no tensor but the smallest is read.

    Training checkpoints hold several networks: ``network`` is the one that is wanted, by its name
    there; ``teacher`` stands for the student's moving average, whatever it is called. Raises
    ``CheckpointError`` where there is none, or more than one.
    """
    layouts = [layout for layout in catalog.layouts if layout.kind == kind]
    if kind == "backbone":
        _refuse_adapter(opened)
    found = list(_candidates(opened, layouts))
    if not found:
        raise CheckpointError(_unknown(opened, layouts, kind))
    best: list[Candidate] = []
    for name in _MOMENTUM if network == "teacher" else (network,):
        best = best or [each for each in found if _is_of(each, name)]
    networks = (*_MOMENTUM, "student")
    best = best or [each for each in found if not any(_is_of(each, n) for n in networks)]
    if len(best) == 1:
        rest = [each for each in found if each is not best[0] and not _is_of(each, "student")]
        others = [repr(each.prefix.rstrip(".")) for each in rest]
        if network != "teacher" or not others:
            return best[0]
        prefix = best[0].prefix.rstrip(".")
        return evolve(best[0], note=f"taking {prefix!r}, not {' or '.join(others)}")
    prefixes = ", ".join(repr(each.prefix.rstrip(".")) for each in best or found)
    raise CheckpointError(
        f"{opened.path} holds {len(best)} {kind}s, {prefixes}; save the one you want on its own"
        if best
        else f"{opened.path} holds no {network}, only {prefixes}; ask for that network if you "
        "mean it"
    )


def _refuse_adapter(opened: OpenWeights) -> None:
    """Raise for an adapter, with or without the base model that it changes."""
    names = [name for name in opened.shapes if _LORA & set(name.split("."))]
    if names or "peft_type" in opened.settings:
        kind = "LoRA" if names else opened.settings["peft_type"]
        base = opened.settings.get("base_model_name_or_path")
        raise CheckpointError(
            f"{opened.path} holds a {kind} adapter ({first_few(names or opened.shapes, 1)}), which "
            f"changes a base model{f' ({base})' if base else ''} and is none itself: merge it into "
            "that first (PEFT: model.merge_and_unload()), save the result and give it"
        )


def _candidates(opened: OpenWeights, layouts: Sequence[Layout]) -> Iterator[Candidate]:
    for prefix in _prefixes(opened.shapes):
        part = opened.below(prefix)
        for layout in layouts:
            if layout.alone and prefix:
                continue
            try:
                config = layout.recognize(part)
            except CheckpointError as error:
                raise CheckpointError(f"{opened.path}: {error}") from error
            if config is not None:
                yield Candidate(prefix, part, layout, config)
                break


def _prefixes(names: Mapping[str, Shape]) -> list[str]:
    """Everything that may stand before a component's own names, the shortest first."""
    prefixes = {""}
    for name in names:
        parts = name.split(".")[:-1][:_DEPTH]
        prefixes.update(".".join(parts[: depth + 1]) + "." for depth in range(len(parts)))
    return sorted(prefixes, key=lambda prefix: (prefix.count("."), prefix))


def _is_of(candidate: Candidate, network: str) -> bool:
    """Whether it is the backbone of a network, as the names of its tensors tell."""
    return bool({network, f"{network}_backbone"} & set(candidate.prefix.split(".")))


def _unknown(opened: OpenWeights, layouts: Sequence[Layout], kind: str) -> str:
    shown = first_few(sorted(opened.shapes))
    model = opened.settings.get("model_type") or opened.settings.get("architecture")
    says = f" (its config.json says {model!r})" if model else ""
    formats = ", ".join(sorted({layout.format for layout in layouts})) or "(none)"
    return (
        f"{opened.path} is {opened.description}{says}, but holds no {kind} of a known kind: "
        f"{shown}\n    known are dinov3_framework's own files, and the layouts {formats} of "
        f"{kind}s of {family_names(layouts) or 'no installed plugin'}"
    )


def family_name(config: Any) -> str:
    """What a config class, or an object of it, is called in messages: ``Vit``."""
    cls = config if isinstance(config, type) else type(config)
    return cls.__name__.removesuffix("Config")


def family_names(layouts: Sequence[Layout]) -> str:
    return ", ".join(sorted({family_name(layout.config) for layout in layouts}))


# --------------------------------------------------------------------------- images
def images_of(
    opened: OpenWeights, catalog: Catalog, config: Any, given: ImagesConfig | None
) -> tuple[ImagesConfig, int, list[str]]:
    """The images and pixels that weights were trained on, and notes on what had to be assumed."""
    candidates = _published(catalog, config)
    size = candidates[0][1].size if candidates else _SIZE
    channels = getattr(config, "in_chans", None) or 3
    if given is not None:
        if given.channels != channels:
            raise CheckpointError(
                f"{opened.path}: its backbone takes {channels} channels, the images given have "
                f"{given.channels}"
            )
        return given, size, []
    written = _written(opened.preprocessor) or _written(opened.settings.get("pretrained_cfg", {}))
    if written is not None and written.channels == channels:
        return written, size, []
    if channels != 3:
        raise CheckpointError(
            f"{opened.path}: its backbone takes {channels} channels, and nothing says how their "
            "values are scaled; give images (channels, mean and std)"
        )
    name = opened.path.name.lower()
    named = [(key, f) for key, f in candidates if f.digest in name or key.lower() in name]
    choice = {(file.images, file.size) for _, file in named or candidates}
    if len(choice) == 1:
        return (*choice.pop(), [])
    note = (
        "nothing in it or in its name says what images it was trained on; assuming photographs, "
        "with the mean and deviation of ImageNet"
    )
    if choice:
        note += "; for weights trained on satellite images, say so (images = SATELLITE_IMAGES)"
    return WEB_IMAGES, size, [note]


def is_published(catalog: Catalog, config: Any) -> bool:
    return any(file.config == config for _, file in _files(catalog))


def _files(catalog: Catalog) -> list[tuple[str, PublishedFile]]:
    """(training set, file) of all published weights."""
    return [each for published in catalog.published.values() for each in published.files.items()]


def _published(catalog: Catalog, config: Any) -> list[tuple[str, PublishedFile]]:
    """Published files that may be this one: of equal config, or else of the same preset."""
    files = _files(catalog)
    equal = [(key, file) for key, file in files if file.config == config]
    return equal or [(key, file) for key, file in files if type(file.config) is type(config)]


def _written(settings: Mapping[str, Any]) -> ImagesConfig | None:
    """Mean and deviation from settings of Hugging Face (image_mean) or timm (mean)."""
    mean = settings.get("image_mean", settings.get("mean"))
    std = settings.get("image_std", settings.get("std"))
    if not isinstance(mean, list) or not isinstance(std, list) or len(mean) != len(std):
        return None
    try:
        return ImagesConfig(
            channels=len(mean), mean=tuple(map(float, mean)), std=tuple(map(float, std))
        )
    except (TypeError, ValueError):
        return None
