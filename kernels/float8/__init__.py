"""8-bit floats: weights and inputs in the types that tensor cores multiply."""
