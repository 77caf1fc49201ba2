"""Errors in one sentence: what was expected, what was found, what to do."""


class ReconError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it as one line."""


class ConfigError(ReconError):
    """A configuration value is unknown, of the wrong type or outside its range."""


class InputError(ReconError):
    """Input data (images, depth, bags, calibration) cannot be used."""


class MapError(ReconError):
    """A saved map is damaged, of a newer version, or belongs to another encoder."""


class CheckpointError(ReconError):
    """Model weights are missing, damaged or do not fit the architecture."""


class TooManyImagesError(MemoryError):
    """More images at once than there is memory for; fits: how many there is room for."""

    def __init__(self, found: str, fits: int) -> None:
        super().__init__(found)
        self.fits = fits


class DegenerateError(ReconError):
    """Geometry is not determined by the data (collinear points, no parallax, too few)."""
