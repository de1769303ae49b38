"""Quantization-aware training: what is learned (weights, scales, low-rank terms) while the weights are rounded."""
