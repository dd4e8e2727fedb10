"""What mypy infers of all sources: every key that a recipe may set is read; users see types.

One run of mypy serves both.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path

import pytest
from config_reads import Inferred, Read, Sources, infer, unread_fields, with_nested

from dinov3_framework import Registry
from dinov3_framework.kinds import KINDS
from dinov3_framework.schedules import SCHEDULES

ROOT = Path(__file__).parents[2]
CORE = "dinov3_framework"
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir())

TOY = '''
from attrs import frozen
from dinov3_framework import InvalidOption, LossConfig, config, option


@config
class Nested:
    """A table."""

    inner: int = option("read through the table that holds it", default=1)
    unread_inner: int = option("not read", default=1)


@config
class ToyConfig(LossConfig):
    """One field for each way of reading or not reading it."""

    read: int = option("read by the loss", default=1)
    optional: Nested | None = option("read where it is not None", default=None)
    by_property: int = option("read by a property that the loss reads", default=1)
    unread: int = option("not read", default=1)
    only_checked: int = option("looked at when the config is made", default=1)
    by_dead_property: int = option("read by a property that nobody reads", default=1)
    depth: int = option("a name that is read of something else", default=1)
    by_getattr: int = option("read by a string", default=1)
    written: int = option("given to a copy", default=1)

    def __attrs_post_init__(self) -> None:
        if self.only_checked < 0:
            self.complain()

    def complain(self) -> None:
        raise InvalidOption("only_checked", f"is {self.only_checked}")

    @property
    def twice(self) -> int:
        return 2 * self.by_property

    @property
    def dead(self) -> int:
        return self.by_dead_property


@frozen
class Other:
    depth: int = 3


class Toy:
    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        self.other = Other()

    def total(self) -> int:
        config, other = self.config, self.other
        nested = config.optional.inner if config.optional is not None else 0
        ToyConfig(written=other.depth)
        return config.read + config.twice + nested + getattr(config, "by_getattr")
'''
USER = """
from dinov3_framework import Backbone, LossConfig, Registry, View, config, load_backbone, option
from dinov3_framework import collectives

@config
class SpreadConfig(LossConfig):
    target: float = option("a target", default=1.0)

reveal_type(SpreadConfig(target=2.0).target)
reveal_type(View(crops=2, size=8).size)
reveal_type(Registry.load().names("loss"))
reveal_type(load_backbone("file").backbone.embed_dim)
reveal_type(collectives.world_size())
reveal_type(SpreadConfig().weight)
SpreadConfig(tarhet=2.0)
View(crops="two", size=8)
from dinov3_framework import Backbones
"""

UNREAD = ["by_dead_property", "by_getattr", "depth", "only_checked", "unread", "written"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    (root / "toy_reads").mkdir()
    (root / "toy_reads" / "__init__.py").write_text(textwrap.dedent(TOY), "utf-8")
    (root / "toy_user").mkdir()
    (root / "toy_user" / "__init__.py").write_text(USER, "utf-8")
    return root


@pytest.fixture(scope="module")
def inferred(toy: Path) -> Inferred:
    """Of the core, all plugins, the toy and the user."""
    return infer(
        Sources(ROOT, [CORE]),
        Sources(ROOT / "plugins", PLUGINS),
        Sources(toy, ["toy_reads"]),
        Sources(toy, ["toy_user"], strict=True),
    )


@pytest.fixture(scope="module")
def reads(inferred: Inferred) -> set[Read]:
    """The contract checks are no use of a key."""
    return inferred.reads(ignore=f"{CORE}.testing")


def all_configs() -> list[type]:
    """Of every component that this distribution offers, their tables, and the schedules.

    Not the base of a kind itself, whose fields are read as those of its subclasses.
    """
    registry = Registry.load()
    found: dict[type, None] = {}
    for kind in KINDS:
        for name in registry.names(kind):
            registered = registry.get(kind, name)
            module = registered.component.config.__module__.partition(".")[0]
            if module in (CORE, *PLUGINS):
                found |= dict.fromkeys(with_nested(registered.component.config))
    bases = {kind.config for kind in KINDS.values()}
    return [*(cls for cls in found if cls not in bases), *SCHEDULES.values()]


def test_the_configs_are_found() -> None:
    names = {cls.__name__ for cls in all_configs()}
    assert {"PretrainConfig", "ParallelConfig", "LoaderConfig", "ImagesConfig"} <= names
    assert {"Vit7bConfig", "ProjectorConfig", "MaskingConfig", "Cosine"} <= names


@pytest.mark.slow
def test_every_key_is_read(reads: set[Read]) -> None:
    unread = {
        f"{cls.__module__}.{cls.__qualname__}": fields
        for cls in all_configs()
        if (fields := unread_fields(cls, reads, CORE))
    }
    assert unread == {}


@pytest.mark.slow
def test_unread_keys_are_noticed(
    reads: set[Read], toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(toy))
    try:
        module = importlib.import_module("toy_reads")
        assert unread_fields(module.ToyConfig, reads, CORE) == UNREAD
        assert unread_fields(module.Nested, reads, CORE) == ["unread_inner"]
        # Every loss's weight is read of its base class, by those who train with losses.
        alone = [read for read in reads if read.package == "toy_reads"]
        assert unread_fields(module.ToyConfig, alone, CORE) == sorted([*UNREAD, "weight"])
    finally:
        sys.modules.pop("toy_reads", None)


# The protocol of the keys that name a backbone, which several configs have.
CHOICE = {"dinov3_framework.weights.loading.BackboneChoice"}


@pytest.mark.slow
def test_a_key_that_loses_its_reader_is_noticed(reads: set[Read]) -> None:
    """The proof is of each field: without the code that reads them, all of them are unread."""
    for cls in all_configs():
        names = {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}
        others = [read for read in reads if read.receiver not in names | CHOICE]
        fields = sorted(attribute.name for attribute in cls.__attrs_attrs__)  # type: ignore[attr-defined]
        assert unread_fields(cls, others, CORE) == fields


# --------------------------------------------------------------------------- users
@pytest.mark.slow
def test_users_see_types(inferred: Inferred) -> None:
    """Nothing that is imported from the top level is Any, and mistakes are found."""
    messages = inferred.messages("toy_user")
    revealed = [text.split('"')[1] for text in messages if "Revealed type" in text]
    assert [kind.replace("builtins.", "") for kind in revealed] == [
        "float",
        "int",
        "list[str]",
        "int",
        "int",
        "dinov3_framework.schedules.Schedule",
    ]
    mistakes = [text for text in messages if ": error: " in text]
    for complaint, text in zip(
        (
            'Unexpected keyword argument "tarhet"',
            'Argument "crops" to "View" has incompatible type "str"',
            'has no attribute "Backbones"',
        ),
        mistakes,
        strict=True,
    ):
        assert complaint in text
