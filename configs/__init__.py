"""Recipes: one file per study. Each contains only its differences from base.py."""
