"""Data-free distillation and its defence: generators, images out of one picture, the vaccine and retrospection."""
