"""Measure the efficiency of rankers, and write plots and the HTML report."""
