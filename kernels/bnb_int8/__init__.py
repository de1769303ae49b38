"""LLM.int8: 8-bit weights and tokens, with the columns of large inputs in full precision. Derivation: README.md."""
