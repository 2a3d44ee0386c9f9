"""posenc_jax: every positional encoding in one transformer, compared by one protocol."""

__version__ = "0.1.0"
