"""Follows one sentence through the positional encodings of a transformer, shape by shape, as text and pictures."""
