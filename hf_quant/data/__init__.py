"""Calibration data: whatever a user has becomes model inputs."""
