"""Evaluation of trained models at each length, on the same tokens for every model."""
