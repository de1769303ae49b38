"""Ranges of weights and activations, and what is calibrated for them."""
