"""AdamW over a student's networks: which parameter learns how fast, decays or not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.schedules import Schedule
from dinov3_framework.training import OptimizerConfig

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


@frozen
class ParameterSetting:
    """Multipliers of the scheduled learning rate and weight decay of one parameter."""

    lr_mult: float
    wd_mult: float
    is_last_layer: bool


def parameter_settings(
    module: nn.Module, *, layerwise_decay: float, patch_embed_lr_mult: float
) -> dict[str, ParameterSetting]:
    """The settings of every parameter of one network, by name.

    The learning rate falls by ``layerwise_decay`` with each layer below the top; biases, norms and
    layer-scale gammas do not decay; prototypes (``last_layer``) are frozen at first.
    """
    settings = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, layers = module.layer_of(name) if isinstance(module, Backbone) else (0, 0)
        lr_mult = layerwise_decay ** (layers - layer)
        if "patch_embed" in name:
            lr_mult *= patch_embed_lr_mult
        decays = not (name.endswith("bias") or "norm" in name or "gamma" in name)
        settings[name] = ParameterSetting(lr_mult, float(decays), "last_layer" in name)
    return settings


def lr_factor(config: OptimizerConfig, batch_size: int) -> float:
    """What the rule multiplies the learning rate by; ``batch_size`` is the global one."""
    if config.lr_scaling == "sqrt_wrt_1024":
        return 4 * math.sqrt(batch_size / 1024)
    if config.lr_scaling == "linear_wrt_256":
        return batch_size / 256
    return 1.0


class Optimizer:
    """AdamW, its schedules, per-network clipping, and its state by parameter name."""

    def __init__(
        self, networks: Mapping[str, nn.Module], config: OptimizerConfig, batch_size: int
    ) -> None:
        self.config = config
        self.lr: Schedule = config.lr.scaled(lr_factor(config, batch_size))
        self.networks = dict(networks)
        self._names: dict[str, nn.Parameter] = {}
        groups: dict[ParameterSetting, list[nn.Parameter]] = defaultdict(list)
        for network, module in networks.items():
            parameters = dict(module.named_parameters())
            settings = parameter_settings(
                module,
                layerwise_decay=config.layerwise_decay,
                patch_embed_lr_mult=config.patch_embed_lr_mult,
            )
            for name, setting in settings.items():
                groups[setting].append(parameters[name])
                self._names[f"{network}.{name}"] = parameters[name]
        self._settings = list(groups)
        self._adamw = torch.optim.AdamW(
            [{"params": params} for params in groups.values()], betas=config.betas, fused=True
        )
        self._create_state()

    def _create_state(self) -> None:
        """Moments from the start, not at the first step: a checkpoint is then loaded in place."""
        for parameter in self._names.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def values(self, iteration: int, total: int) -> dict[str, float]:
        """Scheduled values of one iteration, as they are logged."""
        lr = self.lr.at(iteration, total)
        frozen_head = iteration < self.config.freeze_last_layer
        return {
            "lr": lr,
            "last_layer_lr": 0.0 if frozen_head else lr,
            "weight_decay": self.config.weight_decay.at(iteration, total),
        }

    def set_values(self, values: Mapping[str, float]) -> None:
        """Apply what :meth:`values` gave."""
        for group, setting in zip(self._adamw.param_groups, self._settings, strict=True):
            lr = values["last_layer_lr" if setting.is_last_layer else "lr"]
            group["lr"] = lr * setting.lr_mult
            group["weight_decay"] = values["weight_decay"] * setting.wd_mult

    def gradient_norms(self) -> dict[str, Tensor]:
        """The 2-norm of each network's gradient over all processes, before clipping."""
        norms = {}
        for network in self.networks:
            gradients = list(self._gradients(network))
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

    def _gradients(self, network: str) -> Iterator[Tensor]:
        for parameter in self.networks[network].parameters():
            if parameter.grad is not None:
                yield parameter.grad

    def step(self) -> None:
        self._adamw.step()

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def named_state(self) -> dict[str, Tensor]:
        """The moments and step counts by parameter name, to save or to load in place."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._names.items():
            entries: dict[str, Any] = self._adamw.state[parameter]
            for key, value in entries.items():
                state[f"{name}.{key}"] = value
        return state
