"""Files of heads that say nothing of themselves."""

from __future__ import annotations

from dinov3_framework import Layout
from dinov3_segment.layouts_plain import PlainMaskLayout

LAYOUTS: list[Layout] = [PlainMaskLayout()]
