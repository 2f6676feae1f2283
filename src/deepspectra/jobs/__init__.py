"""Whole jobs of the command line: what ends in saved data and a page."""
