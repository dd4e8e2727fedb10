"""Values of a stage's recipe that name what an earlier stage leaves: ``stage:pretrain``.

``stage:NAME`` is the folder of a stage's run, ``stage:NAME/checkpoints/step_00001000`` something in
it. Any string of a recipe may be one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import attrs

from dinov3_framework.recipes.toml_text import KeyPath

PREFIX = "stage:"

T = TypeVar("T")


@attrs.frozen
class Reference:
    """A place in the folder of a stage; ``inside`` is empty for the folder itself."""

    stage: str
    inside: str

    @classmethod
    def of(cls, text: str) -> Reference | None:
        """What ``text`` refers to; None if it is an ordinary value."""
        if not text.startswith(PREFIX):
            return None
        stage, _, inside = text.removeprefix(PREFIX).partition("/")
        return cls(stage, inside)

    def __str__(self) -> str:
        return PREFIX + "/".join(part for part in (self.stage, self.inside) if part)

    @property
    def is_sound(self) -> bool:
        """Whether it stays inside the stage's folder."""
        return not self.inside or not {"", ".", ".."} & set(self.inside.split("/"))

    def path(self, output_dir: Path) -> Path:
        """The place, where the stages' folders lie in ``output_dir``."""
        return output_dir / self.stage / self.inside


def references(config: Any) -> dict[KeyPath, Reference]:
    """Every reference in a config, by its key path."""
    found: dict[KeyPath, Reference] = {}

    def note(path: KeyPath, reference: Reference) -> str:
        found[path] = reference
        return str(reference)

    replaced(config, note)
    return found


def replaced(config: T, change: Callable[[KeyPath, Reference], str], path: KeyPath = ()) -> T:
    """A copy of a config in which every reference is what ``change`` makes of it."""
    value: Any = config
    if isinstance(value, str):
        reference = Reference.of(value)
        return cast(T, value if reference is None else change(path, reference))
    if isinstance(value, Mapping):
        new: Any = {key: replaced(item, change, (*path, key)) for key, item in value.items()}
    elif isinstance(value, tuple):
        new = tuple(replaced(item, change, (*path, str(n))) for n, item in enumerate(value))
    elif attrs.has(type(value)):
        names = [attribute.name for attribute in attrs.fields(type(value)) if attribute.init]
        items = {name: replaced(getattr(value, name), change, (*path, name)) for name in names}
        changes = {name: item for name, item in items.items() if item is not getattr(value, name)}
        new = attrs.evolve(value, **changes) if changes else value
    else:
        return config
    return cast(T, new if new != value else value)
