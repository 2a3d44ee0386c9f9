"""Hides PyTorch from started processes: tensorboardX imports it if it can, which takes two seconds."""

raise ImportError("hidden by tests/without_torch")
