"""Runs on disk: their state, their dependencies, and copies with other seeds."""
