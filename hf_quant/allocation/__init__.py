"""Bits for a budget: how large a model may become, and which width each site gets."""
