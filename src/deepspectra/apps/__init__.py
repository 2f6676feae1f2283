"""Whole jobs: the analysis that ends in a report."""
