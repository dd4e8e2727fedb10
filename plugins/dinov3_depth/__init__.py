"""Depth: heads, losses and evaluations.

This file imports nothing, so that ``torch.hub`` can take the heads with torch alone.
"""
