"""Dense clouds of a camera that measures no depth: a network says it, and the map corrects it.

    keyframe -> depth of its image alone, by a network, some keyframes later
             -> bent to the landmarks that it sees (`geometry.depth_correction`): scale and slant
             -> kept where keyframes beside it say the same, and away from steps of depth
             -> cloud of the keyframe, as a depth sensor would have given
    finished map -> bent anew to where its landmarks are then

A network's own confidence is no help here: points that it is sure of are no better
(docs/experiments.md).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import map_coordinates

from feedforward_recon.config.schema import CloudConfig
from feedforward_recon.geometry.depth_correction import SparseDepth, corrected
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.mapping.cloud import sampled_depth
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.model import Predictor

CELLS = 32  # along the longer side of an image, where its depth is bent
SETTLED = 2  # newer keyframes after which the landmarks of a keyframe are firm
BESIDE = 3  # keyframes before and after that are asked
MIN_LANDMARKS, MIN_VIEWS = 20, 3  # of a keyframe whose depth is bent; of such a landmark
DEVIATION = 0.03  # of the logarithm of the depth of a landmark
AGREED = 0.05  # difference of the logarithm of depth of keyframes that say the same
SHARE = 0.6  # of the keyframes that see a point: so many have to
TINY = 1e-6  # depth whose logarithm is finite
STEP = 0.15  # of the logarithm of depth to the next cell: beyond, it is an edge


@dataclass(frozen=True)
class CellDepth:
    """Logarithm of the depth of cells of a keyframe: as said, and bent; float64 [h, w]."""

    said: np.ndarray
    bent: np.ndarray

    def read(self, pixels: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
        """Bent log depth at pixels [N, 2] of an image of that size; NaN outside of it."""
        inside = ((pixels > -0.5) & (pixels < np.array(size_wh) - 0.5)).all(1)
        at = _cell(np.where(np.asarray(inside)[:, None], pixels, 0), size_wh, self.bent.shape)
        read = map_coordinates(self.bent, at[:, ::-1].T, order=1, mode='nearest')
        return np.where(inside, read, np.nan)

    def corrected_depth(self, depth: np.ndarray) -> np.ndarray:
        """What was said as depth [H, W], bent; 0 in cells beside which depth jumps."""
        size_wh = depth.shape[1], depth.shape[0]
        change = cv2.resize(self.bent - self.said, size_wh, interpolation=cv2.INTER_LINEAR)
        step = cv2.resize(_steps(self.bent).astype(np.uint8), size_wh,
                          interpolation=cv2.INTER_NEAREST)
        return depth * np.exp(change) * (step == 0)


class DenseClouds:
    """Gives keyframes of a growing map their clouds; holds the images of a few."""

    def __init__(self, network: Predictor, config: CloudConfig) -> None:
        self._network, self._stride_px = network, config.stride_px
        self._waiting: deque[tuple[int, View]] = deque()
        self._seen: deque[tuple[int, View, np.ndarray]] = deque()  # with the depth said
        self._cells: dict[int, CellDepth] = {}

    def saw(self, keyframe: int, view: View) -> None:
        """A new keyframe, by its number."""
        if view.depth is None:
            self._waiting.append((keyframe, view))

    def clear(self) -> None:
        """The map begins anew."""
        self._waiting.clear()
        self._seen.clear()
        self._cells.clear()

    def work(self, map_: GrowingMap, *, final: bool = False) -> bool:
        """The next step for one keyframe; False if all wait for newer ones.

        final: none will follow. Raises what the network raises.
        """
        newest = len(map_) - 1
        if self._waiting and (final or self._waiting[0][0] + SETTLED <= newest):
            self._look(map_, *self._waiting.popleft())
        elif self._seen and (final or self._seen[0][0] + BESIDE + SETTLED <= newest):
            self._give_cloud(map_, *self._seen.popleft())
        else:
            return False
        return True

    def finish(self, map_: GrowingMap) -> None:
        """Bend all clouds to the landmarks as they are now."""
        while self.work(map_, final=True):
            pass
        firm = _firm(map_)
        for number, before in self._cells.items():
            keyframe = map_.keyframes[number]
            cells = bent_to_landmarks(map_, number, before.said, firm)
            if cells is None or not len(keyframe.cloud_cam):
                continue
            at, size_wh = keyframe.camera.project(keyframe.cloud_cam), keyframe.camera.size_wh
            moved = cells.read(at, size_wh) - before.read(at, size_wh)
            factor = np.exp(np.nan_to_num(moved))[:, None]
            keyframe.cloud_cam = (keyframe.cloud_cam * factor).astype(keyframe.cloud_cam.dtype)
            self._cells[number] = cells

    def _look(self, map_: GrowingMap, number: int, view: View) -> None:
        """Ask the network, and bend what it says."""
        said = self._network.predict([view.image], keep=False, K=view.camera.K)[0].depth[0]
        cells = bent_to_landmarks(map_, number, _on_cells(said), _firm(map_))
        if cells is not None:
            self._cells[number] = cells
            self._seen.append((number, view, said))

    def _give_cloud(self, map_: GrowingMap, number: int, view: View, said: np.ndarray) -> None:
        depth = self._cells[number].corrected_depth(said)
        points, colours = sampled_depth(view.camera, view.image, depth, self._stride_px)
        kept = self._agreed(map_, number, points)
        keyframe = map_.keyframes[number]
        keyframe.cloud_cam, keyframe.cloud_rgb = points[kept], colours[kept]

    def _agreed(self, map_: GrowingMap, number: int, points_cam: np.ndarray) -> np.ndarray:
        """Mask [P] of points that most keyframes beside, which should see them, see there."""
        points = transform_points(map_.T_map_cam[number], points_cam)
        seen, agreed = np.zeros(len(points)), np.zeros(len(points))
        for other in range(number - BESIDE, number + BESIDE + 1):
            if other == number or other not in self._cells:
                continue
            camera = map_.keyframes[other].camera
            local = transform_points(inverse(map_.T_map_cam[other]), points)
            there = self._cells[other].read(camera.project(local), camera.size_wh)
            seen += np.isfinite(there)
            agreed += np.abs(np.log(np.maximum(local[:, 2], TINY)) - there) < AGREED
        return (agreed > 0) & (agreed >= SHARE * seen)


def _firm(map_: GrowingMap) -> np.ndarray:
    """Mask [L] of the landmarks whose depth is believed."""
    return map_.landmarks.has_point & (map_.landmarks.views() >= MIN_VIEWS)


def bent_to_landmarks(map_: GrowingMap, number: int, said: np.ndarray, firm: np.ndarray
                      ) -> CellDepth | None:
    """Log depth [h, w] of a keyframe, bent to the firm landmarks it sees; None if these are few.

    firm: mask [L] of all landmarks.
    """
    keyframe, table = map_.keyframes[number], map_.landmarks
    ids = np.maximum(keyframe.landmark, 0)
    shown = (keyframe.landmark >= 0) & firm[ids]
    points = table.points_map(ids[shown], map_.T_map_cam)
    z = transform_points(inverse(map_.T_map_cam[number]), points)[:, 2]
    at = _cell(keyframe.features.keypoints[shown], keyframe.camera.size_wh, said.shape)[z > 0]
    if len(at) < MIN_LANDMARKS:
        return None
    seen = SparseDepth(at, np.log(z[z > 0]), np.full(len(at), DEVIATION))
    return CellDepth(said, corrected(said, seen))


def _on_cells(depth: np.ndarray) -> np.ndarray:
    """Log depth [h, w] of cells of a depth map [H, W]."""
    height, width = depth.shape
    scale = CELLS / max(height, width)
    size_wh = max(2, round(width * scale)), max(2, round(height * scale))
    return cv2.resize(np.log(np.maximum(depth, TINY)), size_wh,
                      interpolation=cv2.INTER_AREA).astype(float)


def _cell(xy: np.ndarray, size_wh: tuple[int, int], grid_hw: tuple[int, ...]) -> np.ndarray:
    """Pixels [N, 2] on the grid of cells, the middle of the first at 0."""
    return (xy + 0.5) * np.array(grid_hw[::-1]) / np.array(size_wh) - 0.5


def _steps(log_depth: np.ndarray) -> np.ndarray:
    """Mask [h, w] of cells beside which depth jumps."""
    step = np.zeros(log_depth.shape, bool)
    down, across = (np.abs(np.diff(log_depth, axis=axis)) > STEP for axis in (0, 1))
    step[1:] |= down
    step[:-1] |= down
    step[:, 1:] |= across
    step[:, :-1] |= across
    return step
