"""The audit: a grid of attacks on one model, and what it says of what can be stolen through the model's outputs."""
