"""Files that other tools open: trajectories, clouds, COLMAP models, poses.json, whole folders.

Quaternions appear here because file formats ask for them; names say their order.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, quat_xyzw_from_matrix
from feedforward_recon.io.source import seconds
from feedforward_recon.types import Estimate, FloatArray, PointCloud, Trajectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

MAP_MARKER = 'map.yaml'
BACKUP = re.compile(r'\.backup-\d{8}T\d{6}(-\d+)?')
BETWEEN_RENAMES_S = 0.1  # far more than a save needs from one to the next
_PLY_VERTEX = np.dtype([('xyz', '<f4', 3), ('rgb', 'u1', 3)])
_PLY_PROPERTIES = tuple(f'property float {axis}' for axis in 'xyz') + tuple(
    f'property uchar {channel}' for channel in ('red', 'green', 'blue'))


def write_tum(path: Path, trajectory: Trajectory) -> None:
    """TUM trajectory: lines of stamp tx ty tz qx qy qz qw; stamps keep every nanosecond."""
    rows = zip(trajectory.stamps_ns, trajectory.positions,
               quat_xyzw_from_matrix(trajectory.T_map_cam[:, :3, :3]), strict=True)
    lines = [f'{seconds(int(stamp_ns))} {_numbers(np.r_[position, quat_xyzw])}\n'
             for stamp_ns, position, quat_xyzw in rows]
    _write_text(path, '# timestamp tx ty tz qx qy qz qw\n' + ''.join(lines))


def write_kitti(path: Path, trajectory: Trajectory) -> None:
    """KITTI poses: the first three rows of T_map_cam, row-major, one line per pose."""
    lines = [f'{_numbers(T[:3].ravel())}\n' for T in trajectory.T_map_cam]
    _write_text(path, ''.join(lines))


def _numbers(values: Iterable[float]) -> str:
    return ' '.join(f'{value:.12g}' for value in values)


def _write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write through a temporary neighbour, so that a reader never sees half a file."""
    part = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.part')
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise not_writable(path, error) from None


def not_writable(path: Path, error: OSError) -> InputError:
    """The sentence for an output that the system refused."""
    return InputError(f'{path}: expected a place to write, found {error.strerror or error}; '
                      'choose another output or free space')


def write_ply(path: Path, cloud: PointCloud) -> None:
    """Coloured points as binary little-endian PLY (x y z float, red green blue uchar)."""
    header = ['ply', 'format binary_little_endian 1.0', f'element vertex {len(cloud)}',
              *_PLY_PROPERTIES, 'end_header', '']
    vertices = np.empty(len(cloud), _PLY_VERTEX)
    vertices['xyz'], vertices['rgb'] = cloud.xyz, cloud.rgb
    write_bytes(path, '\n'.join(header).encode() + vertices.tobytes())


def read_ply(path: Path) -> PointCloud:
    """Points of a PLY file as ``write_ply`` lays it out.

    Raises InputError for other layouts and for truncated files.
    """
    content = path.read_bytes()
    header, _, body = content.partition(b'end_header\n')
    lines = header.decode('ascii', 'replace').splitlines()
    count = next((int(line.split()[-1]) for line in lines if line.startswith('element')), -1)
    properties = tuple(line for line in lines if line.startswith('property'))
    if properties != _PLY_PROPERTIES or len(body) != count * _PLY_VERTEX.itemsize:
        raise InputError(f'{path}: expected a whole binary PLY of coloured points, found '
                         f'{len(properties)} properties and {len(body)} bytes for {count} points')
    vertices = np.frombuffer(body, _PLY_VERTEX)
    return PointCloud(vertices['xyz'].copy(), vertices['rgb'].copy())


@dataclass(frozen=True)
class PosedImage:
    """An image of a COLMAP model: file name, camera and T_map_cam [4, 4]."""

    name: str
    camera: Camera
    T_map_cam: FloatArray


