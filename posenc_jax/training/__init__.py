"""Training: the pure step, its objectives, optimizer and schedule, checkpoints, FLOPs and memory."""
