"""What windows of a feed-forward network consist of, on their way in and on their way out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from feedforward_recon.config.network import WindowConfig
from feedforward_recon.mapping.sources.anchors import Anchors
from feedforward_recon.model import Predictor
from feedforward_recon.types import Frame, Prediction


class FeedForward:
    """A predictor and the windows it is given; one thread at a time uses the device."""

    def __init__(self, predictor: Predictor, windows: WindowConfig) -> None:
        self.predictor, self.windows = predictor, windows
        self._turn = threading.Lock()

    def predict(self, images: Sequence[np.ndarray], memory: Any = None, *,
                write: bool = True) -> tuple[Prediction, Any]:
        """What images show together (see ``model.Predictor``)."""
        with self._turn:
            return self.predictor.predict(images, memory, write=write)


@dataclass(frozen=True)
class Placement:
    """One frame as a window places it; T_map_cam is None when nothing ties it to the map."""

    T_map_cam: np.ndarray | None = None
    covariance: np.ndarray | None = None
    score: float = 0.0
    reason: str = ''


@dataclass(frozen=True)
class Placed:
    """A frame with what its window says about it: a prediction [1] in the map, and its place."""

    frame: Frame
    prediction: Prediction | None
    placement: Placement


@dataclass(frozen=True)
class Window:
    """New frames, and mapped images that tie them to the map; None while there is no map."""

    frames: list[Frame]
    anchors: Anchors | None = None
