"""Weights in files: recognised, read strictly, and written, whatever format they are in."""
