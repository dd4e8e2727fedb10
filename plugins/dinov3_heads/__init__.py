"""Heads on backbones: their training, and evaluations of them."""
