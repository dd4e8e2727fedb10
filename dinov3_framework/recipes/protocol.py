"""What recipes need to know of components; the registry is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from dinov3_framework.kinds import Registered


class Components(Protocol):
    """Components by kind and name, and by the class of their configs."""

    @property
    def broken(self) -> Sequence[Any]: ...
    @property
    def blocked(self) -> Sequence[str]: ...
    def names(self, kind: str, /) -> list[str]: ...
    def get(self, kind: str, name: str, /) -> Registered: ...
    def suggest(self, kind: str, name: str, /) -> str: ...
    def of_config(self, config: Any, /) -> Registered: ...
