"""Localisation peer: SIFT, VLAD retrieval, matching, PnP - the recipe of hloc, with depth.

Mapping images with known poses store their RootSIFT features that have depth. A query is
compared with all images by VLAD, matched with the best ones (ratio test), and its pose found by
pycolmap's LO-RANSAC with refinement. The map grows with the number of images it keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from scipy.cluster.vq import kmeans2, vq

from benchmarks.common import KITCHEN, Clock, load_frames, with_lens
from benchmarks.scoring import extrapolation_split, interleaved_split, localisation_entry
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.types import Frame

FEATURES = 2000
WORDS = 64
RETRIEVED = 10
RATIO = 0.8
MAX_DEPTH_M = 8.0
MIN_INLIERS = 12


@dataclass(frozen=True)
class MapImage:
    """Descriptors uint8 [N, 128] and their map points float32 [N, 3]."""

    descriptors: np.ndarray
    points_map: np.ndarray


class SiftMap:
    """A map of whole images, as retrieval-based localisation keeps it."""

    def __init__(self, frames: list[Frame]) -> None:
        self._sift = cv2.SIFT_create(nfeatures=FEATURES)
        self.images = [self._map_image(frame) for frame in frames]
        sample = np.concatenate([image.descriptors[::10] for image in self.images])
        self._words, _ = kmeans2(sample.astype(np.float32), WORDS, minit='++', seed=0)
        self._global = np.stack([self._vlad(image.descriptors) for image in self.images])

    @property
    def nbytes(self) -> int:
        """What must be stored: descriptors at one byte, points, VLAD in half precision."""
        local = sum(i.descriptors.nbytes + i.points_map.nbytes for i in self.images)
        return local + self._global.size * 2 + self._words.size * 2

    def _features(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels float [N, 2] and RootSIFT uint8 [N, 128] (Arandjelovic and Zisserman 2012)."""
        keypoints, raw = self._sift.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY),
                                                     None)
        root = np.sqrt(raw / np.maximum(raw.sum(1, keepdims=True), 1e-9))
        return cv2.KeyPoint.convert(keypoints), np.round(512 * root).clip(0, 255).astype(np.uint8)

    def _map_image(self, frame: Frame) -> MapImage:
        assert frame.depth is not None
        assert frame.camera is not None
        assert frame.T_map_cam is not None
        pixels, descriptors = self._features(frame.image)
        column, row = np.round(pixels).astype(int).T
        depth = frame.depth[row, column]
        known = (depth > 0) & (depth < MAX_DEPTH_M)
        points_cam = frame.camera.unproject(pixels[known], depth[known])
        points_map = transform_points(frame.T_map_cam, points_cam).astype(np.float32)
        return MapImage(descriptors[known], points_map)

    def _vlad(self, descriptors: np.ndarray) -> np.ndarray:
        """Intra-normalised VLAD [WORDS * 128] (Arandjelovic and Zisserman 2013)."""
        values = descriptors.astype(np.float32)
        word, _ = vq(values, self._words)
        residual = np.zeros_like(self._words)
        np.add.at(residual, word, values - self._words[word])
        residual /= np.maximum(np.linalg.norm(residual, axis=1, keepdims=True), 1e-9)
        return (residual / np.linalg.norm(residual)).ravel()

    def localise(self, frame: Frame) -> np.ndarray | None:
        """T_map_cam [4, 4] of a query, or None."""
        import pycolmap

        assert frame.camera is not None
        pixels, descriptors = self._features(frame.image)
        best = np.argsort(self._global @ self._vlad(descriptors))[::-1][:RETRIEVED]
        matched = [match(descriptors, self.images[index]) for index in best]
        feature = np.concatenate([query for query, _ in matched])
        points = np.concatenate([points for _, points in matched])
        if len(points) < MIN_INLIERS:
            return None
        camera = pycolmap.Camera(model='PINHOLE', width=frame.camera.width,
                                 height=frame.camera.height, params=frame.camera.K[
                                     [0, 1, 0, 1], [0, 1, 2, 2]] + [0, 0, 0.5, 0.5])
        flat = frame.camera.normalise(pixels) @ frame.camera.K[:2, :2] + frame.camera.K[:2, 2]
        options = pycolmap.AbsolutePoseEstimationOptions()
        options.ransac.max_error = 8.0  # hloc's choice for indoor scenes is 8 to 12
        options.ransac.random_seed = 0
        answer = pycolmap.estimate_and_refine_absolute_pose(
            flat[feature] + 0.5, points.astype(float), camera, options)
        if answer is None or answer['num_inliers'] < MIN_INLIERS:
            return None
        T_cam_map = np.eye(4)
        T_cam_map[:3] = answer['cam_from_world'].matrix()
        return inverse(T_cam_map)


def match(query: np.ndarray, image: MapImage) -> tuple[np.ndarray, np.ndarray]:
    """Indices [M] of query features and their map points [M, 3], by Lowe's ratio test."""
    similarity = _unit(query) @ _unit(image.descriptors).T
    rows = np.arange(len(query))
    nearest = similarity.argmax(1)
    first = similarity[rows, nearest]
    similarity[rows, nearest] = -1
    # Of unit vectors the squared distance is 2 - 2 cosine.
    good = np.flatnonzero(1 - first < RATIO**2 * (1 - similarity.max(1)))
    return good, image.points_map[nearest[good]]


def _unit(descriptors: np.ndarray) -> np.ndarray:
    values = descriptors.astype(np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9)


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Both splits of the kitchen, keeping every mapping image or every fifth.

    The last also with the lens that mapping finds, which this recipe does not look for.
    """
    given = load_frames(KITCHEN)
    for split, (mapped, query) in {'interleaved': interleaved_split(len(given)),
                                   'extrapolation': extrapolation_split(len(given))}.items():
        for every, kept, frames in (
                (1, 'all mapping images', given), (5, 'every 5th mapping image', given),
                (5, 'every 5th mapping image, lens given', with_lens(given))):
            clock = Clock()
            scene = SiftMap([frames[index] for index in mapped[::every]])
            clock.stop()
            name = f'{KITCHEN} {split} | SIFT + VLAD + PnP, {kept}'
            yield name, localisation_entry(scene.localise, [frames[i] for i in query],
                                           scene.nbytes, clock)
