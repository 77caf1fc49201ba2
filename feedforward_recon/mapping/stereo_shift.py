"""The shift of a stereo pair: what is left of its calibration error, refined while mapping.

A turn of one camera about its vertical axis by a hundredth of a degree and more moves all
disparities by the same number of pixels. One pair of images cannot tell that from depth, but a
moving camera can: bundle adjustment refines one shift of all inverse depths
(``BundleProblem.shifted``), and what was measured before is corrected here.
"""

from __future__ import annotations

import numpy as np

from feedforward_recon.mapping.map import GrowingMap


def from_this_pair(map_: GrowingMap) -> np.ndarray:
    """Mask [K] of keyframes whose depth came from the stereo pair of this session."""
    return np.array([k.inv_depth_noise is not None and k.frame >= 0 for k in map_.keyframes],
                    bool)


def shift_inv_depth(map_: GrowingMap, shift: float) -> None:
    """Take ``shift`` (1/m) off all inverse depths of this pair; where none is left, they go."""
    own, table = from_this_pair(map_), map_.landmarks
    rows = np.flatnonzero(own[table.seen_keyframe])
    table.seen_inv_depth[rows] = _shifted(table.seen_inv_depth[rows], shift)
    for id_ in np.flatnonzero(own):
        points = map_.keyframes[id_].points_cam
        with np.errstate(divide='ignore'):
            points *= (1 / (points[:, 2] * _shifted(1 / points[:, 2], shift)))[:, None]


def _shifted(inv_depth: np.ndarray, shift: float) -> np.ndarray:
    left = inv_depth - shift
    return np.where(left > 0, left, np.nan)
