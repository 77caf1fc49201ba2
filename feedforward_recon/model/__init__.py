"""Networks. Mapping knows only the protocol below; which network answers is a detail."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from feedforward_recon.types import Features


class Encoder(Protocol):
    """An image encoder: one image in, sparse local features and one global descriptor out.

    name and sha256 identify the weights; a saved map carries both and is refused by another
    encoder. ``encode`` is deterministic and keeps no state.
    """

    name: str
    sha256: str
    dim: int

    def encode(self, image: NDArray[np.uint8], max_keypoints: int | None = None) -> Features:
        """Describe an RGB image uint8 [H, W, 3]; keypoints are in pixels of that image."""
        ...
