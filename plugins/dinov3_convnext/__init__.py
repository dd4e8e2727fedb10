"""ConvNeXt: the convolutional backbones that DINOv3 distills its largest model into.

The hooks are in ``plugin.py``: without them, the package needs torch, numpy and attrs alone.
"""
