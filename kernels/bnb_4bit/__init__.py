"""NF4 and FP4 as bitsandbytes stores them. Derivation: README.md."""
