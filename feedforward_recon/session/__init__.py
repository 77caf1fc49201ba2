"""The pipeline from frames to a saved map, for recordings and for a live camera."""
