"""Evaluations of features as classifiers, and classifiers as heads.

Nothing is imported here: torch.hub reads ``components`` where there are few libraries.
"""
