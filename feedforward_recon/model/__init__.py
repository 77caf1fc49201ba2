"""Networks. Mapping knows only the protocols below; which network answers is a detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from feedforward_recon.types import Features, Prediction


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


class Predictor(Protocol):
    """A feed-forward network: some images in; cameras, depth and a memory of the scene out.

    The memory is a value: None before anything was seen. With ``write`` the images are added
    to what is returned; without, they are looked at in the light of the memory, which comes
    back as it was. Images that see each other but are not to be remembered (``keep=False``)
    cost no memory beyond the call, and it comes back as it was too.
    """

    def predict(self, images: Sequence[NDArray[np.uint8]], memory: Any = None, *,
                write: bool = True, keep: bool = True,
                K: NDArray[np.float64] | None = None
                ) -> tuple[Prediction, Any]:
        """What RGB images uint8 [H, W, 3] of one size show together.

        K: [3, 3] of their camera, in pixels whose centres are integers; None where it is not
        known. Networks that were trained to guess it do not use it.
        Raises InputError for images that cannot be used, MemoryError when they are too many
        for the device.
        """
        ...
