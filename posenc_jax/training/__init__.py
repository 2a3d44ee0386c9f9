"""Training: a pure step, its optimizer, the devices it runs on, checkpoints, and the loop around them."""
