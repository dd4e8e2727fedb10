"""Recipes: compose files and overrides, give them types, describe components."""
