"""What every source of frames shares: options, slicing, and the checks on each frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feedforward_recon.errors import ConfigError, InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io.images import Calibration, camera_from_calibration, scaled_depth
from feedforward_recon.types import Frame

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


SECOND_NS = 1_000_000_000
UNSTAMPED_STEP_NS = 100_000_000
PAIRING_TOLERANCE_NS = 20_000_000


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about a source, where the source itself does not.

    fx, fy, cx, cy, distortion: intrinsics in pixels that replace those of the source; fy
        defaults to fx and the principal point to the middle. distortion is in OpenCV order;
        with distortion_model fisheye it is k1..k4 (equidistant).
    fov_deg: horizontal field of view, instead of fx.
    calibration: path of a camera_calibration YAML file, instead of fx.
    camera: which camera of a stereo set, as its cameras.json names it.
    image_topic, depth_topic, camera_info_topic, right_image_topic: bag topics; '' finds the only
        candidate. Of two image topics that differ in left and right, these are a stereo pair.
    rectified: images of a bag are rectified, whatever their topic is called.
    use_depth, use_stereo: False leaves depth, or right images, unread.
    use_exif: True takes the camera of a photo from its EXIF block, where nothing else gives one
        (JPEG files in folders).
    baseline_m: of a rectified stereo pair in folders ``left`` and ``right``, metres.
    depth_units_per_metre: what stored depth counts; None is the format's own convention.
    mixed_sizes: True allows images of different sizes (photos to be localised one by one).
    max_frames, step: use every ``step``-th image, at most max_frames of them.
    """

    fx: float | None = None
    fy: float | None = None
    cx: float | None = None
    cy: float | None = None
    distortion: tuple[float, ...] = ()
    distortion_model: str = ''
    fov_deg: float | None = None
    calibration: str = ''
    camera: str = 'left'
    image_topic: str = ''
    depth_topic: str = ''
    camera_info_topic: str = ''
    right_image_topic: str = ''
    rectified: bool = False
    use_depth: bool = True
    use_stereo: bool = True
    use_exif: bool = False
    baseline_m: float | None = None
    depth_units_per_metre: float | None = None
    mixed_sizes: bool = False
    max_frames: int | None = None
    step: int = 1

    def __post_init__(self) -> None:
        """Refuse options that contradict each other or cannot be used."""
        given = [name for name, value in (('fx', self.fx), ('fov_deg', self.fov_deg),
                                          ('calibration', self.calibration or None))
                 if value is not None]
        if len(given) > 1:
            raise ConfigError(f'expected one of fx, fov_deg and calibration, found {given}; '
                              'leave one')
        partial = self.fy is not None or self.cx is not None or self.cy is not None
        if self.fx is None and (partial or self.distortion):
            raise ConfigError('expected fx beside fy, cx, cy or distortion, found none; give fx')
        if self.step < 1 or (self.max_frames is not None and self.max_frames < 1):
            raise ConfigError(f'expected step and max_frames of at least 1, found {self.step} '
                              f'and {self.max_frames}')
        if self.depth_units_per_metre is not None and not self.depth_units_per_metre > 0:
            raise ConfigError('expected a positive number of depth units per metre, found '
                              f'{self.depth_units_per_metre}')

    @property
    def has_camera(self) -> bool:
        """True when the user gave intrinsics."""
        return self.fx is not None or self.fov_deg is not None or bool(self.calibration)

    def camera_for(self, size_wh: tuple[int, int]) -> Camera | None:
        """The user's camera at an image size (width, height), or None without one.

        Raises InputError for a calibration file that is unreadable or of another size.
        """
        if self.calibration:
            return _camera_of_file(self.calibration, size_wh)
        if self.fov_deg is not None:
            return Camera.from_fov(self.fov_deg, size_wh)
        if self.fx is None:
            return None
        middle = ((size_wh[0] - 1) / 2, (size_wh[1] - 1) / 2)
        model = self.distortion_model or distortion_model(self.distortion)
        return Camera(*size_wh, self.fx, self.fx if self.fy is None else self.fy,
                      middle[0] if self.cx is None else self.cx,
                      middle[1] if self.cy is None else self.cy, self.distortion, model)


