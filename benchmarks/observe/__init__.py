"""What watching heads costs a training step, in time and in memory."""
