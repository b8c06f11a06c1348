"""Experiments as they lie on disk: what is finished, what needs what, and the same under other seeds."""
