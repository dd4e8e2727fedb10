"""Evaluation of frozen class tokens: k-NN, while training and on its own."""

from __future__ import annotations

from dinov3_classify.configs import KnnConfig, KnnTaskConfig
from dinov3_framework import Component, hookimpl


@hookimpl
def dinov3_observers() -> list[Component]:
    return [Component("knn", KnnConfig, "dinov3_classify.observer:KnnObserver")]


@hookimpl
def dinov3_tasks() -> list[Component]:
    return [Component("knn", KnnTaskConfig, "dinov3_classify.task:KnnTask")]
