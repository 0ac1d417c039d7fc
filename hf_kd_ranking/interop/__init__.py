"""Rankers in the layouts of other libraries and runtimes, with equal scores."""
