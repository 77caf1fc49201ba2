"""What speaks for one place and against another, beyond the number of matches.

Furniture that stands in many places gives hundreds of matches in each of them. Two more questions
tell those apart: does another place of the map explain what agrees with a pose, and does the rest
of what should be seen from there look like the image?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.pnp import pnp_ransac
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.localization.slot_search import Similarities, paired_cosines
from feedforward_recon.memory.scene_memory import SceneMemory
from feedforward_recon.types import Features

# All measured: docs/experiments.md, Repeated furniture. A slot is like a feature with a cosine of
# ALIKE, and ALIKE_MARGIN below the best at most. Around the pose of a rival a lower cosine does:
# the same things were seen from another side there.
ALIKE, ALIKE_MARGIN, ALIKE_AT_RIVAL = 0.8, 0.1, 0.6
RIVALS, RIVAL_ITERATIONS, RIVAL_VOTES = 3, 150, 8  # places that are tried, each by a robust search
RARE = 0.85  # share above which no rival has to be looked for: it is reached in ordinary rooms
# The share of own matches that an answer needs with a score of SURE_SCORE, and with less, where a
# rival was found and where none was. Below LOW_SCORE the rest must not disagree either.
SURE_SCORE, NEEDED_IF_SURE, NEEDED, NEEDED_ALONE = 0.6, 0.3, 0.6, 0.5
LOW_SCORE, MIN_LIKENESS = 0.3, 0.3
CONFIRMED = 3  # slots seen less often may be wrong
SAME_PLACE_PX = 4.0  # between a feature and a slot that may be the same point
NEIGHBOURS = 8  # slots near a feature that are compared with it


@dataclass(frozen=True)
class Answer:
    """A pose that a memory gave an image, and what agrees with it.

    score: share of the unguided votes; horizon: depth beyond which what the map has is of other
    rooms; feature, pixels: index [M] and pixels [M, 2] of what agrees; similar: of the first
    features with all slots.
    """

    T_map_cam: np.ndarray
    score: float
    horizon: float
    feature: np.ndarray
    pixels: np.ndarray
    similar: Similarities


def holds(answer: Answer, features: Features, memory: SceneMemory, camera: Camera,
          near_px: float, seed: int) -> bool:
    """Whether the answer is the only one.

    near_px: slots projected nearer to a feature than that are of the same place.
    """
    sure = answer.score >= SURE_SCORE
    share, rivals = own_share(answer, features, memory, camera, near_px, seed,
                              NEEDED_IF_SURE if sure else NEEDED_ALONE)
    needed = NEEDED_IF_SURE if sure else NEEDED if rivals else NEEDED_ALONE
    if share < needed:
        return False
    return answer.score >= LOW_SCORE \
        or likeness(answer, features, memory, camera) >= MIN_LIKENESS


def own_share(answer: Answer, features: Features, memory: SceneMemory, camera: Camera,
              near_px: float, seed: int, needed: float
              ) -> tuple[float, int]:
    """Share of the agreeing features that nothing elsewhere in the map explains; 1 without any.

    Also returns how many rivals were found: poses elsewhere that explain some.

    In a row of like desks any of them confirms a pose before any other: only what the map has
    once says where the camera is. Rivals are not looked for where they would not change what is
    decided, below ``needed`` and above ``RARE``.
    """
    asked = np.flatnonzero(answer.feature < answer.similar.best.shape[1])
    if not len(asked):
        return 1.0, 0
    feature, pixels = answer.feature[asked], answer.pixels[asked]
    row, slot = answer.similar.alike(feature, ALIKE, ALIKE_MARGIN)
    elsewhere = ~within(answer.T_map_cam, memory.points[slot], pixels[row], camera, near_px)
    row, slot = row[elsewhere], slot[elsewhere]
    explained = np.zeros(len(asked), bool)
    explained[row] = True
    rivals = 0
    while rivals < RIVALS:
        if not needed <= 1.0 - explained.mean() < RARE:
            break
        rival = pnp_ransac(memory.points[slot], pixels[row], camera, 2 * SAME_PLACE_PX, seed,
                           RIVAL_ITERATIONS)
        if rival is None or rival.count < RIVAL_VOTES:
            break
        rivals += 1
        found, at = _explained(rival.T_map_cam, features.descriptors[feature], pixels, memory,
                               camera)
        other = ~within(answer.T_map_cam, memory.points[at], pixels[found], camera, near_px)
        explained[found[other]] = True
        row, slot = row[~rival.inliers], slot[~rival.inliers]
    return 1.0 - float(explained.mean()), rivals


def within(T_map_cam: np.ndarray, points: np.ndarray, pixels: np.ndarray, camera: Camera,
           limit_px: float) -> np.ndarray:
    """Mask [N] of points [N, 3] that a camera sees within ``limit_px`` of pixels [N, 2]."""
    seen = camera.project(transform_points(inverse(T_map_cam), points))
    with np.errstate(invalid='ignore'):
        return np.linalg.norm(seen - pixels, axis=1) < limit_px


def in_view(T_map_cam: np.ndarray, points: np.ndarray, camera: Camera,
            horizon: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 3] that project into the image: index [M] and pixels [M, 2].

    horizon: only those nearer than that, in map units.
    """
    in_cam = transform_points(inverse(T_map_cam), points)
    pixels = camera.project(in_cam)
    with np.errstate(invalid='ignore'):
        inside = np.all((pixels > 0) & (pixels < np.array(camera.size_wh)), axis=1)
    inside &= in_cam[:, 2] < horizon
    return np.flatnonzero(inside), pixels[inside]


def _explained(T_map_cam: np.ndarray, descriptors: np.ndarray, pixels: np.ndarray,
               memory: SceneMemory, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (feature, slot) that are near each other and alike, seen from a pose.

    descriptors [N, D] and pixels [N, 2] of the features.
    """
    slot, shown = in_view(T_map_cam, memory.points, camera)
    if not len(slot):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    distance, near = cKDTree(shown).query(pixels, NEIGHBOURS,
                                          distance_upper_bound=2 * SAME_PLACE_PX)
    row, column = np.nonzero(np.isfinite(distance))
    slot = slot[near[row, column]]
    alike = paired_cosines(memory.descriptors.numpy(), slot, descriptors, row) > ALIKE_AT_RIVAL
    return row[alike], slot[alike]


def likeness(answer: Answer, features: Features, memory: SceneMemory, camera: Camera) -> float:
    """Median cosine of confirmed slots and the features they should show at; 1 without any.

    Where the camera is, much of what the map has shows in the image, even from a new side. In
    another place with the same chairs all but the chairs is unrelated. Hidden slots count as
    unrelated too, so a low value alone refuses nothing; those of other rooms do not count.
    """
    confirmed = np.flatnonzero(memory.slot_counts.numpy()[memory.occupied] >= CONFIRMED)
    shown, pixels = in_view(answer.T_map_cam, memory.points[confirmed], camera, answer.horizon)
    if not len(shown):
        return 1.0
    distance, near = cKDTree(features.keypoints).query(pixels,
                                                       distance_upper_bound=SAME_PLACE_PX)
    met = np.isfinite(distance)
    if not met.any():
        return 1.0
    cosine = np.einsum('nd,nd->n', memory.descriptors.numpy()[confirmed[shown[met]]],
                       features.descriptors[near[met]])
    return float(np.median(cosine))
