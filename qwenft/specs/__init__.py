"""Frozen values that say what is wanted."""
