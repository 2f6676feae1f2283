"""What is multiplied: the curvature matrices, their algebra, and the parts of the Gauss-Newton matrix."""
