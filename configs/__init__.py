"""Recipes: one file per study, each only its differences from base.py."""
