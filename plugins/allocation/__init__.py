"""Allocation: how many bits for each layer. Sensitivities fill a table of losses, searches pick from it."""
