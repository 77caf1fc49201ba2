"""A map as a folder that anyone can open; docs/map_format.md describes every file.

    save_map('maps/kitchen', scene, writer, encoder, config)
    saved = load_map('maps/kitchen')
    localizer = saved.localizer()

Localising needs map.yaml and memory.safetensors alone; with the fast weights of a network,
network.safetensors as well. The other files are for people and other tools (poses.json,
trajectory.tum, cloud.ply) and for going on with the map (keyframes.safetensors,
writer.safetensors).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from feedforward_recon.config.schema import MapperConfig, from_dict, to_dict
from feedforward_recon.errors import ConfigError, InputError, MapError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io.writers import (
    MAP_MARKER,
    atomic_folder,
    backups,
    check_output,
    check_place,
    read_ply,
    recover,
    write_ply,
    write_poses,
    write_tum,
)
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.localization.network_localizer import SavedFastWeights
from feedforward_recon.mapping.keyframe_graph import KeyframeGraph
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.scene_map import Gauge, SceneMap, StartingMap
from feedforward_recon.memory import MemoryWriter, SceneMemory
from feedforward_recon.model import Encoder
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.types import PointCloud, Trajectory
from feedforward_recon.version import __version__

log = logging.getLogger(__name__)
SCHEMA_VERSION = 2  # of map.yaml: any other one is refused (docs/map_format.md)
# Other maps kept beside a new one of the same folder, each up to about 100 MB; chosen by hand.
BACKUPS = 5
MEMORY, WRITER = 'memory.safetensors', 'writer.safetensors'
NETWORK = 'network.safetensors'
KEYFRAMES = 'keyframes.safetensors'
POSES, TRAJECTORY, CLOUD = 'poses.json', 'trajectory.tum', 'cloud.ply'


@dataclass(frozen=True)
class MapInfo:
    """The contents of map.yaml.

    encoder, encoder_sha256: name and weights of the encoder that wrote the memory.
    camera: the camera that mapped; camera_source, scale_source and frame as in ``SceneMap``.
    images, tracked: of the last session; keyframes, points: of all; sessions: how many made it.
    files: name -> {bytes, sha256}.
    """

    package_version: str
    encoder: str
    encoder_sha256: str
    camera: Camera
    camera_source: str
    metres_per_unit: float | None
    scale_source: str
    images: int
    tracked: int
    keyframes: int
    points: int
    files: dict[str, dict[str, Any]]
    config: MapperConfig
    frame: str = 'first camera'
    sessions: int = 1


@dataclass(frozen=True)
class SavedMap:
    """A map folder whose map.yaml and memory have been read and verified.

    sha256: of map.yaml, which has those of all other files. backup: where ``save_map`` put the map
    that was there before.
    """

    path: Path
    info: MapInfo
    memory: SceneMemory
    sha256: str = ''
    backup: Path | None = None

    def load_encoder(self, weights: str | Path | None = None) -> Encoder:
        """The encoder that wrote this map: the shipped one, or ``weights`` of your own.

        Raises MapError when its SHA-256 is another one.
        """
        candidates = [Path(weights)] if weights else _shipped_weights(self.info.encoder)
        found = {_sha256(file): file for file in candidates if file.is_file()}
        if self.info.encoder_sha256 not in found:
            names = ', '.join(sorted(sha[:12] for sha in found)) or 'none'
            raise MapError(
                f'{self.path}: expected the encoder {self.info.encoder} with SHA-256 '
                f'{self.info.encoder_sha256[:12]}, found {names}; every released encoder ships '
                'with the package: update it, or give the weights that wrote the map')
        return CompactEncoder.load(found[self.info.encoder_sha256], self.info.config.encoder)

    def localizer(self, encoder: Encoder | None = None) -> Localizer:
        """A localizer with the settings and the camera of the map.

        Raises MapError as ``load_encoder`` does.
        """
        return Localizer(self.memory, encoder or self.load_encoder(), self.info.config.localizer,
                         self.info.camera)

    def fast_weights(self) -> SavedFastWeights | None:
        """Fast weights of a network for this map; None when it was made without.

        Raises MapError for a damaged file.
        """
        if NETWORK not in self.info.files:
            return None
        return SavedFastWeights.load(self._verified(NETWORK))

    def trajectory(self) -> Trajectory:
        """Poses T_map_cam [N, 4, 4] of the mapped images, map units, from poses.json.

        Raises MapError for a damaged or missing file; so do ``poses`` and ``cloud``.
        """
        return Trajectory.of((entry['stamp_ns'], np.array(entry['T_map_cam'], float))
                             for entry in self.poses() if entry['T_map_cam'] is not None)

    def poses(self) -> list[dict[str, Any]]:
        """The entries of poses.json: file, stamp_ns, status, T_map_cam (4x4 or None).

        And ``camera``: that of the image, where it was saved, else that of the map.
        """
        entries = json.loads(self._verified(POSES).read_text(encoding='utf-8'))
        return [{**entry, 'camera': Camera.from_fields(entry['camera']) if 'camera' in entry
                 else self.info.camera} for entry in entries]

    def cloud(self) -> PointCloud:
        """The coloured points of cloud.ply, in the map frame and in map units."""
        return read_ply(self._verified(CLOUD))

    def writer(self) -> MemoryWriter:
        """The memory as it was written, to go on writing exactly where mapping stopped.

        Raises MapError for a damaged or missing file.
        """
        try:
            with safe_open(str(self._verified(WRITER)), 'pt') as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
            return MemoryWriter.from_state(self.info.config.memory, state)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise MapError(f'{self.path / WRITER}: expected what was written into the memory of '
                           f'this map, found something else ({error}); map again') from error

    def start(self, config: MapperConfig, encoder: Encoder) -> tuple[StartingMap, MemoryWriter]:
        """What a mapper with these settings and this encoder needs to go on with this map.

        Raises MapError for another encoder than the map's, and for a map that was saved without
        its keyframes or with damaged ones.
        """
        if encoder.sha256 != self.info.encoder_sha256:
            raise MapError(f'{self.path}: expected the encoder with SHA-256 '
                           f'{self.info.encoder_sha256[:12]} that made this map, found '
                           f'{encoder.sha256[:12]}; use SavedMap.load_encoder')
        map_, ids = self.keyframes(config)
        writer = self.writer()
        if len(ids) < len(writer.poses):
            writer.renumber(ids)
        info = self.info
        gauge = Gauge(info.metres_per_unit, info.scale_source, info.frame)
        return StartingMap(map_, gauge, info.camera, info.sessions), writer

    def keyframes(self, config: MapperConfig) -> tuple[GrowingMap, np.ndarray]:
        """The saved keyframes as a growing map, and the numbers [K] that they had before.

        Raises MapError for a map that was saved without them or with damaged ones.
        """
        if KEYFRAMES not in self.info.files:
            raise MapError(f'{self.path}: expected {KEYFRAMES} to go on with this map, found '
                           'a map saved without; map again, or start a new one')
        file = self._verified(KEYFRAMES)
        try:
            with safe_open(str(file), 'np') as stored:
                graph = KeyframeGraph({name: stored.get_tensor(name) for name in stored.keys()},
                                      dict(stored.metadata() or {})['about'])
            return graph.restored(config), graph.ids
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise MapError(f'{file}: expected the keyframes of this map, found others ({error}); '
                           'map again') from error

    def verify(self) -> list[str]:
        """Names of the files that are absent; raises MapError for a damaged one."""
        names = [name for name in self.info.files if (self.path / name).is_file()]
        for name in names:
            self._verified(name)
        return sorted(set(self.info.files) - set(names))

    def _verified(self, name: str) -> Path:
        return _verified(self.path / name, self.info.files.get(name))


def is_map(path: str | Path) -> bool:
    """Whether a map was saved in a folder, or is there again after a save that died."""
    folder = Path(path).expanduser()
    return recover(folder) or (folder / MAP_MARKER).is_file()


def check_map_output(path: str | Path) -> None:
    """Refuse, before a long run, an output that ``save_map`` could not write.

    Raises InputError.
    """
    check_output(Path(path).expanduser().resolve())
    check_place(path)


def save_map(path: str | Path, scene: SceneMap, writer: MemoryWriter, encoder: Encoder,
             config: MapperConfig, network: SavedFastWeights | None = None, *,
             replaces: str | None = None) -> SavedMap:
    """Write a map folder, read it back and return it; replaces an older map, nothing else.

    network: fast weights of a feed-forward network for the same scene.
    replaces: ``SavedMap.sha256`` of the one map that may be replaced; any other map that is there
    is kept as a backup beside it. None replaces whatever map there is. Of ``BACKUPS`` + 1
    backups the one with the fewest keyframes goes, so that a good map outlives many small ones.

    Raises InputError when the folder cannot be written, MapError when there is nothing to save
    or the disk does not give back what was written.
    """
    if not scene.keyframes or not writer.filled:
        raise MapError(f'{path}: expected a map that views can be found in, found '
                       f'{len(scene.keyframes)} keyframes'
                       f'{"" if writer.filled else " and an empty memory"}; give sharp images of '
                       'a textured place, from a camera that moves sideways')
    memory = writer.snapshot()
    before = backups(path)

    def is_another(target: Path) -> bool:
        return replaces is not None and _sha256(target / MAP_MARKER) != replaces

    with atomic_folder(path, keeps=is_another) as folder:
        try:
            memory.save(folder / MEMORY)
            save_file(writer.state(), folder / WRITER)
            if scene.graph is not None:
                save_arrays(scene.graph.arrays, folder / KEYFRAMES, {'about': scene.graph.about})
            write_poses(folder / POSES, scene.estimates)
            write_tum(folder / TRAJECTORY, scene.trajectory)
            write_ply(folder / CLOUD, scene.cloud)
            if network is not None:
                network.save(folder / NETWORK)
            for file in folder.glob('*.safetensors'):  # which it keeps to their owner
                file.chmod((folder / POSES).stat().st_mode)
            _write_description(folder, scene, encoder, config)
        except (OSError, SafetensorError) as error:
            raise InputError(f'{path}: expected a place to write, found {error}; choose another '
                             'output or free space') from error
        _check_written(folder, memory)
    made = [backup for backup in backups(path) if backup not in before]
    if made:
        _drop_smallest(made[0], before)
    return replace(load_map(path), backup=made[0] if made else None)


def _drop_smallest(newest: Path, others: list[Path]) -> None:
    """Keep the newest backup and ``BACKUPS`` - 1 others, those with the most keyframes."""
    if len(others) >= BACKUPS:
        smallest = min(others, key=_keyframes)
        log.warning('removed %s, the smallest of %d backups', smallest, len(others) + 1)
        shutil.rmtree(smallest, ignore_errors=True)


def _keyframes(folder: Path) -> int:
    """Number of keyframes of the map in a folder; -1 where no map can be read."""
    try:
        return _read_description(folder).keyframes
    except MapError:
        return -1


def _write_description(folder: Path, scene: SceneMap, encoder: Encoder,
                       config: MapperConfig) -> None:
    files = {file.name: {'bytes': file.stat().st_size, 'sha256': _sha256(file)}
             for file in sorted(folder.iterdir())}
    camera = scene.keyframes[-1].camera
    description = {
        'schema_version': SCHEMA_VERSION,
        'package_version': __version__,
        'encoder': {'name': encoder.name, 'sha256': encoder.sha256},
        'camera': {**asdict(camera), 'source': scene.camera_source},
        'frame': scene.frame,
        'sessions': scene.sessions,
        'scale': {'metres_per_unit': scene.metres_per_unit, 'source': scene.scale_source},
        'counts': {'images': len(scene.estimates), 'tracked': len(scene.trajectory),
                   'keyframes': len(scene.keyframes), 'points': len(scene.cloud)},
        'config': to_dict(config),
        'files': files}  # last: where a file is cut off a key is missed, a setting would not be
    plain = json.loads(json.dumps(description))  # no tuples, no NumPy numbers
    (folder / MAP_MARKER).write_text(yaml.safe_dump(plain, sort_keys=False), encoding='utf-8')


def _check_written(folder: Path, memory: SceneMemory) -> None:
    """Saving is exact: the memory read back equals the one written, bit for bit."""
    saved = load_map(folder)
    written, read = memory.tensors(), saved.memory.tensors()
    if saved.verify() or not all(torch.equal(written[name], read[name]) for name in written):
        raise MapError(f'{folder}: expected to read back what was written, found other bytes; '
                       'check the disk')


def load_map(path: str | Path) -> SavedMap:
    """Read map.yaml and memory.safetensors of a map folder and check them against each other.

    Raises MapError for what is missing, damaged, or of another schema version.
    """
    folder = Path(path).expanduser()
    if recover(folder):
        log.warning('%s: a process died while it saved here; the map from before is back', folder)
    info = _read_description(folder)
    file = _verified(folder / MEMORY, info.files.get(MEMORY))
    return SavedMap(folder, info, SceneMemory.load(file), _sha256(folder / MAP_MARKER))


def nothing_found(path: Path, images: int) -> MapError:
    """The error of a session of which no image was found in the map that it was to extend."""
    return MapError(f'{path}: expected images of the place in this map, found none in {images} '
                    'images; the map is unchanged')


def settings_to_go_on(saved: SavedMap, config: MapperConfig) -> MapperConfig:
    """Settings for going on with a map: its memory and its encoder stay as they were made."""
    made = saved.info.config
    if config.memory != made.memory:
        log.warning('%s: the scene memory keeps the settings it was made with', saved.path)
    return replace(config, memory=made.memory, encoder=made.encoder)


def _read_description(folder: Path) -> MapInfo:
    file = folder / MAP_MARKER
    if not file.is_file():
        found = 'no such folder' if not folder.exists() else f'no {MAP_MARKER} in it'
        raise MapError(f'{folder}: expected a map folder, found {found}; give the folder that '
                       '`ffrecon map --out` wrote')
    try:
        values = yaml.safe_load(file.read_text(encoding='utf-8'))
        _check_version(file, values['schema_version'])
        return _parsed(values)
    except ConfigError as error:
        raise MapError(f'{file}: expected settings that this version knows, found {error}; '
                       'update feedforward_recon or map again') from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError,
            InputError) as error:
        raise MapError(f'{file}: expected the description of a map, found a damaged one '
                       f'({type(error).__name__}: {error}); map again') from error


def _check_version(file: Path, version: Any) -> None:
    if version != SCHEMA_VERSION:
        older = isinstance(version, int) and version < SCHEMA_VERSION
        raise MapError(f'{file}: expected a map of schema version {SCHEMA_VERSION}, found '
                       f'{version}; {"map again" if older else "update feedforward_recon"}')


def _parsed(values: dict[str, Any]) -> MapInfo:
    camera = dict(values['camera'])
    camera_source = camera.pop('source')
    return MapInfo(values['package_version'], values['encoder']['name'],
                   values['encoder']['sha256'], Camera.from_fields(camera),
                   camera_source, values['scale']['metres_per_unit'], values['scale']['source'],
                   **values['counts'], files=values['files'],
                   config=from_dict(MapperConfig, values['config']),
                   frame=values['frame'], sessions=values['sessions'])


def _verified(file: Path, expected: dict[str, Any] | None) -> Path:
    """The file, once its size and SHA-256 are those of map.yaml."""
    if expected is None or not file.is_file():
        raise MapError(f'{file}: expected this file of the map, found none; copy the whole '
                       'folder or map again')
    size = file.stat().st_size
    if size != expected['bytes']:
        raise MapError(f'{file}: expected {expected["bytes"]} bytes, found {size}; the file is '
                       'truncated or replaced: copy the map again')
    if _sha256(file) != expected['sha256']:
        raise MapError(f'{file}: expected the SHA-256 of map.yaml, found another; the file is '
                       'damaged: copy the map again')
    return file


def _sha256(file: Path) -> str:
    with open(file, 'rb') as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _shipped_weights(encoder: str) -> list[Path]:
    folder = Path(str(resources.files('feedforward_recon.model.weights')))
    return sorted(folder.glob(f'{encoder}*.safetensors'))
