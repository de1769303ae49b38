"""Methods whose idea is the set of representable values."""
