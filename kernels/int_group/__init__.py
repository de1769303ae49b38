"""Integer weights of 1 to 8 bits with a scale (and zero point) a group. Derivation: README.md."""
