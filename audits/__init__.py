"""The audit: a grid of attacks on one model, and verdicts on what can be stolen through its outputs."""
