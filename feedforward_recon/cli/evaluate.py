"""``ffrecon eval`` and ``ffrecon bench``: errors against ground truth."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from feedforward_recon.console.options import Json
from feedforward_recon.console.terminal import print_json, print_table, progress_bar
from feedforward_recon.errors import InputError
from feedforward_recon.evaluation import (
    RelativeError,
    TrajectoryError,
    absolute_trajectory_error,
    relative_pose_error,
)
from feedforward_recon.io import SourceOptions, open_source, read_tum_trajectory
from feedforward_recon.io.writers import MAP_MARKER
from feedforward_recon.session.map_folder import load_map
from feedforward_recon.types import Trajectory


class AlignmentChoice(str, Enum):
    """What may be aligned before errors are measured."""

    AUTO = 'auto'
    SE3 = 'se3'
    SIM3 = 'sim3'
    NONE = 'none'


Estimated = Annotated[Path, typer.Argument(metavar='MAP_OR_TRAJECTORY', show_default=False,
                                           help='Map folder, or a trajectory in TUM format.')]
Truth = Annotated[Path, typer.Argument(metavar='GROUNDTRUTH', show_default=False,
                                       help='Trajectory in TUM format, map folder, or a source '
                                       'with poses.')]
Align = Annotated[AlignmentChoice, typer.Option('--align', help='auto: sim3 for a map without '
                                                'metric scale, else se3.')]
Step = Annotated[int, typer.Option('--step', min=1, help='Poses between the two ends of a '
                                   'relative error.')]


def eval_command(estimated: Estimated, groundtruth: Truth, align: Align = AlignmentChoice.AUTO,
                 step: Step = 1, json_: Json = False) -> None:
    """Measure a trajectory: absolute (ATE) and relative (RPE) error.

    The table also has the ATE of the best straight line at constant speed, which uses no image:
    a useful trajectory has to be much better.

    Examples:
      ffrecon eval maps/kitchen groundtruth.txt
      ffrecon eval trajectory.tum walk/ --align sim3
    """
    trajectory, metric = _read(estimated)
    truth, _ = _read(groundtruth)
    kind = align.value
    if align is AlignmentChoice.AUTO:
        kind = 'se3' if metric else 'sim3'
    error = absolute_trajectory_error(trajectory, truth, kind)
    relative = relative_pose_error(trajectory, truth, step, error.scale)
    if json_:
        print_json({'align': kind, **dataclasses.asdict(error),
                    'relative': dataclasses.asdict(relative)})
    else:
        print_table(f'{estimated} against {groundtruth}', _rows(error, relative, kind, step))


def _read(path: Path) -> tuple[Trajectory, bool]:
    """A trajectory, and whether its unit is the metre as far as anyone can tell."""
    if (path / MAP_MARKER).is_file():
        saved = load_map(path)
        return saved.trajectory(), saved.info.metres_per_unit is not None
    if path.is_file() and path.suffix in ('.tum', '.txt'):
        return read_tum_trajectory(path), True
    source = open_source(path, SourceOptions(use_depth=False, use_stereo=False))
    if not source.has_poses:
        raise InputError(f'{path}: expected poses to compare with, found images without; give a '
                         'trajectory in TUM format')
    with progress_bar('reading poses', len(source)) as bar:
        poses = [(frame.stamp_ns, frame.T_map_cam) for frame in bar.over(source)
                 if frame.T_map_cam is not None]
    return Trajectory.of(poses), True


def _rows(error: TrajectoryError, relative: RelativeError, kind: str,
          step: int) -> dict[str, str]:
    return {
        f'ATE ({kind})': f'{error.rmse:.4f} rmse, {error.median:.4f} median, {error.max:.4f} max',
        'a straight line': f'{error.straight_line_rmse:.4f} rmse',
        'rotation': f'{error.rotation_median_deg:.3f} deg median',
        f'RPE over {step}': f'{relative.translation_rmse:.4f}, '
                            f'{relative.rotation_rmse_deg:.3f} deg',
        'scale': f'{error.scale:.5f}',
        'poses': f'{error.matched} matched over {error.path_length:.2f}'}


def bench_command() -> int:
    """Measure every figure of the README; needs a checkout and the data of FFRECON_DATA.

    Same as `make bench`: writes benchmarks/results/*.json and the tables of docs/benchmarks.md.

    Example:
      FFRECON_DATA=~/data ffrecon bench
    """
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / 'benchmarks' / 'run_all.py').is_file():
        raise InputError('expected a checkout with the folder benchmarks, found the package '
                         'alone; clone the repository and run `make bench` there')
    codes = [subprocess.run([sys.executable, '-m', module], cwd=checkout, check=False).returncode
             for module in ('benchmarks.run_all', 'benchmarks.tables')]
    return int(any(codes))  # what could be measured is in the tables
