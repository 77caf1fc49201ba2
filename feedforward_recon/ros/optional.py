"""Libraries that a ROS install may bring: used where they pass a test.

cv_bridge, sensor_msgs_py and tf_transformations exist in several versions, and some of them are
wrong without an error: 16-bit depth read as 8 bit, quaternions with w first. Each is therefore
tried once, on messages whose content is known, before it is used; `convert` has its own way for
everything, and `conversion_paths` says which way was chosen.

The libraries see plain messages only: rows without padding, little-endian. No release of
cv_bridge reads colour rows that are padded by less than a pixel, none reads big-endian samples
under NumPy 2, and sensor_msgs_py takes no notice of padding. `convert` reads all of these itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from sensor_msgs.msg import Image, PointCloud2, PointField

WIDTH, HEIGHT = 7, 5
BRIDGED_COLOUR = ('rgb8', 'bgr8', 'mono8')
BRIDGED_DEPTH = ('16UC1', '32FC1')
QUATERNION_TOLERANCE = 1e-9


@dataclass(frozen=True)
class TestedLibrary:
    """The outcome of a self-test.

    use: what to call, None where the library is not used. path: its name, or 'own: ' and why not.
    """

    use: Any
    path: str


class SelfTestError(Exception):
    """What a library did wrong, in a few words."""


def chosen(name: str) -> Any:
    """The tested library (cv_bridge: a CvBridge), or None where our own code does it."""
    return tested_libraries()[name].use


def conversion_paths() -> dict[str, str]:
    """Library -> its name where it is used, else 'own: ' and why not; tested at first call."""
    return {name: library.path for name, library in tested_libraries().items()}


@cache
def tested_libraries() -> dict[str, TestedLibrary]:
    """Every optional library, tested at the first call."""
    return {'cv_bridge': _tested('cv_bridge', 'cv_bridge', _tested_bridge),
            'sensor_msgs_py': _tested('sensor_msgs_py', 'sensor_msgs_py.point_cloud2',
                                      _tested_clouds),
            'tf_transformations': _tested('tf_transformations', 'tf_transformations',
                                          _tested_quaternions)}


def _tested(name: str, module: str, test: Callable[[Any], Any]) -> TestedLibrary:
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = 'not installed' if error.name in (name, module) \
            else f'{name} needs {error.name}, which is not installed'
        return TestedLibrary(None, f'own: {missing}')
    # A library built for another NumPy fails in its own ways: ImportError, AttributeError.
    except Exception as error:
        return TestedLibrary(None, f'own: {name} cannot be imported ({_brief(error)})')
    try:
        return TestedLibrary(test(imported), name)
    except SelfTestError as error:
        return TestedLibrary(None, f'own: {name} failed the self-test ({error})')
    except Exception as error:  # the same: whatever it raises, it is not used, and we say so
        return TestedLibrary(None, f'own: {name} failed the self-test ({_brief(error)})')


def _brief(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.splitlines()[0][:100]


# -- cv_bridge ----------------------------------------------------------------------------------

def _tested_bridge(module: Any) -> Any:
    """A CvBridge that reads plain messages of every encoding of BRIDGED_*."""
    bridge = module.CvBridge()
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    grey = rgb[..., 0]
    colours: dict[str, tuple[np.ndarray, np.ndarray]] = {
        'rgb8': (rgb, rgb), 'bgr8': (rgb[..., ::-1], rgb),
        'mono8': (grey, np.repeat(grey[..., None], 3, -1))}
    depths: dict[str, np.ndarray] = {
        '16UC1': rng.integers(1, 65536, (HEIGHT, WIDTH)).astype('<u2'),
        '32FC1': rng.uniform(0.1, 9, (HEIGHT, WIDTH)).astype('<f4')}
    for encoding, (stored, expected) in colours.items():
        found = bridge.imgmsg_to_cv2(_image(stored, encoding), 'rgb8')
        _demand(np.array_equal(found, expected), encoding)
    for encoding, depth in depths.items():
        found = bridge.imgmsg_to_cv2(_image(depth, encoding), 'passthrough')
        _demand(np.array_equal(found, depth), encoding)
    return bridge


def _image(pixels: np.ndarray, encoding: str) -> Image:
    message = Image(height=HEIGHT, width=WIDTH, encoding=encoding, step=pixels.nbytes // HEIGHT)
    message.data.frombytes(pixels.tobytes())
    return message


# -- sensor_msgs_py -----------------------------------------------------------------------------

def _tested_clouds(module: Any) -> Any:
    """The module point_cloud2, after it read points with gaps between their fields."""
    rng = np.random.default_rng(1)
    names = ('x', 'y', 'z', 'rgb')
    layout = np.dtype({'names': names, 'formats': ['<f4'] * 3 + ['<u4'],
                       'offsets': [4, 8, 12, 20], 'itemsize': 28})
    points = np.zeros((2, 3), layout)
    for name in 'xyz':
        points[name] = rng.normal(size=(2, 3))
    points['rgb'] = rng.integers(0, 2**24, (2, 3))
    found = module.read_points(_cloud(points), field_names=list(names))
    _demand(isinstance(found, np.ndarray), 'no array comes back')
    for name in names:
        _demand(np.array_equal(np.ravel(found[name]), points[name].ravel()), f'field {name}')
    return module


def _cloud(points: np.ndarray) -> PointCloud2:
    """The message of structured points [H, W]."""
    (height, width), layout = points.shape, points.dtype
    message = PointCloud2(height=height, width=width, point_step=layout.itemsize,
                          row_step=width * layout.itemsize, is_dense=True)
    kinds = {'f': PointField.FLOAT32, 'u': PointField.UINT32}
    fields = [(name, *place[:2]) for name, place in (layout.fields or {}).items()]
    message.fields = [PointField(name=name, offset=offset, datatype=kinds[kind.kind], count=1)
                      for name, kind, offset in fields]
    message.data.frombytes(points.tobytes())
    return message


# -- tf_transformations -------------------------------------------------------------------------

def _tested_quaternions(module: Any) -> Any:
    """The module, after a turn of 90 and one of 180 degrees both ways, as x, y, z, w."""
    half = np.sqrt(0.5)
    turns = [([0, 0, half, half], [[0, -1, 0], [1, 0, 0], [0, 0, 1]]),
             ([0, 1, 0, 0], [[-1, 0, 0], [0, 1, 0], [0, 0, -1]])]
    for quat_xyzw, R in turns:
        T = np.eye(4)
        T[:3, :3] = R
        found = np.asarray(module.quaternion_from_matrix(T))
        # q and -q are the same rotation.
        _demand(1 - abs(found @ quat_xyzw) < QUATERNION_TOLERANCE, 'quaternion convention')
        back = np.asarray(module.quaternion_matrix(quat_xyzw))
        _demand(back.shape == (4, 4) and np.abs(back - T).max() < QUATERNION_TOLERANCE,
                'quaternion convention')
    return module


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise SelfTestError(what)
