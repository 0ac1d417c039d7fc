"""Measure the effectiveness of rankers, and test whether their differences are significant."""
