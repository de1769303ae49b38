"""Rewrites of float weights that leave the function of a model alone: what may change, found by trying, and folded."""
