"""Images of a collection, of which a network says what a few at a time show together.

A network of the kind of VGGT encodes each image once, and decodes windows of them, as Light3R-SfM
does pairs; so does one of the kind of tiny with latent alignment (`ray_collection`). Any other
sees the images of each window anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

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
from feedforward_recon.model.preprocess import (
    PreparedImage,
    common_size,
    padded,
    padded_to_common_size,
    stacked,
)
from feedforward_recon.model.seconds import Seconds
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.model.vit import PATCH
from feedforward_recon.types import Prediction

ENCODED_AT_ONCE = 16
Intrinsics = NDArray[np.floating]
ImageWindows = Sequence[Sequence[int]]  # numbers of images, as many in each
# What windows of images show; of each window, its images as they are seen together.
Answering = Callable[[ImageWindows, Sequence[Sequence[PreparedImage]]], Answer]


class PairNetwork(ABC):
    """A network that is asked about a few images of a collection at a time.

    seconds: what took how long in it. decodes: whether it computes when it is asked about pairs.
    """

    decodes: ClassVar[bool] = True

    def __init__(self, predictor: NetworkPredictor) -> None:
        self.predictor, self._prepare = predictor, preparation(predictor.network)
        self.seconds = Seconds(predictor.device)

    def prepared(self, image: NDArray[np.uint8]) -> PreparedImage:
        """An RGB image uint8 [H, W, 3] at the size that the network sees it."""
        return self._prepare([image])[0]

    @abstractmethod
    def collected(self, images: Sequence[PreparedImage], K: Sequence[Intrinsics]) -> Collection:
        """All images of a collection, to be asked about.

        K: [3, 3] of the images as they were before they were prepared.
        Raises ConfigError where the device has too little memory.
        """

    def told(self, collection: Collection, K: Sequence[Intrinsics]) -> Collection:
        """The same images, of which other intrinsics are known now."""
        return self.collected(collection.placed, K)

    @contextmanager
    def computing(self, what: str, remedy: str = 'choose a smaller reconstruction.batch'
                  ) -> Iterator[None]:
        """Within this context too little memory is a ConfigError about ``what``."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(f'expected room for {what} on {self.predictor.device}, found too '
                              f'little memory; {remedy}, or choose a smaller network or another '
                              'device') from error


class WindowNetwork(PairNetwork):
    """Any network, which sees the images of each window anew."""

    def collected(self, images: Sequence[PreparedImage], K: Sequence[Intrinsics]) -> Collection:
        """All images of a collection (see ``PairNetwork``); nothing is computed yet."""
        own = [image.prepared_K(k) for image, k in zip(images, K, strict=True)]
        return Collection(images, partial(self._answer, own))

    def _answer(self, K: Sequence[Intrinsics], windows: ImageWindows,
                shown: Sequence[Sequence[PreparedImage]]) -> Answer:
        # Windows hold the prepared images as they are, but for white around some.
        moved = [[image.prepared_K(K[k]) for k, image in zip(window, images, strict=True)]
                 for window, images in zip(windows, shown, strict=True)]
        with self.computing(f'{len(shown)} times {len(shown[0])} images'):
            return self.predictor.windows(torch.cat([stacked(window) for window in shown]),
                                          torch.from_numpy(np.array(moved)))


def check_aligns(aligns: bool) -> None:
    """Raises CheckpointError for weights without latent alignment."""
    if not aligns:
        raise CheckpointError('expected weights with latent alignment, found none in those of '
                              'this network; give others, or switch it off')


