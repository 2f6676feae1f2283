"""Matrix-free numerics: what needs products with a symmetric operator and nothing else of it."""
