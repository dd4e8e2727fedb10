"""Files of heads that say nothing of themselves."""

from __future__ import annotations

from dinov3_framework import Layout

LAYOUTS: list[Layout] = []
