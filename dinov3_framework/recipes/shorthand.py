"""Short keys of a recipe, such as ``data=FOLDER``: one value that goes to several places.

A recipe declares them in a table ``shorthand``, which is no part of what it composes to:

    [shorthand.data]
    doc = "a folder with a folder for each class"
    sets.evaluations.knn.train = { use = "image_folder", root = "{data}", split = "train" }
    sets.evaluations.knn.test = { use = "image_folder", root = "{data}", split = "val" }

Whoever gives ``data`` a value, on the command line or in a recipe put over this one, gets what
``sets`` holds, put over the recipes and below all other overrides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from dinov3_framework.recipes.files import Mistake
from dinov3_framework.recipes.toml_text import inline

KEY = "shorthand"


@frozen
class Shorthand:
    """One short key."""

    name: str
    doc: str
    sets: Mapping[str, Any]
    origin: str  # the file that declares it

    def expanded(self, value: Any) -> dict[str, Any]:
        """What a value of the key stands for.

        ``"{name}"`` becomes the value itself, ``{name}`` inside of a longer string its text.
        """
        mark = f"{{{self.name}}}"

        def filled(part: Any) -> Any:
            if isinstance(part, Mapping):
                return {key: filled(each) for key, each in part.items()}
            if isinstance(part, list):
                return [filled(each) for each in part]
            if not isinstance(part, str) or mark not in part:
                return part
            return value if part == mark else part.replace(mark, str(value))

        return {key: filled(part) for key, part in self.sets.items()}


def read_shorthand(table: Any, origin: str) -> dict[str, Shorthand]:
    """The short keys that a recipe declares; raises ``Mistake``."""
    if not isinstance(table, Mapping):
        raise Mistake(f"expected a table, found {inline(table)}", "", KEY)
    found = {}
    for name, entry in table.items():
        where = f"{KEY}.{name}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("sets"), Mapping):
            message = "expected a table with a table sets, the keys that it gives values to"
            raise Mistake(message, "", where)
        if odd := entry.keys() - {"sets", "doc"}:
            raise Mistake(f"knows sets and doc, not {', '.join(sorted(odd))}", "", where)
        found[name] = Shorthand(name, str(entry.get("doc", "")), entry["sets"], origin)
    return found
