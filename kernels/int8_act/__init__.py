"""8-bit weights with integer activations, multiplied as integers. Derivation: README.md."""
