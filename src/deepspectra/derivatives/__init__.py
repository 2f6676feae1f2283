"""How it is differentiated: gradients, J v, Jᵀ u and curvature products over all the data."""
