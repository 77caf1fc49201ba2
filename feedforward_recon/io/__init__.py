"""Every kind of input becomes a Source of Frames.

``open_source`` recognises folders (cameras.json, TUM RGB-D, 7-Scenes, stereo pairs in ``left``
and ``right``, plain images), single images, video files and ROS 2 bags (folder, .mcap or .db3).
Reading is direct, in stamp order and repeatable. Distortion is passed on, not removed; a frame
without calibration has camera None.
"""

from __future__ import annotations

import os
from pathlib import Path

from feedforward_recon.errors import InputError
from feedforward_recon.io.bag import BAG_SUFFIXES, BagSource
from feedforward_recon.io.datasets import (
    open_seven_scenes,
    open_tum,
    read_tum_trajectory,
    seven_scenes_sequences,
)
from feedforward_recon.io.folder import (
    IMAGE_SUFFIXES,
    FolderSource,
    images_in,
    is_pair,
    open_cameras_json,
    open_pair_folders,
    plain_entries,
)
from feedforward_recon.io.source import Source, SourceOptions, require_cameras
from feedforward_recon.io.video import VideoSource

__all__ = ['Source', 'SourceOptions', 'open_source', 'read_tum_trajectory', 'require_cameras']


def open_source(path: str | Path, options: SourceOptions | None = None) -> Source:
    """The frames at a path, whatever their format.

    Raises InputError, one sentence that names the file, when they cannot be used.
    """
    options = options or SourceOptions()
    location = Path(path).expanduser()
    if not os.path.exists(location):  # Path.exists raises on forbidden parents
        raise InputError(f'{location}: expected a folder, video or bag, found nothing; check '
                         'the path')
    if location.is_dir():
        return _open_folder(location, options)
    suffix = location.suffix.lower()
    if suffix == '.bag':
        raise InputError(f'{location}: expected a ROS 2 bag, found a ROS 1 bag; convert it with '
                         'rosbags-convert')
    if suffix in BAG_SUFFIXES:
        return BagSource(location, options)
    if suffix in IMAGE_SUFFIXES:
        return FolderSource(location.parent, plain_entries([location]), options)
    return VideoSource(location, options)


def _open_folder(root: Path, options: SourceOptions) -> Source:
    try:
        names = sorted(entry.name for entry in root.iterdir())
    except OSError as error:
        raise InputError(f'{root}: expected a readable folder, found {error.strerror}; '
                         'check its permissions') from None
    if 'cameras.json' in names:
        return open_cameras_json(root, options)
    if 'metadata.yaml' in names:
        return BagSource(root, options)
    if 'rgb.txt' in names:
        return open_tum(root, options)
    if seven_scenes_sequences(root):
        return open_seven_scenes(root, options)
    storage = [name for name in names if Path(name).suffix in BAG_SUFFIXES]
    if storage:
        raise InputError(f'{root}: expected metadata.yaml beside {storage[0]}, found none; run '
                         '"ros2 bag reindex" or give the file itself')
    if is_pair(root):
        return open_pair_folders(root, options)
    images = images_in(root)
    if not images:
        found = ', '.join(names[:5]) or 'nothing'
        raise InputError(f'{root}: expected images, a cameras.json, rgb.txt or a bag, found '
                         f'{found}; give the folder that holds them')
    return FolderSource(root, plain_entries(images), options)
