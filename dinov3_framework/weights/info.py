"""What this framework's own files say of the component in them.

Keys of the metadata, all strings: ``dinov3_backbone`` (version of this format; ``dinov3_head`` for
a head), ``component``, ``config`` (JSON), ``images`` (JSON), ``size`` (pixels), ``provenance``
(JSON), and ``format``, which other libraries expect to be ``pt``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attrs import asdict, frozen

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.errors import CheckpointError
from dinov3_framework.runtime.durable import parse_json

FORMAT = "1"


@frozen
class ComponentInfo:
    """What is in an exported file besides the tensors."""

    component: str
    config: Mapping[str, Any]  # plain values, as a recipe's [backbone] without its ``use``
    images: ImagesConfig
    size: int  # pixels
    provenance: Mapping[str, str]
    kind: str = "backbone"

    def to_metadata(self) -> dict[str, str]:
        return {
            "format": "pt",
            f"dinov3_{self.kind}": FORMAT,
            "component": self.component,
            "config": json.dumps(dict(self.config), sort_keys=True),
            "images": json.dumps(asdict(self.images), sort_keys=True),  # type: ignore[arg-type]
            "size": str(self.size),
            "provenance": json.dumps(dict(self.provenance), sort_keys=True),
        }

    @classmethod
    def from_metadata(
        cls, path: object, metadata: Mapping[str, str], kind: str = "backbone"
    ) -> ComponentInfo | None:
        """None where ``metadata`` are not of this format.

        Raises ``CheckpointError`` for another version of it, and for what cannot be read.
        """
        version = metadata.get(f"dinov3_{kind}")
        if version is None:
            return None
        if version != FORMAT:
            raise CheckpointError(
                f"{path} is in format {version} of exported weights, this version of "
                f"dinov3_framework reads format {FORMAT}; use the version that wrote it"
            )
        try:
            images = parse_json(metadata["images"])
            return cls(
                component=metadata["component"],
                config=dict(parse_json(metadata["config"])),
                images=ImagesConfig(
                    channels=int(images["channels"]),
                    mean=tuple(images["mean"]),
                    std=tuple(images["std"]),
                ),
                size=int(metadata["size"]),
                provenance=dict(parse_json(metadata["provenance"])),
                kind=kind,
            )
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path}: its metadata is malformed ({type(error).__name__}: {error})"
            ) from error
