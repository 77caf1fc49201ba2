"""feedforward_recon: a pose, a map of fixed size in bytes, and a way back into that map."""

import logging

__version__ = '0.1.0'

logging.getLogger(__name__).addHandler(logging.NullHandler())
