"""Pipelines of diffusers: their trajectories as data, what their networks know of the timestep, what they draw."""
