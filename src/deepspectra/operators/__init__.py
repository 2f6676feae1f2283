"""What is multiplied: operators, their algebra, and the parts of the Gauss-Newton matrix."""
