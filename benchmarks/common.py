"""What every measurement shares: the data, the machine it ran on, and where results go."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.evaluation import TrajectoryError, absolute_trajectory_error
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.types import Frame, Trajectory

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / 'results'
LIBRARIES = ('numpy', 'scipy', 'torch', 'opencv-python-headless', 'opencv-python', 'pycolmap')
KITCHEN, DRIVE = '7scenes_redkitchen', 'kitti_seq2'


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


def data_root() -> Path:
    """Folder of the real image sets: FFRECON_DATA, or shared/data beside the repository.

    Raises InputError when there is none.
    """
    root = Path(os.environ.get('FFRECON_DATA', REPOSITORY.parent / 'shared' / 'data'))
    if not root.is_dir():
        raise InputError(f'expected image sets at {root}, found nothing; set FFRECON_DATA')
    return root


def load_frames(name: str, *, step: int = 1, use_depth: bool = True) -> list[Frame]:
    """All frames of a set, decoded, in stamp order; without depth also without right images."""
    options = SourceOptions(step=step, use_depth=use_depth, use_stereo=use_depth)
    return list(open_source(data_root() / name, options))


def backwards(frames: list[Frame]) -> list[Frame]:
    """The same walk from its end, with the stamps rising."""
    return [replace(frame, stamp_ns=other.stamp_ns)
            for frame, other in zip(frames[::-1], frames, strict=True)]


def true_trajectory(frames: list[Frame]) -> Trajectory:
    """The given poses of frames that have one."""
    known = [f for f in frames if f.T_map_cam is not None]
    return Trajectory(np.array([f.stamp_ns for f in known], np.int64),
                      np.stack([f.T_map_cam for f in known if f.T_map_cam is not None]))


def trajectory_entry(estimated: Trajectory, truth: Trajectory, alignment: str,
                     total: int, clock: Clock) -> dict[str, Any]:
    """Row of a mapping table: accuracy, how many of ``total`` images have a pose, time."""
    row: dict[str, Any] = {'alignment': alignment, 'images': total, 'tracked': len(estimated),
                           'seconds': clock.seconds, 'cpu_seconds': clock.cpu_seconds,
                           'error': None}
    if len(estimated) >= 3:
        error: TrajectoryError = absolute_trajectory_error(estimated, truth, alignment)
        row['error'] = dataclasses.asdict(error)
    return row


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
