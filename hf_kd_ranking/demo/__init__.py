"""The embedded default: the whole method on docstrings, without a network."""
