"""Mapping peer: COLMAP through pycolmap, incremental and global (GLOMAP), known intrinsics."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.common import DRIVE, KITCHEN, Clock, load_frames, true_trajectory
from benchmarks.scoring import trajectory_error
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.types import Frame, Trajectory

SEED = 0


def map_with_colmap(frames: list[Frame], mapper: str, matching: str) -> tuple[Trajectory, Clock]:
    """Poses of the largest model, and the time of features, matching and mapping.

    mapper: 'incremental' or 'global'. matching: 'exhaustive' or 'sequential'. Options are the
    defaults of pycolmap, except that the given intrinsics stay as they are.
    """
    import pycolmap

    pycolmap.set_random_seed(SEED)
    camera = frames[0].camera
    assert camera is not None
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = _write_images(frames, root / 'images')
        database = root / 'database.db'
        clock = Clock()
        reader = pycolmap.ImageReaderOptions(camera_model='PINHOLE', camera_params=_params(camera))
        pycolmap.extract_features(database, root / 'images', reader_options=reader,
                                  camera_mode=pycolmap.CameraMode.SINGLE)
        _match(matching, database)
        models = _run_mapper(mapper, database, root, root)
        clock.stop()
        return _trajectory(models, dict(zip(names, frames, strict=True))), clock


class PhotoPeer:
    """COLMAP on unordered photos, each with its own known intrinsics.

    Features are extracted once, and matched once in each way; every map counts the time of both.
    """

    def __init__(self, frames: list[Frame], root: Path) -> None:
        import pycolmap

        self.frames, self.root = frames, root
        # Sequential matching follows the names, so they follow the stamps.
        in_order = sorted(frames, key=lambda frame: frame.stamp_ns)
        self._frame_of = dict(zip(_write_images(in_order, root / 'images'), in_order,
                                  strict=True))
        self.features = Clock()
        pycolmap.set_random_seed(SEED)
        pycolmap.extract_features(
            root / 'features.db', root / 'images', camera_mode=pycolmap.CameraMode.PER_IMAGE,
            reader_options=pycolmap.ImageReaderOptions(camera_model='OPENCV'))
        with pycolmap.Database.open(str(root / 'features.db')) as database:
            for image in database.read_all_images():
                camera = self._frame_of[image.name].camera
                assert camera is not None
                stored = database.read_camera(image.camera_id)
                stored.params = [camera.fx, camera.fy, camera.cx + 0.5, camera.cy + 0.5,
                                 *(*camera.distortion, 0, 0, 0, 0)[:4]]
                stored.has_prior_focal_length = True
                database.update_camera(stored)
        self.features.stop()
        self._matching: dict[str, Clock] = {}

    def map(self, mapper: str, matching: str) -> tuple[Trajectory, list[Clock]]:
        """Poses of the largest model, and the times of features, matching and mapping.

        mapper and matching as in ``map_with_colmap``.
        """
        matched = self._matched(matching)
        output = self.root / f'{mapper}_{matching}'
        output.mkdir()
        mapping = Clock()
        models = _run_mapper(mapper, self.root / f'{matching}.db', self.root, output)
        return _trajectory(models, self._frame_of), [self.features, matched, mapping.stop()]

    def _matched(self, matching: str) -> Clock:
        if matching not in self._matching:
            database = self.root / f'{matching}.db'
            shutil.copy(self.root / 'features.db', database)
            clock = Clock()
            _match(matching, database)
            self._matching[matching] = clock.stop()
        return self._matching[matching]


def _match(matching: str, database: Path) -> None:
    import pycolmap

    {'exhaustive': pycolmap.match_exhaustive,
     'sequential': pycolmap.match_sequential}[matching](database)


def _write_images(frames: list[Frame], folder: Path) -> list[str]:
    """Lossless copies, named in walk order, which sequential matching relies on."""
    folder.mkdir()
    names = [f'{index:06d}.png' for index in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        cv2.imwrite(str(folder / name), frame.image[..., ::-1])
    return names


def _params(camera: Camera) -> str:
    """COLMAP puts the centre of the first pixel at 0.5, this package at 0."""
    return f'{camera.fx},{camera.fy},{camera.cx + 0.5},{camera.cy + 0.5}'


def _run_mapper(mapper: str, database: Path, root: Path, output: Path) -> dict[int, Any]:
    import pycolmap

    if mapper == 'incremental':
        options = pycolmap.IncrementalPipelineOptions(
            random_seed=SEED, ba_refine_focal_length=False, ba_refine_extra_params=False)
        return pycolmap.incremental_mapping(database, root / 'images', output, options)
    options = pycolmap.GlobalPipelineOptions(random_seed=SEED)
    options.mapper.bundle_adjustment.refine_focal_length = False
    options.mapper.bundle_adjustment.refine_extra_params = False
    return pycolmap.global_mapping(database, root / 'images', output, options)


def _trajectory(models: dict[int, Any], frame_of: dict[str, Frame]) -> Trajectory:
    if not models:
        return Trajectory()
    model = max(models.values(), key=lambda m: m.num_reg_images())
    poses = {}
    for image in model.images.values():
        if image.has_pose:
            T_map_cam = np.eye(4)
            T_map_cam[:3] = image.cam_from_world().inverse().matrix()
            poses[frame_of[image.name].stamp_ns] = T_map_cam
    stamps = np.array(sorted(poses), np.int64)
    return Trajectory(stamps, np.stack([poses[stamp] for stamp in stamps]))


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every fifth frame of the kitchen, all left frames of the drive."""
    cases = {f'{KITCHEN} (every 5th)': load_frames(KITCHEN, step=5, use_depth=False),
             DRIVE: load_frames(DRIVE, use_depth=False)}
    for name, frames in cases.items():
        truth = true_trajectory(frames)
        for matching in ('exhaustive', 'sequential'):
            for mapper in ('incremental', 'global'):
                estimated, clock = map_with_colmap(frames, mapper, matching)
                yield f'{name} | pycolmap {mapper}, {matching} matching', {
                    'alignment': 'sim3', 'images': len(frames), 'tracked': len(estimated),
                    'cpu_seconds': clock.cpu_seconds,
                    'error': trajectory_error(estimated, truth, 'sim3')}
