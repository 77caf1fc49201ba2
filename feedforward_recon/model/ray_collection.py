"""Images of a collection for the network of `tiny`: encoded once, aligned, decoded in windows.

What an image looks like is kept of each, 0.7 MB at 256 x 192 px. The ray of a patch follows from
intrinsics, so that images are aligned again, but not encoded, where others are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.backbone import Demand
from feedforward_recon.model.collection import (
    ENCODED_AT_ONCE,
    Collection,
    ImageWindows,
    Intrinsics,
    PairNetwork,
    check_aligns,
)
from feedforward_recon.model.predictor import Answer, NetworkPredictor, cells_answer
from feedforward_recon.model.preprocess import PreparedImage, padded_to_common_size, stacked
from feedforward_recon.model.ray_stem import PATCH
from feedforward_recon.model.ray_transformer import EncodedViews, RayTransformer


class RayCollectionNetwork(PairNetwork):
    """A `RayTransformer` that sees all images of a collection before it decodes.

    align: with latent alignment.
    """

    def __init__(self, predictor: NetworkPredictor, *, align: bool = False) -> None:
        """Raises ConfigError for another kind, CheckpointError for weights without alignment."""
        super().__init__(predictor)
        network = predictor.network
        if not isinstance(network, RayTransformer):
            raise ConfigError('expected a network of the kind of tiny, found '
                              f'{type(network).__name__}; choose tiny')
        if align:
            check_aligns(network.aligns)
        self.network, self._align = network, align

    def collected(self, images: Sequence[PreparedImage], K: Sequence[Intrinsics]) -> Collection:
        """All images of a collection, encoded and, if it was asked for, aligned.

        White is put around those that are smaller than others. Raises as ``PairNetwork``.
        """
        placed = padded_to_common_size(list(images))
        with self.computing(f'{len(placed)} encoded images'):
            return self._told(placed, self._encoded(placed), K)

    def told(self, collection: Collection, K: Sequence[Intrinsics]) -> Collection:
        """The same images, aligned again with other intrinsics (see ``PairNetwork``)."""
        with self.computing(f'{len(collection.placed)} aligned images'):
            return self._told(collection.placed, collection.encoded, K)

    @torch.inference_mode()
    def _encoded(self, placed: Sequence[PreparedImage]) -> EncodedViews:
        starts = range(0, len(placed), ENCODED_AT_ONCE)
        with self.predictor.precision():
            return EncodedViews.together([
                self.network.encode(stacked(placed[k:k + ENCODED_AT_ONCE]).to(
                    self.predictor.device)) for k in starts])

    @torch.inference_mode()
    def _told(self, placed: Sequence[PreparedImage], seen: EncodedViews, K: Sequence[Intrinsics]
              ) -> Collection:
        own = np.array([image.prepared_K(k) for image, k in zip(placed, K, strict=True)])
        intrinsics = torch.from_numpy(own).float().to(self.predictor.device)
        with self.predictor.precision():
            patches = self.network.tokens.along_rays(seen.patches[None], intrinsics[None],
                                                     _grid_of(placed))
            patches = (self.network.aligned(patches) if self._align else patches)[0]
        return Collection(placed, partial(self._answer, patches, seen, intrinsics), seen)

    @torch.inference_mode()
    def _answer(self, patches: torch.Tensor, seen: EncodedViews, K: torch.Tensor,
                windows: ImageWindows, shown: Sequence[Sequence[PreparedImage]]) -> Answer:
        with self.computing(f'{len(windows)} times {len(shown[0])} images'):
            chosen = torch.as_tensor(np.array(windows), device=patches.device)
            with self.predictor.precision():
                cells, _ = self.network.decode(patches[chosen], seen.of(chosen.flatten()),
                                               _grid_of(shown[0]), demand=Demand(memory=False))
            answer = cells_answer(cells, K[chosen], self.network, first=True)
            return tuple(x.float().cpu() for x in answer)  # type: ignore[return-value]


def _grid_of(placed: Sequence[PreparedImage]) -> tuple[int, int]:
    height, width = placed[0].image.shape[:2]
    return height // PATCH, width // PATCH
