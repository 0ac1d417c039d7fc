"""Rankers written in the layouts of other libraries and runtimes, with equal scores."""
