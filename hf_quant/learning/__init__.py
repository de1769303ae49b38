"""What is learned by gradient: roundings of units, the whole model, and how much its loss minds."""
