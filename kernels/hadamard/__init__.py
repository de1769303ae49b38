"""The Hadamard transform of a layer's input, as one operator. Layout and mathematics: README.md."""
