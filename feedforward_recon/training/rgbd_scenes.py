"""RGB-D recordings to train on: TUM RGB-D and 7-Scenes, as ``io.datasets`` reads them.

A ``calibration.yaml`` of ROS camera_calibration in the folder says the camera; else it is the one
that was published with the benchmark.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from feedforward_recon.errors import InputError
from feedforward_recon.io import SourceOptions
from feedforward_recon.io.datasets import open_seven_scenes, open_tum, seven_scenes_sequences
from feedforward_recon.io.folder import FolderSource
from feedforward_recon.training.depth_source import DepthView

CALIBRATION = 'calibration.yaml'
MOST_VIEWS = 240  # of a recording, evenly: neighbours at 30 Hz show the same
KEPT_VIEWS = 128  # decoded ones of all recordings, 2 MB each
SIZE_WH = (640, 480)  # of the published cameras
# fx, fy, cx, cy and distortion of the colour camera of TUM fr1, fr2 and fr3.
TUM_CAMERAS = {
    '1': ((517.3, 516.5, 318.6, 255.3), (0.2624, -0.9531, -0.0054, 0.0026, 1.1633)),
    '2': ((520.9, 521.0, 325.1, 249.7), (0.2312, -0.7849, -0.0033, -0.0001, 0.9172)),
    '3': ((535.4, 539.2, 320.1, 247.6), ())}
# Of the depth camera of 7-Scenes, whose poses the benchmark has.
SEVEN_SCENES_CAMERA = (585.0, 585.0, 320.0, 240.0)


def is_tum(folder: Path) -> bool:
    """Whether it holds the lists of a TUM RGB-D recording."""
    return (folder / 'rgb.txt').is_file()


def is_seven_scenes(folder: Path) -> bool:
    """Whether it holds 7-Scenes frames, or sequences of them."""
    return bool(seven_scenes_sequences(folder))


class RgbdViews:
    """Frames of a recording that have depth in metres and a pose, as `DepthViews`.

    Raises InputError where there are not two, and for images of several sizes.
    """

    def __init__(self, source: FolderSource) -> None:
        entries = source.entries
        posed = [k for k, entry in enumerate(entries)
                 if entry.depth is not None and entry.T_map_cam is not None]
        if len(posed) < 2:
            raise InputError(f'expected images with depth and a pose in {source.name}, found '
                             f'{len(posed)} among {len(entries)}; check depth and poses, and '
                             'their time stamps')
        self._source, self._kept = source, posed[::-(-len(posed) // MOST_VIEWS)]

    def __len__(self) -> int:
        return len(self._kept)

    def view(self, index: int) -> DepthView:
        """See ``DepthViews``; the last ones are kept."""
        view = _decoded(self._source, self._kept[index])
        first = _decoded(self._source, self._kept[0])
        if view.camera.size_wh != first.camera.size_wh:
            raise InputError(f'expected images of {first.camera.size_wh} like the first one in '
                             f'{self._source.name}, found {view.camera.size_wh}; use one size')
        return view


def tum_views(folder: Path) -> RgbdViews:
    """The views of a TUM recording, depth in units of 1/5000 m.

    Raises InputError for bad lists, and where nothing says the camera.
    """
    if (folder / CALIBRATION).is_file():
        return RgbdViews(open_tum(folder, _calibrated(folder)))
    kind = re.search(r'(?:fr|freiburg)([123])', folder.name)
    if kind is None:
        raise InputError(f'expected {CALIBRATION} in {folder} or freiburg1, 2 or 3 in its name, '
                         'found neither: the camera is unknown; give the calibration')
    return _published(open_tum(folder, _options(*TUM_CAMERAS[kind[1]])))


def seven_scenes_views(folder: Path) -> RgbdViews:
    """The views of a scene of 7-Scenes, or of one sequence of it, depth in millimetres.

    The release has depth and poses of the depth camera, not of the colour camera; see
    `open_seven_scenes`. Raises InputError for files that are missing or damaged.
    """
    if (folder / CALIBRATION).is_file():
        return RgbdViews(open_seven_scenes(folder, _calibrated(folder)))
    return _published(open_seven_scenes(folder, _options(SEVEN_SCENES_CAMERA, ())))


def _calibrated(folder: Path) -> SourceOptions:
    return SourceOptions(calibration=str(folder / CALIBRATION))


def _options(matrix: tuple[float, ...], distortion: tuple[float, ...]) -> SourceOptions:
    fx, fy, cx, cy = matrix
    return SourceOptions(fx=fx, fy=fy, cx=cx, cy=cy, distortion=distortion)


def _published(source: FolderSource) -> RgbdViews:
    """Views with a camera that belongs to images of ``SIZE_WH``."""
    views = RgbdViews(source)
    found = views.view(0).camera.size_wh
    if found != SIZE_WH:
        raise InputError(f'expected images of {SIZE_WH} as published in {source.name}, found '
                         f'{found}; give their {CALIBRATION}')
    return views


@lru_cache(maxsize=KEPT_VIEWS)
def _decoded(source: FolderSource, index: int) -> DepthView:
    frame = next(source.frames(index, index + 1))
    assert frame.depth is not None and frame.T_map_cam is not None and frame.camera is not None
    if frame.camera.model == 'fisheye':
        raise InputError(f'expected a lens of plumb_bob or rational_polynomial in {source.name}, '
                         'found fisheye; undistort the images')
    return DepthView(frame.image, frame.depth, frame.camera, frame.T_map_cam)
