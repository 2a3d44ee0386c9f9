"""Attention in Pallas kernels, for GPU and TPU."""
