"""Finding images in a saved scene memory."""
