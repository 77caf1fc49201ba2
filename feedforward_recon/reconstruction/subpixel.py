"""Where images of one point really are: patches aligned with that of one reference image.

Corners that are found image by image are good to half a pixel. A patch around the point in one
image, warped as the geometry says, is found in the others to a tenth (Furukawa and Ponce,
"Accurate camera calibration from multi-view stereo and bundle adjustment", IJCV 2009), by the
inverse compositional steps of Lucas and Kanade (Baker and Matthews, IJCV 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.reconstruction.tracks import PointTracks

# What patches are worth: docs/experiments.md, Photos. These numbers are chosen by hand.
RADIUS = 6  # of a patch, px of the reference image
STEPS, MAX_STEP_PX, CONVERGED_PX = 6, 1.0, 0.1
MAX_SHIFT_PX = 3.0  # from where the corner was found
MIN_CORRELATION = 0.8  # of the patch with the one that was found
MIN_CONTRAST = 30.0  # norm of the patch without its mean; gray levels
ROWS = 8000  # patches per call: OpenCV maps at most 32767 rows

_SIDE = np.arange(-RADIUS, RADIUS + 1, dtype=np.float32)
OFFSETS = np.stack(np.meshgrid(_SIDE, _SIDE), -1).reshape(-1, 2)  # [S, 2]


def patches_aligned(grays: Sequence[np.ndarray], cameras: Sequence[Camera],
                    T_map_cam: np.ndarray, tracks: PointTracks, points: np.ndarray
                    ) -> PointTracks:
    """Tracks with their pixels aligned; observations that were not found again are gone.

    grays: uint8 images [H, W]; points: [count, 3] in the map. The observation from nearest to
    the mean direction of its views is the reference of a point, and stays where it is.
    """
    towards, normals = _views(T_map_cam, tracks, points)
    reference = _references(tracks, (towards * normals[tracks.point]).sum(1))
    px, found = tracks.px.copy(), np.zeros(len(tracks), bool)
    warps = _warps(cameras, T_map_cam, tracks, points, normals, reference)
    patches = np.zeros((tracks.count, len(OFFSETS)), np.float32)
    for image, rows in tracks.by_image():
        own = rows[reference[tracks.point[rows]] == rows]
        patches[tracks.point[own]] = _sampled(grays[image], px[own, None] + OFFSETS)
    gradients = _gradients(patches)
    patches -= patches.mean(1, keepdims=True)
    usable = np.linalg.norm(patches, axis=1) > MIN_CONTRAST
    found[reference[usable]] = True
    for image, rows in tracks.by_image():
        rows = rows[usable[tracks.point[rows]] & ~found[rows]
                    & np.isfinite(warps[rows]).all((1, 2))]
        point = tracks.point[rows]
        px[rows], found[rows] = _found(grays[image], px[rows], warps[rows], patches[point],
                                       gradients[point])
    return replace(tracks, px=px).select(found)


def _found(gray: np.ndarray, start: np.ndarray, warps: np.ndarray, patches: np.ndarray,
           gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where warped patches [n, S] are near pixels [n, 2] of an image, and whether [n] they are.

    Brightness and contrast may differ. gradients: of the patches, [n, S, 2].
    """
    at, moved = start.copy(), np.zeros(len(start))
    size = np.linalg.norm(patches, axis=1)
    shape = OFFSETS @ np.swapaxes(warps, 1, 2)
    J = gradients @ np.linalg.inv(warps)
    J -= J.mean(1, keepdims=True)
    H = np.swapaxes(J, 1, 2) @ J + 1e-3 * np.eye(2)
    correlation = np.zeros(len(start))
    for _ in range(STEPS):
        values = _sampled(gray, at[:, None] + shape)
        values -= values.mean(1, keepdims=True)
        values *= (size / np.maximum(np.linalg.norm(values, axis=1), 1e-3))[:, None]
        correlation = (values * patches).sum(1) / size**2
        step = np.linalg.solve(H, np.swapaxes(J, 1, 2) @ (patches - values)[..., None])[..., 0]
        at += np.clip(step, -MAX_STEP_PX, MAX_STEP_PX)
        moved = np.linalg.norm(step, axis=1)
    good = ((correlation > MIN_CORRELATION) & (moved < CONVERGED_PX)
            & (np.linalg.norm(at - start, axis=1) < MAX_SHIFT_PX))
    return np.where(good[:, None], at, start), good


