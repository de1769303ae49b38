"""Function-preserving rewrites made before rounding."""
