"""Rankers as components of frameworks; each module needs the framework, which is the extra of its name."""
