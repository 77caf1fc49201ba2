"""``ffrecon info``, ``export`` and ``merge``: what maps hold, files for others, two into one."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from feedforward_recon.console.options import Json, MapFolder, NewMap, Overwrite, check_out
from feedforward_recon.console.terminal import bytes_text, print_json, print_table
from feedforward_recon.errors import InputError
from feedforward_recon.io.writers import (
    PosedImage,
    atomic_folder,
    check_place,
    write_colmap,
    write_kitti,
    write_ply,
    write_tum,
)
from feedforward_recon.session.map_folder import MEMORY, NETWORK, SavedMap, load_map, save_map
from feedforward_recon.session.merging import merge_maps

COLMAP_MARKER = 'cameras.txt'


class Format(str, Enum):
    """What export can write."""

    COLMAP = 'colmap'
    KITTI = 'kitti'
    TUM = 'tum'
    PLY = 'ply'


def info_command(map_: MapFolder, json_: Json = False) -> None:
    """Show what a map holds, and check every file against its checksum.

    Example:
      ffrecon info maps/kitchen
    """
    saved = load_map(map_)
    missing = saved.verify()
    if json_:
        print_json(_summary(saved, missing))
    else:
        print_table(f'map in {saved.path}', _rows(saved, missing))


def _summary(saved: SavedMap, missing: list[str]) -> dict:
    info = saved.info
    return {'map': str(saved.path), 'package_version': info.package_version,
            'encoder': info.encoder, 'encoder_sha256': info.encoder_sha256,
            'sessions': info.sessions, 'images': info.images, 'tracked': info.tracked,
            'keyframes': info.keyframes, 'points': info.points,
            'metres_per_unit': info.metres_per_unit,
            'scale_source': info.scale_source, 'camera_source': info.camera_source,
            'camera': {'width': info.camera.width, 'height': info.camera.height,
                       'fx': info.camera.fx, 'fy': info.camera.fy, 'cx': info.camera.cx,
                       'cy': info.camera.cy, 'distortion': list(info.camera.distortion),
                       'model': info.camera.model},
            'landmarks': len(saved.memory.occupied),
            'network': _network(saved),
            'files': {name: entry['bytes'] for name, entry in info.files.items()},
            'missing': missing}


def _rows(saved: SavedMap, missing: list[str]) -> dict[str, str]:
    info, camera = saved.info, saved.info.camera
    scale = 'unknown' if info.metres_per_unit is None else f'{info.metres_per_unit:g} m per unit'
    rows = {
        'sessions': f'{info.sessions}, {info.keyframes} keyframes',
        'images': f'{info.images}, {info.tracked} tracked' + (
            ' (of the last session)' if info.sessions > 1 else ''),
        'camera': f'{camera.width}x{camera.height}, fx {camera.fx:.1f} px, {info.camera_source}',
        'scale': f'{scale} ({info.scale_source})',
        'landmarks': f'{len(saved.memory.occupied)} in {len(saved.memory.slot_counts)} slots',
        'encoder': f'{info.encoder} {info.encoder_sha256[:12]}',
        'written by': f'feedforward_recon {info.package_version}'}
    network = _network(saved)
    if network is not None:
        rows['network'] = (f'{network["model"]} ({network["attention"]}, '
                           f'{network["precision"]}) '
                           f'{network["sha256"][:12]}, {network["keyframes"]} keyframes; queries '
                           f'{network["position"]:.3f} units, {network["angle_deg"]:.1f} deg off')
    for name, entry in info.files.items():
        state = 'absent' if name in missing else 'intact'
        rows[name] = f'{bytes_text(entry["bytes"])}, {state}'
    return rows


def _network(saved: SavedMap) -> dict | None:
    """Which network wrote fast weights, and how far it was off on images of the walk."""
    if NETWORK not in saved.info.files or not (saved.path / NETWORK).is_file():
        return None
    found = saved.fast_weights()
    return None if found is None else {
        'model': found.model, 'attention': found.attention, 'sha256': found.sha256,
        'precision': found.precision,
        'keyframes': found.link.keyframes, 'position': found.link.position,
        'angle_deg': float(np.rad2deg(found.link.angle))}


FormatOption = Annotated[Format, typer.Option('--format', '-f', help='colmap: text model with '
                                              'poses and points; kitti, tum: trajectory; ply: '
                                              'coloured points.', show_default=False)]
Out = Annotated[Path, typer.Option('--out', '-o', help='New folder (colmap) or file.',
                                   show_default=False)]


def export_command(map_: MapFolder, format_: FormatOption, out: Out) -> None:
    """Write a map for other tools.

    Examples:
      ffrecon export maps/kitchen --format colmap --out colmap/kitchen
      ffrecon export maps/kitchen --format tum --out kitchen.tum
    """
    saved = load_map(map_)
    if format_ is Format.COLMAP:
        with atomic_folder(out, COLMAP_MARKER) as folder:
            write_colmap(folder, _posed_images(saved), saved.cloud())
    else:
        if out.exists():
            raise InputError(f'{out}: expected a new file, found one that exists; choose another '
                             '--out')
        check_place(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        FILES[format_](saved, out)
    print(out)


def merge_command(first: MapFolder, second: MapFolder, out: NewMap,
                  overwrite: Overwrite = False, json_: Json = False) -> None:
    """Make one map of two that show the same place; its memory has the size of one.

    The second map is brought into the frame and the unit of the first (the other way round, where
    only the second is in metres), landmarks that both have become one, and both are refined
    together.

    Example:
      ffrecon merge maps/monday maps/tuesday --out maps/both
    """
    check_out(out, overwrite)
    merged = merge_maps(load_map(first), load_map(second))
    saved = save_map(out, merged.scene, merged.writer, merged.encoder, merged.config)
    info = saved.info
    summary = {'map': str(saved.path), 'sessions': info.sessions, 'keyframes': info.keyframes,
               'images': info.images, 'joined_landmarks': merged.joined,
               'moved': str(merged.moved), 'scale': merged.alignment.scale,
               'memory_bytes': info.files[MEMORY]['bytes']}
    if json_:
        print_json(summary)
        return
    print_table(f'map in {saved.path}', {
        'sessions': f'{info.sessions}, {info.keyframes} keyframes, {info.images} images',
        'joined by': f'{merged.joined} landmarks; lengths of {merged.moved} times '
                     f'{merged.alignment.scale:.4g}',
        'memory': bytes_text(summary['memory_bytes'])})


def _posed_images(saved: SavedMap) -> list[PosedImage]:
    return [PosedImage(entry['file'], entry['camera'], np.array(entry['T_map_cam'], float))
            for entry in saved.poses() if entry['T_map_cam'] is not None]


FILES: dict[Format, Callable[[SavedMap, Path], None]] = {
    Format.KITTI: lambda saved, out: write_kitti(out, saved.trajectory()),
    Format.TUM: lambda saved, out: write_tum(out, saved.trajectory()),
    Format.PLY: lambda saved, out: write_ply(out, saved.cloud()),
}