def distortion_model(coefficients: Sequence[float]) -> str:
    """The OpenCV model that so many coefficients belong to."""
    return 'rational' if len(coefficients) == 8 else 'plumb_bob'


def _camera_of_file(path: str, size_wh: tuple[int, int]) -> Camera:
    """Camera of a YAML file as ROS camera_calibration writes it."""
    return checked_size(calibrated_camera(calibration_of_file(path), path), size_wh, path)


def calibrated_camera(info: Calibration, path: str, *, rectified: bool = False) -> Camera:
    """The camera of a calibration file. Raises InputError for one that is not calibrated."""
    try:
        camera = camera_from_calibration(info, path, rectified)
    except (TypeError, ValueError) as error:
        raise _no_calibration(path, error) from None
    if camera is None:
        raise InputError(f'{path}: expected a calibrated camera, found fx = 0; calibrate it')
    return camera


def calibration_of_file(path: str) -> Calibration:
    """What a YAML file of ROS camera_calibration says. Raises InputError if it is none."""
    import yaml  # not needed by who gives numbers

    try:
        values = yaml.safe_load(Path(path).read_text())
        matrix, coefficients = (values[key]['data'] for key in
                                ('camera_matrix', 'distortion_coefficients'))
        P, R = (values.get(key, {}).get('data', ()) for key in
                ('projection_matrix', 'rectification_matrix'))
        return Calibration(int(values['image_width']), int(values['image_height']),
                           str(values['distortion_model']), coefficients, matrix, P, r=R)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError,
            ValueError) as error:
        raise _no_calibration(path, error) from None


def _no_calibration(path: str, error: BaseException) -> InputError:
    return InputError(f'{path}: expected a camera_calibration YAML file (image_width, '
                      'image_height, camera_matrix, distortion_model, '
                      f'distortion_coefficients), found {_brief(error)}')


def _brief(error: BaseException) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


def checked_size(camera: Camera, size_wh: tuple[int, int], where: str) -> Camera:
    """The camera, after checking that it belongs to images of (width, height)."""
    if camera.size_wh != size_wh:
        raise InputError(f'{where}: expected the calibration of {size_wh[0]}x{size_wh[1]} '
                         f'images, found one of {camera.width}x{camera.height}; calibrate at '
                         'the size of the images')
    return camera


class Source(ABC):
    """Frames in stamp order, decoded when they are asked for; iterating again starts anew.

    ``len`` counts the frames after step and max_frames (for videos: as the container says).
    has_depth, has_right, calibrated, has_poses tell what the frames will carry.
    """

    def __init__(self, name: str, options: SourceOptions) -> None:
        """Keep the options; subclasses open their data before or after."""
        self.name = name
        self.options = options
        self.has_depth = self.has_right = False
        self.has_poses = False
        self.calibrated = options.has_camera

    @property
    @abstractmethod
    def total(self) -> int:
        """Frames in the data, before step and max_frames."""

    @abstractmethod
    def _read(self, indices: range) -> Iterator[Frame]:
        """Frames at increasing positions in the data."""

    @property
    def _indices(self) -> range:
        return range(0, self.total, self.options.step)[:self.options.max_frames]

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Frame]:
        return self.frames()

    def frames(self, start: int = 0, stop: int | None = None, step: int = 1) -> Iterator[Frame]:
        """Frames start, start + step, ... before stop, counted as ``len`` counts them.

        Raises InputError, naming the file, at the first frame that cannot be used.
        """
        if start < 0 or (stop is not None and stop < 0) or step < 1:
            raise ValueError(f'expected start, stop >= 0 and step >= 1, found {start}, {stop}, '
                             f'{step}')
        return _checked(self._read(self._indices[start:stop:step]), self.options.mixed_sizes)

    def describe(self) -> str:
        """One line for people: name, count and what the frames carry."""
        carries = [('depth', self.has_depth), ('right images', self.has_right),
                   ('poses', self.has_poses)]
        parts = [f'{len(self)} images', *(word for word, there in carries if there),
                 'calibrated' if self.calibrated else 'not calibrated']
        return f'{self.name}: {", ".join(parts)}'


