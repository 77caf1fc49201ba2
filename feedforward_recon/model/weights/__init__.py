"""Weight files: which there are, how they are found, read and checked."""
