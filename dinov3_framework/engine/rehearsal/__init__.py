"""A step of a training run on as many processes as wanted, in one process and without data.

The processes and the values of tensors are pretended; the networks, the objective and the
optimizer are the real ones. What a step takes is counted while it runs.
"""
