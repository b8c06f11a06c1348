"""Backdoors: triggers, poisoned training sets, adversarial images for clean-label poisoning, and metrics."""
