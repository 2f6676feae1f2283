"""deepspectra splits the spectrum of a deep network into the parts that cause it."""
