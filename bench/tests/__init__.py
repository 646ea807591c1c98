"""Tests that need neither torch nor a GPU: ``python -m pytest bench``."""
