"""COLMAP models as posed scenes: ``images/`` and ``sparse/0/`` (binary or text)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.training.posed import PosedScene

PARTS = ('cameras', 'images', 'points3D')
LARGEST_PX = 768  # longer sides are reduced to it: training views are smaller
MOST_TRACKS = 500  # of an image, the longest
# Coefficients that models have, and zeros behind them that make them OpenCV's k1 k2 p1 p2.
LENSES = {'SIMPLE_PINHOLE': 0, 'PINHOLE': 0, 'SIMPLE_RADIAL': 3, 'RADIAL': 2, 'OPENCV': 0,
          'FULL_OPENCV': 0}


def colmap_model(folder: Path) -> Path | None:
    """The folder of the model of a scene; None where there is none."""
    model = folder / 'sparse' / '0'
    complete = any(all((model / f'{part}.{kind}').is_file() for part in PARTS)
                   for kind in ('bin', 'txt'))
    return model if complete else None


def read_colmap(folder: Path) -> PosedScene:
    """The registered images of a model, with their longest tracks; large images are reduced.

    Raises InputError without pycolmap, for a model that is damaged, has lenses that are not among
    ``LENSES`` or no tracks, and for images that are missing.
    """
    model = _model(folder)
    images = sorted((i for i in model.images.values() if i.has_pose), key=lambda i: i.name)
    files = [folder / 'images' / image.name for image in images]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f'expected the images of the COLMAP model in {folder / "images"}, found '
                         f'no {missing[0].name}; restore them')
    T_cam_world = np.array([_matrix(image.cam_from_world()) for image in images]).reshape(-1, 4, 4)
    tracks = [_tracks(model, image, T) for image, T in zip(images, T_cam_world, strict=True)]
    if not sum(len(ids) for *_, ids in tracks):
        raise InputError(f'expected points with tracks in the COLMAP model of {folder}, found '
                         'none; triangulate them (colmap point_triangulator)')
    cameras = [_camera(model.cameras[image.camera_id], folder) for image in images]
    reduced = [camera.resized(_reduced(camera.size_wh)) for camera in cameras]
    scales = [np.array(to.size_wh) / of.size_wh for to, of in zip(reduced, cameras, strict=True)]
    uv = [pixels * scale - 0.5 for (pixels, *_), scale in zip(tracks, scales, strict=True)]
    starts = np.cumsum([0, *(len(ids) for *_, ids in tracks)])
    return PosedScene(files, reduced, inverse(T_cam_world), starts, np.concatenate(uv),
                      *(np.concatenate([t[k] for t in tracks]) for k in (1, 2)))


def _model(folder: Path) -> Any:
    try:
        import pycolmap  # an extra: other formats do without
    except ImportError:
        raise InputError(f'expected the package pycolmap to read the COLMAP model of {folder}, '
                         'found none; pip install pycolmap') from None
    try:
        return pycolmap.Reconstruction(str(colmap_model(folder)))
    except (ValueError, RuntimeError, IndexError) as error:
        raise InputError(f'expected a COLMAP model in {folder / "sparse" / "0"}, found '
                         f'{" ".join(str(error).split())}; write it again') from None


def _camera(camera: Any, folder: Path) -> Camera:
    """Our camera; COLMAP's pixel centres stand at one half, ours at integers."""
    name = camera.model.name
    if name not in LENSES:
        raise InputError(f'expected a camera model of {sorted(LENSES)} in {folder}, found {name}; '
                         'undistort the images (colmap image_undistorter)')
    K = np.array(camera.calibration_matrix())
    K[:2, 2] -= 0.5
    bends = [float(camera.params[k]) for k in camera.extra_params_idxs()]
    return Camera.from_matrix(K, (camera.width, camera.height), (*bends, *[0.0] * LENSES[name]),
                              'rational' if name == 'FULL_OPENCV' else 'plumb_bob')


def _tracks(model: Any, image: Any, T_cam_world: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Uv [T, 2] of COLMAP, depth [T] and numbers [T] of the points with the longest tracks."""
    seen = sorted((p for p in image.points2D if p.has_point3D()),
                  key=lambda p: -model.points3D[p.point3D_id].track.length())[:MOST_TRACKS]
    ids = np.array([p.point3D_id for p in seen], np.int64)
    points = np.array([model.points3D[k].xyz for k in ids.tolist()]).reshape(-1, 3)
    depth = transform_points(T_cam_world, points)[:, 2]
    front = depth > 0
    return np.array([p.xy for p in seen]).reshape(-1, 2)[front], depth[front], ids[front]


def _matrix(rigid: Any) -> NDArray[np.float64]:
    return np.vstack([rigid.matrix(), (0.0, 0.0, 0.0, 1.0)])


def _reduced(size_wh: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, LARGEST_PX / max(size_wh))
    return round(size_wh[0] * scale), round(size_wh[1] * scale)
