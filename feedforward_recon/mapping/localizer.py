"""``Localizer``: one image, one frozen memory, a pose - or an honest refusal.

    features -> candidates (slots by attention, network by regression) -> robust PnP
             -> guided re-matching around the pose -> refinement -> accept or refuse

The global candidates only have to be right often enough for RANSAC; the accuracy comes from
projecting all slots with the first pose and matching again within a few pixels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial import cKDTree

from feedforward_recon.config import LocalizerConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.resection import (
    MIN_DEPTH,
    Resection,
    find_pose,
    map_covariance,
    refine_pose,
)
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.memory.snapshot import SceneMemory
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate, Features, Frame, Status


NEIGHBOURS = 4
ATTENTION_TEMPERATURE = 0.05
MIN_SIGMA_PX = 1.5
INLIER_WEIGHT = 0.5


@dataclass(frozen=True)
class Matches:
    """Candidate correspondences: map points [M, 3], features [M], expected error [M] (px)."""

    points: np.ndarray
    feature: np.ndarray
    sigma_px: np.ndarray

    def __len__(self) -> int:
        return len(self.feature)

    def joined(self, other: Matches) -> Matches:
        """Both sets of candidates."""
        return Matches(np.concatenate([self.points, other.points]),
                       np.concatenate([self.feature, other.feature]),
                       np.concatenate([self.sigma_px, other.sigma_px]))

    def select(self, index: np.ndarray) -> Matches:
        """Candidates at ``index``."""
        return Matches(self.points[index], self.feature[index], self.sigma_px[index])


class Localizer:
    """Finds images in a frozen memory. Keeps no state between calls.

    Raises InputError when a frame without camera is given and no camera was set.
    """

    def __init__(self, memory: SceneMemory, encoder: Encoder,
                 config: LocalizerConfig | None = None, camera: Camera | None = None) -> None:
        self.memory, self.encoder = memory, encoder
        self.config = config or LocalizerConfig()
        self.camera = camera
        self._keys = memory.descriptors.bfloat16().T.contiguous()  # [D, V]
        self._values = memory.descriptors.numpy()

    def localize(self, frame: Frame, T_map_cam_hint: np.ndarray | None = None) -> Estimate:
        """Pose of a frame in the map, or NOT_LOCALISED with the reason."""
        started = time.perf_counter()
        camera = frame.camera or self.camera
        if camera is None:
            raise InputError(f'{frame.source or "image"}: expected a camera to localise with, '
                             'found none; give --fx --fy --cx --cy or --fov')
        features = self.encoder.encode(frame.image)
        estimate = self.localize_features(features, camera, T_map_cam_hint)
        return replace(estimate, stamp_ns=frame.stamp_ns, source=frame.source,
                       latency_ms=1e3 * (time.perf_counter() - started))

    def localize_features(self, features: Features, camera: Camera,
                          T_map_cam_hint: np.ndarray | None = None) -> Estimate:
        """Pose of an encoded image (stamp, source and latency are left empty)."""
        if len(features) < self.config.min_inliers:
            return _refusal('TOO_FEW_FEATURES')
        rays = camera.normalise(features.keypoints)
        candidates = self._candidates(features)
        start = self._search(candidates, rays, camera, T_map_cam_hint)
        if start is None:
            return _refusal('NO_CONSISTENT_POSE')
        resection = start
        for radius_px in self.config.radii_px:
            matches = self._rematch(features, rays, camera, resection.T_cam_map, radius_px)
            if len(matches) < self.config.min_inliers:
                return _refusal('TOO_FEW_MATCHES')
            resection = refine_pose(matches.points, rays[matches.feature],
                                    matches.sigma_px / camera.fx, resection.T_cam_map)
        return self._judged(resection, candidates, rays, camera)

    def _candidates(self, features: Features) -> Matches:
        """The surest answers of both readings of the memory."""
        network = self._from_network(features, np.arange(len(features)))
        surest = np.argsort(network.sigma_px, kind='stable')[:self.config.network_candidates]
        candidates = network.select(surest)
        if len(self._values):
            candidates = self._from_slots(features).joined(candidates)
        return candidates

    def _from_slots(self, features: Features) -> Matches:
        """Mutual nearest neighbours between the most confident features and all slots."""
        count = min(self.config.slot_queries, len(features))
        keys = torch.from_numpy(features.descriptors[:count]).bfloat16()
        similarity = (keys @ self._keys).float()  # [count, V]
        best, slot = similarity.max(1)
        back = similarity[:, slot].argmax(0).numpy()
        chosen = np.flatnonzero((back == np.arange(count))
                                & (best.numpy() > self.config.min_similarity))
        return Matches(self.memory.points[slot.numpy()[chosen]], chosen,
                       _slot_sigma_px(best.numpy()[chosen]))

    def _from_network(self, features: Features, index: np.ndarray) -> Matches:
        points, sigma_px = self.memory.predict(features.descriptors[index])
        return Matches(points, index, np.maximum(sigma_px, MIN_SIGMA_PX))

    def _search(self, candidates: Matches, rays: np.ndarray, camera: Camera,
                T_map_cam_hint: np.ndarray | None) -> Resection | None:
        """The pose most candidates agree with; a hint only competes, it never decides."""
        config = self.config
        threshold = config.search_px / camera.fx
        found = find_pose(candidates.points, rays[candidates.feature], threshold,
                          iterations=config.search_iterations, seed=config.seed)
        starts = [] if found is None else [found[0]]
        if T_map_cam_hint is not None:
            starts.append(inverse(T_map_cam_hint))
        if not starts:
            return None
        votes = [_agreement(T, candidates, rays, threshold) for T in starts]
        best = int(np.argmax([v.sum() for v in votes]))
        inliers = candidates.select(np.flatnonzero(votes[best]))
        if len(inliers) < config.min_votes:
            return None
        return refine_pose(inliers.points, rays[inliers.feature], inliers.sigma_px / camera.fx,
                           starts[best])

    def _rematch(self, features: Features, rays: np.ndarray, camera: Camera,
                 T_cam_map: np.ndarray, radius_px: float) -> Matches:
        """Slots seen from a pose, read by softmax attention among those near each feature.

        Features without a slot keep the network's answer.
        """
        slots = self._attend(features, camera, T_cam_map, radius_px)
        rest = np.setdiff1d(np.arange(len(features)), slots.feature)
        network = self._from_network(features, rest)
        surest = np.argsort(network.sigma_px, kind='stable')[:self.config.network_candidates]
        return slots.joined(network.select(surest))

    def _attend(self, features: Features, camera: Camera, T_cam_map: np.ndarray,
                radius_px: float) -> Matches:
        visible, pixels = self._visible(camera, T_cam_map)
        tree = cKDTree(features.keypoints)
        _, near = tree.query(pixels, NEIGHBOURS, distance_upper_bound=radius_px)
        slot, column = np.nonzero(near < len(features))
        feature = near[slot, column]
        similarity = np.einsum('nd,nd->n', self._values[visible[slot]],
                               features.descriptors[feature])
        alike = similarity > self.config.min_similarity
        slot, feature, similarity = visible[slot[alike]], feature[alike], similarity[alike]
        attention = np.exp((similarity - 1) / ATTENTION_TEMPERATURE)
        total = np.bincount(feature, attention, len(features))
        read = np.flatnonzero(total)
        points = np.stack([np.bincount(feature, attention * self.memory.points[slot, axis],
                                       len(features))[read] for axis in range(3)], 1)
        best = np.zeros(len(features))
        np.maximum.at(best, feature, similarity)
        return Matches(points / total[read, None], read, _slot_sigma_px(best[read]))

    def _visible(self, camera: Camera, T_cam_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots in front of the camera and inside the image, and their pixels [M, 2]."""
        pixels = camera.project(transform_points(T_cam_map, self.memory.points))
        with np.errstate(invalid='ignore'):
            inside = np.all((pixels > 0) & (pixels < np.array(camera.size_wh)), axis=1)
        visible = np.flatnonzero(inside)
        return visible, pixels[visible]

    def _judged(self, resection: Resection, candidates: Matches, rays: np.ndarray,
                camera: Camera) -> Estimate:
        """Accept the pose, or say why not.

        The score counts the *unguided* candidates that agree: guided matches lie near the
        pose by construction and would flatter it.
        """
        config = self.config
        threshold = config.search_px / camera.fx
        agree = _agreement(resection.T_cam_map, candidates, rays, threshold)
        score = float(agree.mean())
        runner_up = self._runner_up(candidates.select(np.flatnonzero(~agree)), rays,
                                    threshold) / len(candidates)
        inliers = int((resection.weights > INLIER_WEIGHT).sum())
        if inliers < config.min_inliers or score < config.min_score:
            return replace(_refusal('TOO_FEW_INLIERS'), inliers=inliers, score=score,
                           runner_up=runner_up)
        if runner_up > config.max_runner_up * score:
            return replace(_refusal('AMBIGUOUS'), inliers=inliers, score=score,
                           runner_up=runner_up)
        return Estimate(0, Status.TRACKING, inverse(resection.T_cam_map),
                        map_covariance(resection, config.covariance_scale), inliers, score,
                        runner_up)

    def _runner_up(self, rest: Matches, rays: np.ndarray, threshold: float) -> int:
        """Votes for the best pose among the candidates that disagree with the answer."""
        found = find_pose(rest.points, rays[rest.feature], threshold, seed=self.config.seed,
                          iterations=self.config.search_iterations // 4)
        return 0 if found is None else len(found[1])


def _agreement(T_cam_map: np.ndarray, matches: Matches, rays: np.ndarray,
               threshold: float) -> np.ndarray:
    """Mask [M] of candidates whose reprojection error is below ``threshold``."""
    in_cam = transform_points(T_cam_map, matches.points)
    front = in_cam[:, 2] > MIN_DEPTH
    projected = in_cam[:, :2] / np.where(front, in_cam[:, 2], 1.0)[:, None]
    error = np.linalg.norm(projected - rays[matches.feature], axis=1)
    return front & (error < threshold)


def _slot_sigma_px(similarity: np.ndarray) -> np.ndarray:
    """Expected reprojection error of a slot match: one pixel, more for a poor likeness."""
    return 1.0 + 5.0 * (1.0 - similarity)


def _refusal(reason: str) -> Estimate:
    return Estimate(0, Status.NOT_LOCALISED, reason=reason)
