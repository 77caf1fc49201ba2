"""Coloured points as sensor_msgs/PointCloud2, the way RViz, PCL and Foxglove read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sensor_msgs.msg import PointCloud2, PointField

from feedforward_recon.errors import InputError
from feedforward_recon.ros.fields import fill, header_msg
from feedforward_recon.ros.optional import chosen
from feedforward_recon.types import PointCloud

if TYPE_CHECKING:
    from numpy.typing import NDArray

# x y z float32, then 0x00RRGGBB in the bits of a float32 (PCL's convention).
_NAMES = ('x', 'y', 'z', 'rgb')
LAYOUT = np.dtype({'names': _NAMES, 'formats': ['<f4', '<f4', '<f4', '<u4'],
                   'offsets': [0, 4, 8, 12], 'itemsize': 16})
_FORMATS = {PointField.INT8: 'i1', PointField.UINT8: 'u1', PointField.INT16: 'i2',
            PointField.UINT16: 'u2', PointField.INT32: 'i4', PointField.UINT32: 'u4',
            PointField.FLOAT32: 'f4', PointField.FLOAT64: 'f8'}
_COLOURS = ('rgb', 'rgba')


def cloud_msg(cloud: PointCloud, frame_id: str, ns: int) -> PointCloud2:
    """The points as one unordered row; those that are not finite are left out (is_dense)."""
    points = np.empty(len(cloud), LAYOUT)
    points['x'], points['y'], points['z'] = cloud.xyz.T
    red, green, blue = cloud.rgb.T.astype(np.uint32)
    points['rgb'] = red << 16 | green << 8 | blue
    points = points[_finite(points)]
    message = PointCloud2(header=header_msg(frame_id, ns), height=1, width=len(points),
                          is_bigendian=False, point_step=LAYOUT.itemsize,
                          row_step=LAYOUT.itemsize * len(points), is_dense=True)
    message.fields = [PointField(name=name, offset=4 * index, datatype=PointField.FLOAT32, count=1)
                      for index, name in enumerate(_NAMES)]
    fill(message.data, points)
    return message


def cloud_from_msg(msg: PointCloud2) -> PointCloud:
    """The finite points of a message of any layout; white where it has no colour.

    Raises InputError when x, y or z is missing or the message is too short.
    """
    formats = {field.name: field for field in msg.fields}
    colour = next((name for name in _COLOURS if name in formats), None)
    names = ['x', 'y', 'z', *([colour] if colour else [])]
    if not set(names) <= formats.keys():
        raise InputError(f'expected a cloud with the fields x y z, found {sorted(formats)}; '
                         'choose another topic')
    points = _points(msg, names)
    points = points[_finite(points)]
    xyz = np.stack([points[name].astype(np.float32) for name in 'xyz'], -1)
    rgb = _unpacked(points[colour]) if colour else np.full((len(xyz), 3), 255, np.uint8)
    return PointCloud(xyz, rgb)


def _finite(points: np.ndarray) -> NDArray[np.bool_]:
    """Mask [N] of the structured points that have a place; per field, three times faster."""
    return np.isfinite(points['x']) & np.isfinite(points['y']) & np.isfinite(points['z'])


def _points(msg: PointCloud2, names: list[str]) -> np.ndarray:
    """Structured array [N] of the fields; plain messages are for the tested library, if any."""
    used, rows = msg.width * msg.point_step, msg.height
    data = np.frombuffer(msg.data, np.uint8)
    if rows * used and (msg.row_step < used or len(data) < (rows - 1) * msg.row_step + used):
        raise InputError(f'expected {rows} rows of {used} bytes in steps of {msg.row_step}, found '
                         f'{len(data)} bytes; the cloud is truncated or mislabelled')
    library = chosen('sensor_msgs_py')
    if library is not None and msg.row_step == used and not msg.is_bigendian:
        return np.ravel(library.read_points(msg, field_names=names))
    order = '>' if msg.is_bigendian else '<'
    fields = {field.name: field for field in msg.fields}
    layout = np.dtype({'names': names, 'itemsize': msg.point_step,
                       'offsets': [fields[name].offset for name in names],
                       'formats': [order + _FORMATS[fields[name].datatype] for name in names]})
    packed = np.lib.stride_tricks.as_strided(data, (rows, used), (msg.row_step, 1),
                                             writeable=False)
    return np.frombuffer(packed.tobytes(), layout)


def _unpacked(colour: np.ndarray) -> NDArray[np.uint8]:
    """RGB uint8 [N, 3] of 0x??RRGGBB in the bits of 32-bit floats or integers [N]."""
    bits = np.ascontiguousarray(colour, colour.dtype.newbyteorder('=')).view(np.uint32)
    return np.stack([(bits >> shift).astype(np.uint8) for shift in (16, 8, 0)], -1)
