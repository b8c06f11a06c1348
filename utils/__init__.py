"""What every stage shares: parameters, data, losses, the training loop, checkpoints and logs."""
