"""How a frame gets its pose: features, given poses, or windows of a network."""
