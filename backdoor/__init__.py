"""Backdoors: triggers, poisoned training sets and the adversarial images of clean-label poisoning."""
