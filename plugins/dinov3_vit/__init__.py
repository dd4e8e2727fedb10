"""Vision Transformers with axial RoPE and storage tokens: DINOv3's own, and any other size.

The hooks are in ``plugin.py``: without them, the package needs torch, numpy and attrs alone.
"""
