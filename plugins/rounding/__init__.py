"""Solvers: which integer for each weight."""