def write_colmap(folder: Path, images: Sequence[PosedImage],
                 cloud: PointCloud | None = None) -> None:
    """COLMAP text model: cameras.txt, images.txt (world to camera) and points3D.txt.

    Points carry no tracks. COLMAP puts the centre of the first pixel at (0.5, 0.5), this package
    at (0, 0): principal points move by half a pixel.
    """
    cameras = {camera: number for number, camera in
               enumerate(dict.fromkeys(image.camera for image in images), 1)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(folder, error) from None
    _write_text(folder / 'cameras.txt', ''.join(
        f'{number} {_colmap_camera(camera)}\n' for camera, number in cameras.items()))
    _write_text(folder / 'images.txt', ''.join(
        f'{number} {_colmap_pose(image.T_map_cam)} {cameras[image.camera]} {image.name}\n\n'
        for number, image in enumerate(images, 1)))
    points = cloud or PointCloud()
    _write_text(folder / 'points3D.txt', ''.join(
        f'{number} {_numbers(xyz)} {rgb[0]} {rgb[1]} {rgb[2]} 0\n'
        for number, (xyz, rgb) in enumerate(zip(points.xyz, points.rgb, strict=True), 1)))


def _colmap_camera(camera: Camera) -> str:
    """Model, size and parameters in COLMAP's order."""
    d = camera.distortion
    if not camera.is_distorted:
        model, d = 'PINHOLE', ()
    elif camera.model == 'fisheye':
        model = 'OPENCV_FISHEYE'
    elif len(d) == 4:
        model = 'OPENCV'
    else:
        model, d = 'FULL_OPENCV', (*d, *(0.0,) * (8 - len(d)))
    parameters = (camera.fx, camera.fy, camera.cx + 0.5, camera.cy + 0.5, *d)
    return f'{model} {camera.width} {camera.height} {_numbers(parameters)}'


def _colmap_pose(T_map_cam: FloatArray) -> str:
    """Quaternion (w x y z) and translation of T_cam_map."""
    T_cam_map = inverse(T_map_cam)
    x, y, z, w = quat_xyzw_from_matrix(T_cam_map[:3, :3])
    return _numbers((w, x, y, z, *T_cam_map[:3, 3]))


def poses_entries(estimates: Iterable[Estimate]) -> list[dict[str, Any]]:
    """One entry per input image: file, stamp_ns, status and T_map_cam (4x4 or null).

    And ``camera``, its fields by name, where the estimate has one.
    """
    return [{'file': e.source, 'stamp_ns': int(e.stamp_ns), 'status': e.status.value,
             'T_map_cam': None if e.T_map_cam is None else np.asarray(e.T_map_cam).tolist(),
             **({} if e.camera is None else {'camera': asdict(e.camera)})} for e in estimates]


def localization_entries(estimates: Sequence[Estimate]) -> list[dict[str, Any]]:
    """The entries of ``poses_entries`` with inliers, score and ms of each query."""
    return [{**entry, 'inliers': int(e.inliers), 'score': float(e.score),
             'ms': float(e.latency_ms)}
            for entry, e in zip(poses_entries(estimates), estimates, strict=True)]


def write_poses(path: Path, estimates: Iterable[Estimate]) -> None:
    """poses.json of a map: the list that ``poses_entries`` makes, one line per image."""
    write_entries(path, poses_entries(estimates))


def write_entries(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """A list of JSON objects, one per line."""
    lines = [json.dumps(entry, allow_nan=False) for entry in entries]
    _write_text(path, '[\n' + ',\n'.join(lines) + '\n]\n')


def check_place(path: str | Path) -> None:
    """Refuse, before a long run, an output whose folder cannot be made or written to.

    Raises InputError.
    """
    target = Path(path).expanduser().resolve()
    try:
        parent = next(folder for folder in target.parents if folder.exists())
        with tempfile.TemporaryDirectory(prefix='.ffrecon', dir=parent):
            pass
    except OSError as error:
        raise not_writable(target, error) from None


@contextmanager
def atomic_folder(path: str | Path, marker: str = MAP_MARKER, *,
                  keeps: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` when the block ends well.

    Everything is flushed to disk before it is renamed. When the block fails, the temporary folder
    goes and what was at ``path`` stays as it was. Only a folder that holds ``marker`` (one of
    ours) or nothing is ever replaced. A process that dies between the renames leaves the old
    folder beside the path, and ``recover`` brings it back.
    keeps: asked just before the renames whether the folder that is there becomes a backup
    (``backups``) instead of being removed.
    Raises InputError, before the block runs, when the output cannot be written or would
    overwrite something else.
    """
    target = Path(path).expanduser().resolve()
    check_output(target, marker)
    recover(target, marker)
    token = f'{os.getpid()}-{secrets.token_hex(4)}'
    part = target.with_name(f'.{target.name}.{token}.part')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    except OSError as error:
        raise not_writable(target, error) from None
    try:
        yield part
        check_output(target, marker)
        try:
            _flush_tree(part)
            kept = (target / marker).exists() and keeps(target)
            _swap(part, target, target.with_name(
                f'.{target.name}.{token}.{"kept" if kept else "old"}'), marker)
        except OSError as error:
            raise not_writable(target, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def recover(path: str | Path, marker: str = MAP_MARKER) -> bool:
    """Tidy up after processes that died while they saved; True if the old folder came back.

    What a living process is writing stays as it is.
    """
    target = Path(path).expanduser().resolve()
    came_back = False
    left = _left_behind(target)
    if not target.exists() and any(folder.suffix != '.part' for folder in left):
        time.sleep(BETWEEN_RENAMES_S)  # somebody may be saving at this very moment
        left = _left_behind(target)
    for folder in sorted(left, key=lambda folder: -folder.stat().st_mtime):
        if folder.suffix != '.part' and not target.exists() and (folder / marker).exists():
            os.rename(folder, target)
            came_back = True
        elif not _writer_lives(folder):
            _discard(folder, target, marker)
    return came_back


def _left_behind(target: Path) -> list[Path]:
    """Temporary folders of saves to a folder, under way or given up."""
    return [folder for folder in target.parent.glob(f'.{glob.escape(target.name)}.*-*.*')
            if folder.suffix in ('.part', '.old', '.kept')]


def _writer_lives(folder: Path) -> bool:
    """The process whose number is in the name of a temporary folder is still there.

    Or another one that got its number, or nobody can tell: then the folder is cleared away
    another time.
    """
    number, processes = folder.name.split('.')[-2].partition('-')[0], Path('/proc')
    return not processes.is_dir() or (processes / number).exists()


def backups(path: str | Path, marker: str = MAP_MARKER) -> list[Path]:
    """Folders that others took the place of, newest first: ``<name>.backup-<UTC>[-<number>]``."""
    target = Path(path).expanduser().resolve()
    near = target.parent.glob(f'{glob.escape(target.name)}.backup-*')
    return sorted((folder for folder in near
                   if BACKUP.fullmatch(folder.name[len(target.name):])
                   and (folder / marker).is_file()), reverse=True)


def _discard(folder: Path, target: Path, marker: str) -> None:
    """Remove a folder that was replaced, or keep it under the name of a backup."""
    if folder.suffix != '.kept':
        shutil.rmtree(folder, ignore_errors=True)
        return
    written = datetime.fromtimestamp((folder / marker).stat().st_mtime, timezone.utc)
    name = f'{target.name}.backup-{written:%Y%m%dT%H%M%S}'
    free = target.with_name(name)
    for number in count(2):  # maps that were saved within one second
        if not free.exists():
            break
        free = target.with_name(f'{name}-{number}')
    os.rename(folder, free)


def check_output(path: Path, marker: str = MAP_MARKER) -> None:
    """Refuse an output that exists and is neither a map nor an empty folder.

    Raises InputError.
    """
    try:
        found = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise not_writable(path, error) from None
    if found and marker not in found:
        raise InputError(f'{path}: expected a new folder or one of our maps ({marker}), found '
                         f'{", ".join(found[:3])}; choose another output')


def _flush_tree(folder: Path) -> None:
    """Flush every file and folder below to disk, and the folder itself."""
    for parent, _, files in os.walk(folder):
        for name in [*files, '.']:
            _flush(Path(parent) / name)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(part: Path, target: Path, old: Path, marker: str) -> None:
    """Rename part to target; the folder that was there comes back if that fails."""
    existed = target.exists()
    if existed:
        os.rename(target, old)
    try:
        os.rename(part, target)
    except OSError:
        if existed:
            os.rename(old, target)
        raise
    if existed:
        _discard(old, target, marker)
    _flush(target.parent)
