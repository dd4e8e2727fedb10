"""Values of a stage's recipe that name what an earlier stage leaves: ``stage:pretrain``.

``stage:NAME`` is the folder of a stage's run, ``stage:NAME/checkpoints/step_00001000`` something in
it. Any string of a recipe may be one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from dinov3_framework.recipes.toml_text import KeyPath

PREFIX = "stage:"


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


def replaced(value: Any, change: Callable[[KeyPath, Reference], str], path: KeyPath = ()) -> Any:
    """A copy of a config in which every reference is what ``change`` makes of it."""

    def inside(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return {key: replaced(item, change, (*path, key)) for key, item in items}

    new = value
    if isinstance(value, str):
        reference = Reference.of(value)
        new = value if reference is None else change(path, reference)
    elif isinstance(value, Mapping):
        new = inside(value.items())
    elif isinstance(value, tuple):
        new = tuple(inside((str(n), item) for n, item in enumerate(value)).values())
    elif attrs.has(type(value)):
        names = [attribute.name for attribute in attrs.fields(type(value)) if attribute.init]
        new = attrs.evolve(value, **inside((name, getattr(value, name)) for name in names))
    return new if new != value else value
