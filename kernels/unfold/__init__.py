"""Windows of an image as rows of a matrix, as one operator. Layout: README.md."""
