"""Kronecker factors of one layer's Gauss-Newton block: KFAC, EKFAC, CFAC, and the block itself."""
