"""Images that a network encodes once, and decodes a few at a time, as Light3R-SfM does pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.errors import CheckpointError, ConfigError
from feedforward_recon.model.backbone import Demand
from feedforward_recon.model.predictor import (
    Answer,
    NetworkPredictor,
    as_prediction,
    is_out_of_memory,
    preparation,
    read,
)
from feedforward_recon.model.preprocess import PreparedImage, padded_to_common_size, stacked
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.model.vit import PATCH
from feedforward_recon.types import Prediction

ENCODED_AT_ONCE = 16


class CollectionNetwork:
    """A network of the kind of VGGT that sees all images of a collection before it decodes.

    align: with latent alignment.
    """

    def __init__(self, predictor: NetworkPredictor, *, align: bool = False) -> None:
        """Raises ConfigError for another kind, CheckpointError for weights without alignment."""
        network = predictor.network
        if not isinstance(network, Vggt):
            raise ConfigError('expected a network of the kind of VGGT, which decodes images apart '
                              f'from encoding them, found {type(network).__name__}; choose vggt, '
                              'vgg-t3 or tiny')
        if align and not network.aligns:
            raise CheckpointError('expected weights with latent alignment, found none in those of '
                                  'this network; give others, or switch it off')
        self.network, self.device, self.half = network, predictor.device, predictor.half
        self._prepare, self._align = preparation(network), align

    def prepared(self, image: NDArray[np.uint8]) -> PreparedImage:
        """An RGB image uint8 [H, W, 3] at the size that the network sees it."""
        return self._prepare([image])[0]

    @torch.inference_mode()
    def collected(self, images: Sequence[PreparedImage]) -> Collection:
        """All images of a collection, encoded and, if it was asked for, aligned.

        White is put around those that are smaller than others. Raises ConfigError where the
        device has too little memory.
        """
        placed = padded_to_common_size(list(images))
        starts = range(0, len(placed), ENCODED_AT_ONCE)
        with self._computing(f'{len(placed)} encoded images'):
            patches = torch.cat([self.network.encode(stacked(placed[k:k + ENCODED_AT_ONCE]))
                                 for k in starts], 1)
            if self._align:
                patches = self.network.aligned(patches)
        return Collection(self, placed, patches[0])

    @torch.inference_mode()
    def decoded(self, patches: torch.Tensor, size_hw: tuple[int, int]) -> Answer:
        """What windows of tokens [B, N, T, C] show, each in a frame and a unit of its own."""
        with self._computing(f'{len(patches)} times {patches.shape[1]} images'):
            said, _ = self.network.decode(patches, (size_hw[0] // PATCH, size_hw[1] // PATCH),
                                          Demand(points=False, memory=False))
        return tuple(x.float().cpu() for x in read(said))  # type: ignore[return-value]

    @contextmanager
    def _computing(self, what: str) -> Iterator[None]:
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(f'expected room for {what} on {self.device}, found too little '
                              'memory; choose a smaller reconstruction.batch, a smaller network '
                              'or another device') from error


class Collection:
    """Images as the network sees them (``placed``), and what it encoded of them."""

    def __init__(self, network: CollectionNetwork, placed: Sequence[PreparedImage],
                 patches: torch.Tensor) -> None:
        """patches: tokens [N, T, C] of the images."""
        self.placed = placed
        self._network, self._patches = network, patches

    def predict(self, windows: Sequence[Sequence[int]]) -> list[Prediction]:
        """What windows of as many images each show, decoded in one batch.

        Each in a frame and a unit of its own, about the images as they are ``placed``. Raises
        ConfigError where the device has too little memory, CheckpointError for answers that are
        no cameras.
        """
        shown = [[PreparedImage(self.placed[image].image, (1.0, 1.0)) for image in window]
                 for window in windows]
        size_hw = self.placed[0].image.shape[:2]
        chosen = torch.as_tensor(np.array(windows), device=self._patches.device)
        answers = self._network.decoded(self._patches[chosen], size_hw)
        return [as_prediction(answer, images, size_hw)  # type: ignore[arg-type]
                for answer, images in zip(zip(*answers, strict=True), shown, strict=True)]
