"""The Hadamard transform of inputs, as one operator. Layout and mathematics: README.md."""
