"""Attention as Pallas kernels for GPUs and TPUs."""
