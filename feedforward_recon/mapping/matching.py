"""Correspondences: following points by optical flow, matching them by descriptor."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial import cKDTree

from feedforward_recon.config.schema import TrackingConfig
from feedforward_recon.types import Features

MAX_LEVELS_BACK = 1  # of the pyramid on the way back, which starts at the right place
# Lucas-Kanade stops after so many steps, or when a step is shorter (px): well below
# flow_roundtrip_px; chosen by hand.
FLOW_STEPS, FLOW_STEP_PX = 20, 0.02
NEAREST = 5  # features around a predicted pixel that are compared: few are within the radius


@dataclass(frozen=True)
class Tracks:
    """Landmarks ids [n] at pixels px [n, 2] of one gray image."""

    gray: np.ndarray
    ids: np.ndarray
    px: np.ndarray

    def select(self, index: np.ndarray) -> Tracks:
        """Tracks at ``index``."""
        return Tracks(self.gray, self.ids[index], self.px[index])


def follow(tracks: Tracks, gray: np.ndarray, guess_px: np.ndarray,
           config: TrackingConfig) -> Tracks:
    """Tracks found again in another image, starting from predicted pixels [n, 2].

    A track survives when following it back returns to where it came from.
    """
    if not len(tracks.ids):
        return Tracks(gray, tracks.ids, tracks.px)
    px, trip = flow_there_and_back(tracks.gray, gray, tracks.px, guess_px,
                                   window_px=config.flow_window_px, levels=config.flow_levels)
    good = trip < config.flow_roundtrip_px
    height, width = gray.shape
    good &= (px >= 2).all(1) & (px[:, 0] < width - 2) & (px[:, 1] < height - 2)
    return Tracks(gray, tracks.ids[good], px[good])


def flow_there_and_back(gray: np.ndarray, other: np.ndarray, px: np.ndarray,
                        guess_px: np.ndarray, *, window_px: int, levels: int,
                        levels_back: int = MAX_LEVELS_BACK) -> tuple[np.ndarray, np.ndarray]:
    """Where pixels [N, 2] of one gray image are in another, and how far the way back ends off [N].

    Pyramidal Lucas-Kanade (Bouguet 2001) from a guess, with a forward-backward check (Kalal et
    al. 2010); the second is infinite where nothing is found. levels: of the pyramid above the
    full image. N > 0.
    """
    size, flags = (window_px, window_px), cv2.OPTFLOW_USE_INITIAL_FLOW
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, FLOW_STEPS, FLOW_STEP_PX)
    start = px.astype(np.float32)[:, None]
    there, found, _ = cv2.calcOpticalFlowPyrLK(
        gray, other, start, guess_px.astype(np.float32)[:, None].copy(), winSize=size,
        maxLevel=levels, criteria=stop, flags=flags)
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(
        other, gray, there, start.copy(), winSize=size, maxLevel=levels_back, criteria=stop,
        flags=flags)
    trip = np.linalg.norm(back[:, 0] - px, axis=1)
    return there[:, 0], np.where((found.ravel() > 0) & (found_back.ravel() > 0), trip, np.inf)


def match_mutual(a: np.ndarray, b: np.ndarray, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of descriptors a [N, D] and b [M, D] that are mutual nearest neighbours.

    similarity: smallest cosine of a match.
    """
    if not len(a) or not len(b):
        return np.zeros(0, int), np.zeros(0, int)
    product = a @ b.T
    best_b, best_a = product.argmax(1), product.argmax(0)
    rows = np.arange(len(a))
    mutual = (best_a[best_b] == rows) & (product[rows, best_b] > similarity)
    return rows[mutual], best_b[mutual]


def match_guided(predicted_px: np.ndarray, descriptors: np.ndarray, features: Features,
                 radius_px: float, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Guided matching: landmarks expected at pixels [L, 2] to features nearby; one to one.

    descriptors: of the landmarks [L, D]. Returns rows of the landmarks and of the features.
    """
    empty = np.zeros(0, int), np.zeros(0, int)
    if not len(predicted_px) or not len(features):
        return empty
    near = cKDTree(features.keypoints).query(predicted_px, k=min(NEAREST, len(features)),
                                             distance_upper_bound=radius_px)[1]
    near = near.reshape(len(predicted_px), -1)
    valid = near < len(features)
    score = np.einsum('ld,lkd->lk', descriptors,
                      features.descriptors[np.where(valid, near, 0)])
    score = np.where(valid, score, -1)
    column = score.argmax(1)
    landmark = np.arange(len(predicted_px))
    score, feature = score[landmark, column], near[landmark, column]
    keep = score > similarity
    landmark, feature, score = landmark[keep], feature[keep], score[keep]
    order = np.argsort(-score, kind='stable')
    first = np.unique(feature[order], return_index=True)[1]
    chosen = order[first]
    return landmark[chosen], feature[chosen]


def spread(px: np.ndarray, quality: np.ndarray, taken_px: np.ndarray, size_wh: tuple[int, int],
           count: int) -> np.ndarray:
    """Rows of at most ``count`` points [N, 2], the best of each image cell not yet taken."""
    cell = float(np.sqrt(size_wh[0] * size_wh[1] / max(1.5 * count, 1)))
    columns = int(size_wh[0] // cell) + 1

    def cell_of(points: np.ndarray) -> np.ndarray:
        grid = (points // cell).astype(int)
        return grid[:, 1] * columns + grid[:, 0]

    cells = cell_of(px)
    order = np.argsort(-quality, kind='stable')
    order = order[~np.isin(cells[order], cell_of(taken_px))]
    first = np.unique(cells[order], return_index=True)[1]
    chosen = order[np.sort(first)]
    return chosen[:max(0, count - len(taken_px))]
