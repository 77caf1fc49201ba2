"""What windows of a feed-forward network consist of, on their way in and on their way out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from feedforward_recon.config.network import WindowConfig
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.sources.anchors import Anchors
from feedforward_recon.model import Predictor
from feedforward_recon.types import Prediction


class FeedForward:
    """A predictor and the windows it is given.

    turn: held while the predictor is at work: one thread at a time uses the device.
    """

    def __init__(self, predictor: Predictor, windows: WindowConfig) -> None:
        self.predictor, self.windows = predictor, windows
        self.turn = threading.Lock()

    def predict(self, images: Sequence[np.ndarray], memory: Any = None, *,
                write: bool = True, keep: bool = True,
                K: np.ndarray | None = None) -> tuple[Prediction, Any]:
        """What images show together (see ``model.Predictor``)."""
        with self.turn:
            return self.predictor.predict(images, memory, write=write, keep=keep, K=K)


@dataclass(frozen=True)
class WaitingView:
    """A view that waits for its window; T_map_first: its pose if it starts the map."""

    view: View
    T_map_first: np.ndarray


@dataclass(frozen=True)
class Window:
    """New views, and mapped images that align them with the map; None while there is no map."""

    views: list[WaitingView]
    anchors: Anchors | None = None

    @property
    def images(self) -> list[np.ndarray]:
        """What the network is shown: anchors first."""
        known = [] if self.anchors is None else self.anchors.images
        return [*known, *(waiting.view.image for waiting in self.views)]

    @property
    def K(self) -> np.ndarray | None:
        """[3, 3] of the camera that took the images, where it was given."""
        first = self.views[0].view
        return first.camera.K if first.knows_camera else None


@dataclass(frozen=True)
class PlacedView:
    """A view with what its window predicts for it.

    prediction: of this view alone, in the map; None when the window could not be placed.
    T_map_cam: [4, 4]; None when the view does not overlap with the map; reason says why.
    covariance: [6, 6] as in ``PoseFit``. score: share of its points that another view confirms.
    """

    view: View
    prediction: Prediction | None = None
    T_map_cam: np.ndarray | None = None
    covariance: np.ndarray = field(default_factory=lambda: np.zeros((6, 6)))
    score: float = 0.0
    reason: str = ''
