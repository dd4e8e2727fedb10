"""The heads of this package by name, and their published weights."""

from __future__ import annotations

from dinov3_framework import Component, Published

COMPONENTS: list[Component] = []

PUBLISHED: list[Published] = []
