"""Mapping peer: ORB-SLAM3 (Campos et al., T-RO 2021), fed with a walk at the pace of the camera.

It runs as a separate program in an environment of its own (benchmarks/peers_environment.py);
this module hands it images, depth and settings in a folder and reads what it wrote.
"""

from __future__ import annotations

import json
import logging
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from benchmarks.peers_environment import PYTHON, VOCABULARY
from benchmarks.scoring import Walked
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import make_transform, matrix_from_quat_xyzw
from feedforward_recon.types import Frame, Trajectory

WORKER = Path(__file__).with_name('orbslam_worker.py')
# As in the settings that ORB-SLAM3 comes with: TUM RGB-D for small images, KITTI for wide ones.
FEATURES, FEATURES_WIDE, WIDE_PX = 1000, 2000, 1000
START_S = 120.0  # loading the vocabulary and saving take seconds, on a busy machine more
log = logging.getLogger(__name__)


def map_walk(frames: Sequence[Frame], rights: Sequence[np.ndarray] = (),
             baseline_m: float = 0.0) -> Walked | None:
    """What ORB-SLAM3 makes of a walk; None, with a warning, when it crashed.

    RGB-D where frames have depth, stereo where rectified right images are given, else monocular.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_job(folder, frames, rights, baseline_m)
        pace_s = (frames[-1].stamp_ns - frames[0].stamp_ns) / 1e9
        try:
            done = subprocess.run([PYTHON, WORKER, folder], capture_output=True, text=True,
                                  timeout=2 * pace_s + START_S, check=False)
        except subprocess.TimeoutExpired:
            log.warning('ORB-SLAM3 did not end after %.0f s', 2 * pace_s + START_S)
            return None
        if done.returncode or not (folder / 'result.json').exists():
            log.warning('ORB-SLAM3 ended with %d: %s', done.returncode, done.stderr[-500:])
            return None
        try:
            return _read(folder, frames)
        except (InputError, ValueError) as error:
            log.warning('ORB-SLAM3 wrote what cannot be read: %s', error)
            return None


def _write_job(folder: Path, frames: Sequence[Frame], rights: Sequence[np.ndarray],
               baseline_m: float) -> None:
    sensor, inputs = 'MONOCULAR', ['images.npy']
    np.save(folder / 'images.npy', np.stack([_gray(frame.image) for frame in frames]))
    if len(rights):
        sensor, inputs = 'STEREO', [*inputs, 'right.npy']
        np.save(folder / 'right.npy', np.stack([_gray(image) for image in rights]))
    elif all(frame.depth is not None for frame in frames):
        sensor, inputs = 'RGBD', [*inputs, 'depth.npy']
        np.save(folder / 'depth.npy', np.stack([f.depth for f in frames if f.depth is not None]))
    first = frames[0]
    assert first.camera is not None
    seconds = [(frame.stamp_ns - first.stamp_ns) / 1e9 for frame in frames]
    fps = 1 / float(np.median(np.diff(seconds)))
    (folder / 'settings.yaml').write_text(settings(first.camera, fps, sensor, baseline_m),
                                          encoding='ascii')
    (folder / 'job.json').write_text(json.dumps({
        'sensor': sensor, 'inputs': inputs, 'seconds': seconds,
        'vocabulary': str(VOCABULARY)}), encoding='utf-8')


def _gray(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def settings(camera: Camera, fps: float, sensor: str, baseline_m: float = 0.0) -> str:
    """Settings of ORB-SLAM3 in the YAML of OpenCV; of a pinhole camera without distortion."""
    stereo = sensor == 'STEREO'
    wide = camera.width >= WIDE_PX
    values: dict[str, object] = {
        'File.version': '"1.0"', 'Camera.type': '"PinHole"',
        **_intrinsics(1, camera), **(_second_camera(camera, baseline_m) if stereo else {}),
        'Camera.width': camera.width, 'Camera.height': camera.height,
        'Camera.fps': round(fps), 'Camera.RGB': 1,
        # Of an RGB-D camera the baseline only says how far depth counts as near: 40 times it.
        'Stereo.ThDepth': 40.0, 'Stereo.b': float(baseline_m) if stereo else 0.08,
        'RGBD.DepthMapFactor': 1.0,
        'ORBextractor.nFeatures': FEATURES_WIDE if wide else FEATURES,
        'ORBextractor.scaleFactor': 1.2, 'ORBextractor.nLevels': 8,
        'ORBextractor.iniThFAST': 20, 'ORBextractor.minThFAST': 7,
        'Viewer.KeyFrameSize': 0.05, 'Viewer.KeyFrameLineWidth': 1.0,
        'Viewer.GraphLineWidth': 0.9, 'Viewer.PointSize': 2.0, 'Viewer.CameraSize': 0.08,
        'Viewer.CameraLineWidth': 3.0, 'Viewer.ViewpointX': 0.0, 'Viewer.ViewpointY': -0.7,
        'Viewer.ViewpointZ': -1.8, 'Viewer.ViewpointF': 500.0}
    return '%YAML:1.0\n---\n' + ''.join(f'{key}: {value}\n' for key, value in values.items())


def _intrinsics(number: int, camera: Camera) -> dict[str, object]:
    k1, k2, p1, p2, *_ = camera.distortion or (0.0,) * 4
    values = {'fx': camera.fx, 'fy': camera.fy, 'cx': camera.cx, 'cy': camera.cy, 'k1': k1,
              'k2': k2, 'p1': p1, 'p2': p2}
    return {f'Camera{number}.{key}': float(value) for key, value in values.items()}


def _second_camera(camera: Camera, baseline_m: float) -> dict[str, object]:
    T_left_right = np.eye(4)
    T_left_right[0, 3] = baseline_m
    numbers = ', '.join(f'{value:.9f}' for value in T_left_right.ravel())
    return {**_intrinsics(2, camera), 'Stereo.T_c1_c2':
            f'!!opencv-matrix\n  rows: 4\n  cols: 4\n  dt: f\n  data: [{numbers}]'}


def _read(folder: Path, frames: Sequence[Frame]) -> Walked:
    result = json.loads((folder / 'result.json').read_text(encoding='utf-8'))
    poses = np.load(folder / 'live.npy')
    posed = np.flatnonzero(np.isfinite(poses[:, 0, 0]))
    stamps = np.array([frame.stamp_ns for frame in frames], np.int64)
    live = Trajectory(stamps[posed], poses[posed])
    final = _tum(folder / 'trajectory.tum', stamps)
    keyframes = _tum(folder / 'keyframes.tum', stamps)
    return Walked(live, final if len(final) else live, keyframes, keyframes.stamps_ns,
                  result['cpu_seconds'], 1e3 * float(np.median(result['latency_s'])))


def _tum(path: Path, stamps_ns: np.ndarray) -> Trajectory:
    """What ORB-SLAM3 saved, with the stamps [N] of the walk.

    It rounds stamps to microseconds, and after it was lost it may save an image twice: the last
    one counts.
    """
    if not path.exists() or not path.read_text(encoding='ascii').strip():
        return Trajectory()
    rows = np.loadtxt(path, ndmin=2)
    index = np.abs(1e9 * rows[:, :1] + stamps_ns[0] - stamps_ns).argmin(1)
    last = {int(frame): row for frame, row in zip(index, rows, strict=True)}
    order = sorted(last)
    values = np.stack([last[frame] for frame in order])
    return Trajectory(stamps_ns[order], make_transform(matrix_from_quat_xyzw(values[:, 4:]),
                                                       values[:, 1:4]))
