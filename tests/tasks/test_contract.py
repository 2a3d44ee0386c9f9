"""Every task in the table keeps the promises of posenc_jax/tasks/base.py, at two sets of settings."""
