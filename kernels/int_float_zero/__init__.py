"""Integer codes with float zero points."""
