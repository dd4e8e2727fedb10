"""Recipes: composed from files and overrides, given types, described."""
