"""Distillation without data: the methods, what they make images with, and the defences against a poisoned teacher."""