def _checked(frames: Iterator[Frame], mixed_sizes: bool) -> Iterator[Frame]:
    first = previous = None
    for frame in frames:
        first = first or frame
        if previous is not None:
            check_stamps(previous.stamp_ns, frame.stamp_ns, frame.source)
        if frame.image.shape != first.image.shape and not mixed_sizes:
            raise InputError(f'{frame.source}: expected {_size(first.image)} pixels like '
                             f'{first.source}, found {_size(frame.image)}; use images of one '
                             'size')
        previous = _with_depth_checked(frame)
        yield previous


def check_stamps(before_ns: int, after_ns: int, where: str) -> None:
    """Refuse a stamp that does not come after the one before."""
    if after_ns <= before_ns:
        found = 'the same one again' if after_ns == before_ns else \
            f'one {(before_ns - after_ns) / SECOND_NS:.3f} s earlier'
        raise InputError(f'{where}: expected a later time stamp than {seconds(before_ns)} s, '
                         f'found {found}; sort the images or split the recording')


def _with_depth_checked(frame: Frame) -> Frame:
    """The frame with depth of the size of its image; refuses depth without a measurement."""
    if frame.depth is None:
        return frame
    depth = scaled_depth(frame.depth, (frame.image.shape[1], frame.image.shape[0]), frame.source)
    if not depth.any():
        raise InputError(f'{frame.source}: expected depth, found no valid value in the whole '
                         'image; check the depth camera or leave the depth out')
    return frame if depth is frame.depth else replace(frame, depth=depth)


def _size(image: NDArray) -> str:
    return f'{image.shape[1]}x{image.shape[0]}'


def seconds(stamp_ns: int) -> str:
    """Decimal seconds with all nine digits; integers only, so that nothing is rounded."""
    sign = '-' if stamp_ns < 0 else ''
    whole, rest = divmod(abs(stamp_ns), SECOND_NS)
    return f'{sign}{whole}.{rest:09d}'


def require_cameras(source: Source) -> None:
    """Refuse a source without intrinsics.

    Raises InputError.
    """
    if not source.calibrated:
        raise InputError(f'{source.name}: expected camera intrinsics, found none; give fx '
                         '(and fy, cx, cy, distortion), a field of view or a calibration file')


def mutual_nearest(stamps_a: NDArray[np.int64], stamps_b: NDArray[np.int64],
                   tolerance_ns: int = PAIRING_TOLERANCE_NS) -> NDArray[np.int64]:
    """For each sorted stamp of a the index of its partner in sorted b, or -1; [len(a)].

    Two stamps are partners when each is the other's nearest and they are within tolerance_ns,
    so that no depth image serves two colour images.
    """
    partner = np.full(len(stamps_a), -1, np.int64)
    if len(stamps_a) == 0 or len(stamps_b) == 0:
        return partner
    forward, backward = _nearest(stamps_a, stamps_b), _nearest(stamps_b, stamps_a)
    mutual = backward[forward] == np.arange(len(stamps_a))
    mutual &= np.abs(stamps_b[forward] - stamps_a) <= tolerance_ns
    partner[mutual] = forward[mutual]
    return partner


def nearest(stamps_a: NDArray[np.int64], stamps_b: NDArray[np.int64],
            tolerance_ns: int = PAIRING_TOLERANCE_NS) -> NDArray[np.int64]:
    """For each stamp of a the index of the nearest in sorted b within tolerance_ns, or -1."""
    if len(stamps_b) == 0:
        return np.full(len(stamps_a), -1, np.int64)
    index = _nearest(stamps_a, stamps_b)
    return np.where(np.abs(stamps_b[index] - stamps_a) <= tolerance_ns, index, -1)


def _nearest(stamps_a: NDArray[np.int64], stamps_b: NDArray[np.int64]) -> NDArray[np.int64]:
    after = np.searchsorted(stamps_b, stamps_a).clip(0, len(stamps_b) - 1)
    before = (after - 1).clip(0)
    closer = np.abs(stamps_b[before] - stamps_a) <= np.abs(stamps_b[after] - stamps_a)
    return np.where(closer, before, after)