def _views(T_map_cam: np.ndarray, tracks: PointTracks, points: np.ndarray
           ) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [O, 3] from points to the cameras that see them, and their sums [count, 3]."""
    towards = T_map_cam[tracks.image, :3, 3] - points[tracks.point]
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    sums = np.zeros((tracks.count, 3))
    np.add.at(sums, tracks.point, towards)
    return towards, sums


def _references(tracks: PointTracks, closeness: np.ndarray) -> np.ndarray:
    """The observation [count] of each point with the largest closeness [O]."""
    order = np.lexsort((-closeness, tracks.point))
    return order[np.searchsorted(tracks.point[order], np.arange(tracks.count))]


def _warps(cameras: Sequence[Camera], T_map_cam: np.ndarray, tracks: PointTracks,
           points: np.ndarray, normals: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Pixels [O, 2, 2] of each image per pixel of the reference image of the point.

    For flat patches with the normals [count, 3] of any length.
    """
    steps = np.zeros((tracks.count, 2, 3))  # in the map, of one pixel of the reference
    warps = np.full((len(tracks), 2, 2), np.nan)
    for image, rows in tracks.by_image():
        own = rows[reference[tracks.point[rows]] == rows]
        point = tracks.point[own]
        at = _on_plane(cameras[image], T_map_cam[image], tracks.px[own], points[point],
                       normals[point])
        for axis, step in enumerate(np.eye(2)):
            moved = _on_plane(cameras[image], T_map_cam[image], tracks.px[own] + step,
                              points[point], normals[point])
            steps[point, axis] = moved - at
    for image, rows in tracks.by_image():
        T_cam_map, point = inverse(T_map_cam[image]), tracks.point[rows]
        at = cameras[image].project(transform_points(T_cam_map, points[point]))
        for axis in range(2):
            moved = transform_points(T_cam_map, points[point] + steps[point, axis])
            warps[rows, :, axis] = cameras[image].project(moved) - at
    return warps


def _on_plane(camera: Camera, T_map_cam: np.ndarray, px: np.ndarray, points: np.ndarray,
              normals: np.ndarray) -> np.ndarray:
    """Where rays of pixels [n, 2] meet planes through points [n, 3], in the map [n, 3]."""
    rays = np.column_stack([camera.normalise(px), np.ones(len(px))]) @ T_map_cam[:3, :3].T
    centre = T_map_cam[:3, 3]
    along = ((points - centre) * normals).sum(1) / (rays * normals).sum(1)
    return centre + rays * along[:, None]


def _gradients(patches: np.ndarray) -> np.ndarray:
    """Derivatives [n, S, 2] of patches [n, S] by x and y."""
    side = len(_SIDE)
    by_y, by_x = np.gradient(patches.reshape(-1, side, side), axis=(1, 2))
    return np.stack([by_x, by_y], -1).reshape(len(patches), -1, 2)


def _sampled(gray: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Bilinear values float32 [n, S] of an image at pixels [n, S, 2]."""
    at, gray = at.astype(np.float32), gray.astype(np.float32)  # of bytes, values would be rounded
    parts = [cv2.remap(gray, part[..., 0], part[..., 1], cv2.INTER_LINEAR,
                       borderMode=cv2.BORDER_REPLICATE)
             for part in (at[k:k + ROWS] for k in range(0, len(at), ROWS))]
    return np.concatenate([np.zeros((0, at.shape[1]), np.float32), *parts])
