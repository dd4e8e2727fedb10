"""What each kind of component must offer.

Base classes rather than protocols where a default saves every author the same lines.
"""