class CollectionNetwork(PairNetwork):
    """A network of the kind of VGGT that sees all images of a collection before it decodes.

    align: with latent alignment.
    """

    def __init__(self, predictor: NetworkPredictor, *, align: bool = False) -> None:
        """Raises ConfigError for another kind, CheckpointError for weights without alignment."""
        super().__init__(predictor)
        network = predictor.network
        if not isinstance(network, Vggt):
            raise ConfigError('expected a network of the kind of VGGT, which can align images '
                              'between encoding and decoding them, found '
                              f'{type(network).__name__}; choose vggt, vgg-t3 or tiny, or '
                              'leave latent alignment out')
        if align:
            check_aligns(network.aligns)
        self.network, self._align = network, align

    def collected(self, images: Sequence[PreparedImage], K: Sequence[Intrinsics]) -> Collection:
        """All images of a collection, encoded and, if it was asked for, aligned.

        White is put around those that are smaller than others. Raises as ``PairNetwork``.
        """
        del K  # networks of this kind say it themselves
        placed = padded_to_common_size(list(images))
        with self.computing(f'{len(placed)} encoded images'):
            patches = self.encoded(placed)
        return Collection(placed, partial(self._answer, patches))

    def told(self, collection: Collection, K: Sequence[Intrinsics]) -> Collection:
        """The same (see ``PairNetwork``): what was encoded does not depend on intrinsics."""
        del K
        return collection

    @torch.inference_mode()
    def encoded(self, placed: Sequence[PreparedImage]) -> torch.Tensor:
        """Tokens [N, T, C] of images of one size."""
        starts = range(0, len(placed), ENCODED_AT_ONCE)
        with self.predictor.precision():
            patches = torch.cat([self.network.encode(stacked(placed[k:k + ENCODED_AT_ONCE]))
                                 for k in starts], 1)
            return (self.network.aligned(patches) if self._align else patches)[0]

    @torch.inference_mode()
    def decoded(self, patches: torch.Tensor, grid_hw: tuple[int, int]) -> Answer:
        """What windows of tokens [B, N, T, C] show, each in a frame and a unit of its own."""
        with self.predictor.precision():
            said, _ = self.network.decode(patches, grid_hw, Demand(points=False, memory=False))
        return read(said)

    def _answer(self, patches: torch.Tensor, windows: ImageWindows,
                shown: Sequence[Sequence[PreparedImage]]) -> Answer:
        height, width = shown[0][0].image.shape[:2]
        with self.computing(f'{len(windows)} times {len(shown[0])} images'):
            chosen = torch.as_tensor(np.array(windows), device=patches.device)
            answer = self.decoded(patches[chosen], (height // PATCH, width // PATCH))
            return tuple(x.float().cpu() for x in answer)  # type: ignore[return-value]


class Collection:
    """Images as the network sees them (``placed``), about which it can be asked."""

    def __init__(self, placed: Sequence[PreparedImage], answer: Answering,
                 encoded: Any = None) -> None:
        """answer: what the network says of windows whose images are of one size.

        encoded: what it keeps of the images whatever their intrinsics are.
        """
        self.placed, self._answer, self.encoded = placed, answer, encoded

    def predict(self, windows: ImageWindows) -> list[Prediction]:
        """What windows of as many images each show; those of one size in one batch.

        Each in a frame and a unit of its own, about the pixels of the images as they are
        ``placed``. White is put around images that are smaller than others of their window.
        Raises ConfigError where the device has too little memory, CheckpointError for answers
        that are no cameras.
        """
        alike: dict[tuple[int, int], list[int]] = {}
        for row, window in enumerate(windows):
            alike.setdefault(common_size([self.placed[k] for k in window]), []).append(row)
        said: dict[int, Prediction] = {}
        for size_hw, rows in alike.items():
            found = self._of_one_size(size_hw, [windows[row] for row in rows])
            said.update(zip(rows, found, strict=True))
        return [said[row] for row in range(len(windows))]

    def _of_one_size(self, size_hw: tuple[int, int], windows: ImageWindows
                     ) -> Iterator[Prediction]:
        shown = [[padded(PreparedImage(self.placed[k].image, (1.0, 1.0)), size_hw)
                  for k in window] for window in windows]
        for answer, images in zip(zip(*self._answer(windows, shown), strict=True), shown,
                                  strict=True):
            yield as_prediction(answer, images, size_hw)  # type: ignore[arg-type]
