"""What every measurement shares: the data, the machine it ran on, and where results go."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
import zlib
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.types import Frame, Trajectory

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / 'results'
PEERS = REPOSITORY / '.venv-peers'  # programs to compare with: benchmarks/peers_environment.py
LIBRARIES = ('numpy', 'scipy', 'torch', 'opencv-python-headless', 'opencv-python', 'pycolmap')
KITCHEN, DRIVE = '7scenes_redkitchen', 'kitti_seq2'
# Poses from structure from motion (Brachmann et al., ICCV 2021). Those of the sensor's own
# software (KinectFusion, in cameras.json) are 5 cm and 2.4 degrees off them.
PRECISE = 'cameras_sfm.json'
# Radial distortion of the kitchen's camera, whose calibration says none: what mapping finds, to
# 0.003. Peers that take a calibration as it is are also measured with it.
KITCHEN_K1 = -0.03


class Clock:
    """Runs from its construction to ``stop``.

    seconds: wall time. cpu_seconds: of all threads of this process, which other work on the
    machine hardly lengthens.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> Clock:
        """Set both times to what has passed; returns itself."""
        self.seconds = time.perf_counter() - self._started[0]
        self.cpu_seconds = time.process_time() - self._started[1]
        return self


def forget_peak() -> int:
    """Forget the peak memory so far; returns what is resident now, in bytes (Linux)."""
    Path('/proc/self/clear_refs').write_text('5', encoding='ascii')
    return memory_bytes('VmRSS')


def memory_bytes(key: str) -> int:
    """Memory of this process by its name in /proc, such as VmHWM for the peak (Linux)."""
    lines = Path('/proc/self/status').read_text(encoding='ascii').splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def data_root() -> Path:
    """Folder of the real image sets: FFRECON_DATA, or shared/data beside the repository.

    Raises InputError when there is none.
    """
    root = Path(os.environ.get('FFRECON_DATA', REPOSITORY.parent / 'shared' / 'data'))
    if not root.is_dir():
        raise InputError(f'expected image sets at {root}, found nothing; set FFRECON_DATA')
    return root


def load_frames(name: str, *, step: int = 1, use_depth: bool = True) -> list[Frame]:
    """All frames of a set, decoded, in stamp order; without depth also without right images.

    Where the set has a ``PRECISE`` truth, its poses replace those of cameras.json.
    """
    folder = data_root() / name
    frames = list(open_source(folder, SourceOptions(step=step, use_depth=use_depth,
                                                      use_stereo=use_depth)))
    if not (folder / PRECISE).exists():
        return frames
    poses = precise_poses(folder)
    return [replace(frame, T_map_cam=poses.get(Path(frame.source).name)) for frame in frames]


def precise_poses(folder: Path) -> dict[str, np.ndarray]:
    """The ``PRECISE`` poses T_map_cam [4, 4] of a set, by the names of its images."""
    text = (folder / PRECISE).read_text(encoding='utf-8')
    return {Path(entry['file']).name: np.array(entry['T_world_camera'])
            for entry in json.loads(text)['frames']}


def with_lens(frames: list[Frame], k1: float = KITCHEN_K1) -> list[Frame]:
    """The same images as of a camera whose radial distortion is known."""
    return [replace(frame, camera=frame.camera and replace(frame.camera,
                                                           distortion=(k1, 0.0, 0.0, 0.0)))
            for frame in frames]


def backwards(frames: list[Frame]) -> list[Frame]:
    """The same walk from its end, with the stamps rising."""
    return [replace(frame, stamp_ns=other.stamp_ns)
            for frame, other in zip(frames[::-1], frames, strict=True)]


def four_ways(frames: list[Frame]) -> dict[str, list[Frame]]:
    """A walk as four: on one walk alone, differences below 10 % are noise.

    From the middle: to its end, then from the middle to its beginning, so that the camera is
    suddenly elsewhere, at a place that was seen. Stamps always rise.
    """
    middle = len(frames) // 2
    parts = frames[middle:] + frames[middle::-1]
    step_ns = int(np.median(np.diff([frame.stamp_ns for frame in frames])))
    from_middle = [replace(frame, stamp_ns=frames[0].stamp_ns + index * step_ns)
                   for index, frame in enumerate(parts)]
    return {'forwards': frames, 'backwards': backwards(frames), 'every second': frames[::2],
            'from the middle': from_middle}


def true_trajectory(frames: list[Frame]) -> Trajectory:
    """The given poses of frames that have one."""
    known = [f for f in frames if f.T_map_cam is not None]
    return Trajectory(np.array([f.stamp_ns for f in known], np.int64),
                      np.stack([f.T_map_cam for f in known if f.T_map_cam is not None]))


def provenance() -> dict[str, Any]:
    """Commit, date, machine and versions, for the head of a result."""
    versions = {'python': platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {'commit': _git('rev-parse', '--short', 'HEAD'),
            'modified': bool(_git('status', '--porcelain', '--', 'feedforward_recon',
                                  'benchmarks/*.py')),
            'date': datetime.now(timezone.utc).strftime('%Y-%m-%d'),
            'machine': {'cpu': _cpu_model(), 'cores': len(os.sched_getaffinity(0)),
                        'threads': os.environ.get('OMP_NUM_THREADS', 'default'),
                        'load_per_core': round(os.getloadavg()[0] / (os.cpu_count() or 1), 1)},
            'versions': versions}


def package_state() -> str:
    """Names the state of the package, with local changes; other files do not count."""
    changes = zlib.crc32(_git('diff', 'HEAD', '--', 'feedforward_recon').encode())
    return f'{_git("rev-parse", "HEAD:feedforward_recon")}+{changes:x}'


def write_result(name: str, rows: dict[str, Any]) -> Path:
    """Write results/NAME.json: provenance and rows. Infinite medians become null."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f'{name}.json'
    content = {'provenance': provenance(), 'rows': _finite(rows)}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + '\n', encoding='utf-8')
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f'{value:.6g}') if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _git(*arguments: str) -> str:
    result = subprocess.run(['git', *arguments], cwd=REPOSITORY, capture_output=True, text=True,
                            check=False)
    return result.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()
