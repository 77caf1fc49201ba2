"""The pipeline from a source of frames to a saved map, whole recordings and live."""
