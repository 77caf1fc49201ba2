"""What speaks for one place and against another, beyond the number of matches.

Furniture that stands in many places gives hundreds of matches in each of them. Two more questions
tell those apart: is what agrees with a pose found in the map once, and does the rest of what
should be seen from there look like the image?
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.localization.slot_search import Similarities
from feedforward_recon.memory.scene_memory import SceneMemory
from feedforward_recon.types import Features

# A slot is like a feature with a cosine of ALIKE, and ALIKE_MARGIN below the best at most. These
# and CONFIRMED were measured: docs/experiments.md, Repeated furniture.
ALIKE, ALIKE_MARGIN = 0.8, 0.1
CONFIRMED = 3  # slots seen less often may be wrong
SAME_PLACE_PX = 4.0  # between a feature and a slot that may be the same point


def own_share(T_map_cam: np.ndarray, feature: np.ndarray, pixels: np.ndarray,
              similar: Similarities, points: np.ndarray, camera: Camera, near_px: float) -> float:
    """Share of the matched features that look like no slot of another place; 1 without any.

    feature, pixels: index [M] and pixels [M, 2] of features that agree with the pose; points:
    those of the slots [V, 3]; near_px: slots projected nearer than that are of this place.
    In a row of like desks any of them confirms a pose before any other: only what the map has
    once says where the camera is.
    """
    asked = np.flatnonzero(feature < similar.best.shape[1])
    if not len(asked):
        return 1.0
    row, slot = similar.alike(feature[asked], ALIKE, ALIKE_MARGIN)
    seen = camera.project(transform_points(inverse(T_map_cam), points[slot]))
    with np.errstate(invalid='ignore'):
        here = np.linalg.norm(seen - pixels[asked[row]], axis=1) < near_px
    return 1.0 - len(np.unique(row[~here])) / len(asked)


def likeness(T_map_cam: np.ndarray, features: Features, memory: SceneMemory, camera: Camera
             ) -> float:
    """Median cosine of confirmed slots and the features they should show at; 1 without any.

    Where the camera is, much of what the map has shows in the image, even from a new side. In
    another place with the same chairs all but the chairs is unrelated. Hidden slots count as
    unrelated too, so a low value alone refuses nothing.
    """
    confirmed = memory.slot_counts.numpy()[memory.occupied] >= CONFIRMED
    pixels = camera.project(transform_points(inverse(T_map_cam), memory.points[confirmed]))
    with np.errstate(invalid='ignore'):
        inside = np.all((pixels > 0) & (pixels < np.array(camera.size_wh)), axis=1)
    if not inside.any():
        return 1.0
    distance, near = cKDTree(features.keypoints).query(pixels[inside],
                                                       distance_upper_bound=SAME_PLACE_PX)
    met = np.isfinite(distance)
    slot = np.flatnonzero(confirmed)[inside][met]
    if not len(slot):
        return 1.0
    cosine = np.einsum('nd,nd->n', memory.descriptors.numpy()[slot],
                       features.descriptors[near[met]])
    return float(np.median(cosine))
