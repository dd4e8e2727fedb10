"""An optimizer over the networks of a train unit: schedules, parameter groups, clipping, state."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov3_framework.contracts.networks import Shardable
from dinov3_framework.contracts.training import OptimizerFactory
from dinov3_framework.kinds import OptimizerConfig
from dinov3_framework.schedules import Schedule, iterations_of


@frozen
class ParameterSetting:
    """Multipliers of the scheduled learning rate and weight decay of one parameter."""

    lr_mult: float
    wd_mult: float
    is_last_layer: bool


def parameter_settings(module: nn.Module, config: OptimizerConfig) -> dict[str, ParameterSetting]:
    """The settings of every parameter of one network that learns, by name.

    The learning rate falls by ``layerwise_decay`` with each layer below the top. Layers, roles and
    what decays are the network's own knowledge (``Shardable``).
    """
    settings = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        (layer, layers), role, decays, own = (0, 0), None, parameter.ndim > 1, 1.0
        if isinstance(module, Shardable):
            (layer, layers), role = module.layer_of(name), module.role_of(name)
            decays, own = module.decays(name, parameter), module.lr_mult(name)
        lr_mult = config.layerwise_decay ** (layers - layer) * own
        if role == "patch_embed":
            lr_mult *= config.patch_embed_lr_mult
        settings[name] = ParameterSetting(
            lr_mult, float(decays), is_last_layer=role == "prototypes"
        )
    return settings


def lr_factor(config: OptimizerConfig, batch_size: int) -> float:
    """What the rule multiplies the learning rate by; ``batch_size`` is the global one."""
    if config.lr_scaling == "sqrt_wrt_1024":
        return 4 * math.sqrt(batch_size / 1024)
    if config.lr_scaling == "linear_wrt_256":
        return batch_size / 256
    return 1.0


class Optimizer:
    """An optimizer with its schedules, per-network clipping, and its state by parameter name."""

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        config: OptimizerConfig,
        factory: OptimizerFactory,
        batch_size: int,
    ) -> None:
        self.config, self.networks = config, dict(networks)
        self.lr: Schedule = config.lr.scaled(lr_factor(config, batch_size))
        self._names: dict[str, nn.Parameter] = {}
        groups: dict[ParameterSetting, list[nn.Parameter]] = defaultdict(list)
        for network, module in networks.items():
            parameters = dict(module.named_parameters())
            for name, setting in parameter_settings(module, config).items():
                groups[setting].append(parameters[name])
                self._names[f"{network}.{name}"] = parameters[name]
        self._settings = list(groups)
        self._optimizer = factory.build([{"params": params} for params in groups.values()])
        for parameter in self._names.values():
            self._optimizer.state[parameter] = factory.initial_state(parameter)

    def values(self, iteration: int, total: int) -> dict[str, float]:
        """Scheduled values of one iteration, as they are logged."""
        lr = self.lr.at(iteration, total)
        frozen_head = iteration < iterations_of(self.config.freeze_last_layer, total)
        return {
            "lr": lr,
            "last_layer_lr": 0.0 if frozen_head else lr,
            "weight_decay": self.config.weight_decay.at(iteration, total),
        }

    def set_values(self, values: Mapping[str, float]) -> None:
        """Apply what :meth:`values` gave."""
        for group, setting in zip(self._optimizer.param_groups, self._settings, strict=True):
            lr = values["last_layer_lr" if setting.is_last_layer else "lr"]
            group["lr"] = lr * setting.lr_mult
            group["weight_decay"] = values["weight_decay"] * setting.wd_mult

    def gradient_norms(self) -> dict[str, Tensor]:
        """The 2-norm of each network's gradient over all processes, before clipping."""
        norms = {}
        for network, module in self.networks.items():
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
            norms[network] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return norms

    def clip(self, norms: Mapping[str, Tensor]) -> None:
        """Scale each network's gradient down to ``clip_grad`` where its norm is above it."""
        if self.config.clip_grad is None:
            return
        for network, norm in norms.items():
            parameters = list(self.networks[network].parameters())
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)

    def step(self) -> None:
        self._optimizer.step()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _entries(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, parameter in self._names.items():
            entries: dict[str, Any] = self._optimizer.state[parameter]
            for key, value in entries.items():
                yield name, key, value

    def state(self) -> dict[str, Tensor]:
        """What it keeps of each parameter, by name, to save or to load in place."""
        return {f"{name}.{key}": value for name, key, value in self._entries()}

    def owners(self) -> dict[str, str]:
        """The parameter that each entry of :meth:`state` belongs to."""
        return {f"{name}.{key}": name for name, key, _ in self._entries()}
