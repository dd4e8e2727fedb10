"""What a training reads before its first step."""

from __future__ import annotations

from dinov3_framework.registry import Registry
from dinov3_ssl.configs import TrainingConfig


def weights_of(config: TrainingConfig, registry: Registry) -> dict[str, str]:
    """Weights that a recipe names, by key."""
    found = {} if config.init_from is None else {"init_from.weights": config.init_from.weights}
    for name, loss in config.losses.items():
        anchor = registry.build(loss).anchor()
        if anchor is not None and anchor.config.weights is not None:
            found[f"losses.{name}.anchor.weights"] = anchor.config.weights
    return found


def no_such_weights(key: str, path: str, registry: Registry) -> str:
    """What to say of weights that are not there."""
    if key == "continue_from.run":
        return f"{key}: there is no {path}\n    give the folder of the run to go on with"
    published = ", ".join(sorted(registry.published))
    hint = f"\n    published names: {published}" if published else ""
    return f"{key}: there is no {path}{hint}"
