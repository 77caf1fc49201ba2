"""Bytes to pixels: image files, raw and compressed messages, calibration; no ROS needed.

The bag reader and the ROS nodes share these functions, so both see the same pixels. Encodings
carry the names of `sensor_msgs/image_encodings`. Images come out as RGB uint8 [H, W, 3],
depth as float32 [H, W] metres with 0 where nothing was measured. Every function takes
``where`` (a file or topic name), which starts the sentence of the InputError it may raise.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Bytes = bytes | bytearray | memoryview | NDArray[np.uint8]


@dataclass(frozen=True)
class PixelFormat:
    """Memory layout of one encoding: samples per pixel and the OpenCV code that gives RGB."""

    dtype: str
    channels: int
    to_rgb: int | None = None
    rows: float = 1.0


# OpenCV names a Bayer code after the second row's second and third pixel, ROS after the two
# first pixels: bayer_rggb8 is OpenCV's BayerBG.
_BAYER = {'rggb': cv2.COLOR_BayerBG2RGB, 'bggr': cv2.COLOR_BayerRG2RGB,
          'gbrg': cv2.COLOR_BayerGR2RGB, 'grbg': cv2.COLOR_BayerGB2RGB}
_COLOUR = {
    'rgb8': PixelFormat('u1', 3),
    'bgr8': PixelFormat('u1', 3, cv2.COLOR_BGR2RGB),
    '8UC3': PixelFormat('u1', 3, cv2.COLOR_BGR2RGB),
    'rgba8': PixelFormat('u1', 4, cv2.COLOR_RGBA2RGB),
    'bgra8': PixelFormat('u1', 4, cv2.COLOR_BGRA2RGB),
    '8UC4': PixelFormat('u1', 4, cv2.COLOR_BGRA2RGB),
    'mono8': PixelFormat('u1', 1, cv2.COLOR_GRAY2RGB),
    '8UC1': PixelFormat('u1', 1, cv2.COLOR_GRAY2RGB),
    'mono16': PixelFormat('u2', 1, cv2.COLOR_GRAY2RGB),
    'yuv422': PixelFormat('u1', 2, cv2.COLOR_YUV2RGB_UYVY),
    'uyvy': PixelFormat('u1', 2, cv2.COLOR_YUV2RGB_UYVY),
    'yuv422_yuy2': PixelFormat('u1', 2, cv2.COLOR_YUV2RGB_YUY2),
    'yuyv': PixelFormat('u1', 2, cv2.COLOR_YUV2RGB_YUY2),
    'nv12': PixelFormat('u1', 1, cv2.COLOR_YUV2RGB_NV12, rows=1.5),
    'nv21': PixelFormat('u1', 1, cv2.COLOR_YUV2RGB_NV21, rows=1.5),
    **{f'bayer_{order}{bits}': PixelFormat(f'u{bits // 8}', 1, code)
       for order, code in _BAYER.items() for bits in (8, 16)},
}
_DEPTH = {'16UC1': PixelFormat('u2', 1), 'mono16': PixelFormat('u2', 1),
          '32FC1': PixelFormat('f4', 1)}
DEPTH_ENCODINGS = ('16UC1', '32FC1')

MILLIMETRES_PER_METRE = 1000.0
COMPRESSED_DEPTH_HEADER = struct.Struct('<iff')
_JPEG_START, _JPEG_END = b'\xff\xd8', b'\xff\xd9'
_JPEG_SCAN = 0xDA
_PNG_START, _PNG_END = b'\x89PNG\r\n\x1a\n', b'IEND'


@dataclass(frozen=True)
class RawImage:
    """The fields of a sensor_msgs/Image that hold pixels; step is bytes per row."""

    height: int
    width: int
    encoding: str
    step: int
    is_bigendian: bool
    data: Bytes


def decode_image(raw: RawImage, where: str) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] of a raw colour or grey image; 16-bit samples keep the high byte.

    Raises InputError for depth and unknown encodings and for too few bytes.
    """
    if raw.encoding in DEPTH_ENCODINGS:
        raise InputError(f'{where}: expected a colour image, found depth ({raw.encoding}); '
                         'choose the colour topic')
    layout = _COLOUR.get(raw.encoding)
    if layout is None:
        raise InputError(f'{where}: expected an encoding of {", ".join(sorted(_COLOUR))}, '
                         f'found {raw.encoding!r}; convert the images')
    pixels = _pixels(raw, layout, where)
    if layout.dtype == 'u2':
        pixels = (pixels >> 8).astype(np.uint8)
    if layout.to_rgb is None:
        return pixels.copy()
    try:
        return np.asarray(cv2.cvtColor(pixels, layout.to_rgb), np.uint8)
    except cv2.error:  # odd sizes of subsampled formats
        raise InputError(f'{where}: expected an even size for {raw.encoding}, found '
                         f'{raw.width}x{raw.height}; the message is mislabelled') from None


def decode_depth(raw: RawImage, where: str, units_per_metre: float | None = None
                 ) -> NDArray[np.float32]:
    """Depth float32 [H, W] in metres of a raw depth image.

    Integers count ``units_per_metre`` (None: millimetres, REP 118), floats are metres.
    Raises InputError for other encodings and for too few bytes.
    """
    layout = _DEPTH.get(raw.encoding)
    if layout is None:
        raise InputError(f'{where}: expected depth encoded as {" or ".join(DEPTH_ENCODINGS)}, '
                         f'found {raw.encoding!r}; choose the depth topic')
    return depth_in_metres(_pixels(raw, layout, where), units_per_metre)


def depth_in_metres(values: np.ndarray, units_per_metre: float | None = None
                    ) -> NDArray[np.float32]:
    """Depth float32 in metres; 0 replaces values that are negative or not finite.

    Integers count ``units_per_metre`` (None: millimetres); floats are metres unless it is given.
    """
    default = 1.0 if values.dtype.kind == 'f' else MILLIMETRES_PER_METRE
    depth = values.astype(np.float32) / np.float32(units_per_metre or default)
    depth[~(np.isfinite(depth) & (depth > 0))] = 0
    return depth


def scaled_depth(depth: NDArray[np.float32], size_wh: tuple[int, int], where: str
                 ) -> NDArray[np.float32]:
    """Depth at the size of its image: each pixel takes the nearest measurement.

    Nothing is interpolated, so nothing is invented between an object and what is behind it.
    Raises InputError for depth whose sides are in another ratio: it shows something else.
    """
    height, width = depth.shape
    if (width, height) == size_wh:
        return depth
    if abs(width * size_wh[1] - height * size_wh[0]) > max(size_wh):  # over a pixel apart
        raise InputError(f'{where}: expected depth of {size_wh[0]}x{size_wh[1]} like the image, '
                         f'or scaled from that, found {width}x{height}; register the depth to the '
                         'image or leave it out')
    return cv2.resize(depth, size_wh, interpolation=cv2.INTER_NEAREST).astype(np.float32)


def _pixels(raw: RawImage, layout: PixelFormat, where: str) -> np.ndarray:
    """The samples [rows, W] or [rows, W, C] in native byte order, without row padding."""
    dtype = np.dtype(layout.dtype).newbyteorder('>' if raw.is_bigendian else '<')
    rows, used = int(raw.height * layout.rows), raw.width * layout.channels * dtype.itemsize
    data = np.frombuffer(raw.data, np.uint8)
    # The last row may come without its padding.
    needed = (rows - 1) * raw.step + used
    if raw.step < used or rows < 1 or used < 1 or len(data) < needed:
        raise InputError(f'{where}: expected at least {max(needed, used)} bytes for '
                         f'{raw.width}x{raw.height} {raw.encoding} in steps of {raw.step}, '
                         f'found {len(data)}; the message is truncated or mislabelled')
    view = np.lib.stride_tricks.as_strided(data, (rows, used), (raw.step, 1), writeable=False)
    samples = np.ascontiguousarray(view).view(dtype).astype(dtype.newbyteorder('='), copy=False)
    return samples if layout.channels == 1 else samples.reshape(rows, -1, layout.channels)


def decode_compressed(data: Bytes, where: str) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] of an encoded image (JPEG, PNG and whatever OpenCV reads).

    Pixels stay as stored: an EXIF rotation is ignored, because calibrations are made that way.
    Raises InputError when the image is truncated or cannot be decoded.
    """
    encoded = _complete(data, where)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(encoded, flags)
    if image is None:
        raise InputError(f'{where}: expected a readable image, found {len(encoded)} bytes that '
                         'cannot be decoded; remove or replace it')
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def decode_depth_image(data: Bytes, where: str) -> np.ndarray:
    """Stored samples [H, W] (uint16 or float32) of an encoded single-channel depth image.

    Raises InputError when the image is truncated, unreadable, colour or 8 bit.
    """
    encoded = _complete(data, where)
    depth = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    if depth is None:
        raise InputError(f'{where}: expected a readable depth image, found {len(encoded)} bytes '
                         'that cannot be decoded; remove or replace it')
    if depth.ndim != 2 or depth.dtype not in (np.uint16, np.float32):
        raise InputError(f'{where}: expected depth with one 16-bit channel, found '
                         f'{depth.dtype} {list(depth.shape)}; give the original depth image')
    return depth


def decode_compressed_depth(data: Bytes, encoding: str, where: str,
                            units_per_metre: float | None = None) -> NDArray[np.float32]:
    """Depth float32 [H, W] in metres of a ``compressedDepth`` message (PNG).

    A header of 12 bytes (format, two parameters) comes before the PNG. 32FC1 depth is stored
    as quantised inverse depth, v = a / depth + b (image_transport_plugins,
    compressed_depth_image_transport). ``encoding`` is the message's format field.
    Raises InputError for other codecs (RVL) and damaged data.
    """
    payload = np.frombuffer(data, np.uint8)
    if len(payload) <= COMPRESSED_DEPTH_HEADER.size or 'rvl' in encoding.lower():
        raise InputError(f'{where}: expected compressedDepth with a PNG, found {len(payload)} '
                         f'bytes of {encoding!r}; record with png_level or raw depth')
    _, a, b = COMPRESSED_DEPTH_HEADER.unpack(payload[:COMPRESSED_DEPTH_HEADER.size].tobytes())
    stored = decode_depth_image(payload[COMPRESSED_DEPTH_HEADER.size:], where)
    if not encoding.startswith('32FC1'):
        return depth_in_metres(stored, units_per_metre)
    inverse = stored.astype(np.float32) - np.float32(b)
    metres = np.divide(np.float32(a), inverse, out=np.zeros_like(inverse), where=stored > 0)
    return depth_in_metres(metres, units_per_metre)


def _complete(data: Bytes, where: str) -> NDArray[np.uint8]:
    """The bytes, after checking that a JPEG or PNG has its end: OpenCV fills in grey."""
    array = np.frombuffer(data, np.uint8)
    if len(array) == 0:
        raise InputError(f'{where}: expected an image, found no bytes; remove or replace it')
    content = array.tobytes()
    whole = True
    if content.startswith(_JPEG_START):
        whole = _jpeg_is_whole(content)
    elif content.startswith(_PNG_START):
        whole = _png_is_whole(content)
    if not whole:
        raise InputError(f'{where}: expected a whole image, found one truncated after '
                         f'{len(content)} bytes; copy it again or remove it')
    return array


def _jpeg_is_whole(content: bytes) -> bool:
    """True when an end-of-image marker follows the first scan.

    The header segments are stepped over, so a thumbnail's own end does not count; inside a
    scan 0xFF is always followed by 0x00 or a restart marker (ITU-T T.81, B.1.1.5), so the
    first 0xFFD9 is the end. Bytes after it (second pictures, padding) are allowed.
    """
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        position += 2 + int.from_bytes(content[position + 2:position + 4], 'big')
        if marker == _JPEG_SCAN:
            break
    return content.find(_JPEG_END, position) >= 0


def _png_is_whole(content: bytes) -> bool:
    """True when the chunks lead to a complete IEND."""
    position = len(_PNG_START)
    while position + 12 <= len(content):
        length = int.from_bytes(content[position:position + 4], 'big')
        if content[position + 4:position + 8] == _PNG_END:
            return True
        position += 12 + length
    return False


@dataclass(frozen=True)
class Calibration:
    """The fields of a sensor_msgs/CameraInfo (or a camera_calibration YAML) that matter.

    k [9] and p [12] are row-major and belong, like width and height, to the full sensor;
    the image shows the region of interest roi_xywh (all zero: everything), binned. r [9] turns
    a camera of a stereo pair into the rectified one; empty or zero: not at all.
    """

    width: int
    height: int
    model: str
    d: Sequence[float]
    k: Sequence[float]
    p: Sequence[float] = ()
    binning_xy: tuple[int, int] = (1, 1)
    roi_xywh: tuple[int, int, int, int] = (0, 0, 0, 0)
    r: Sequence[float] = ()


_MODELS = {'plumb_bob': 'plumb_bob', 'rational_polynomial': 'rational', 'equidistant': 'fisheye',
           'fisheye': 'fisheye', '': 'plumb_bob'}


def camera_from_calibration(info: Calibration, where: str, rectified: bool = False
                            ) -> Camera | None:
    """Camera of the published image, or None when the calibration is empty (fx = 0).

    rectified: the image was undistorted, so P counts and there is no distortion.
    Raises InputError for unknown distortion models and impossible values.
    """
    matrix = np.asarray(info.p, float).reshape(3, 4)[:, :3] if rectified \
        else np.asarray(info.k, float).reshape(3, 3)
    if matrix[0, 0] == 0:
        return None
    model, distortion = ('plumb_bob', ()) if rectified else _distortion(info, where)
    try:
        camera = Camera.from_matrix(matrix, (info.width, info.height), distortion, model)
        return _windowed(camera, info)
    except InputError as error:
        raise InputError(f'{where}: {error}') from None


def _distortion(info: Calibration, where: str) -> tuple[str, tuple[float, ...]]:
    """Our model name and coefficients; trailing zeros that the model has no place for go."""
    if not np.any(info.d):
        return 'plumb_bob', ()
    model = _MODELS.get(info.model.lower())
    if model is None:
        raise InputError(f'{where}: expected a distortion model of plumb_bob, '
                         f'rational_polynomial or equidistant, found {info.model!r}; rectify '
                         'the images or calibrate with one of these')
    coefficients = tuple(float(value) for value in info.d)
    length = {'plumb_bob': 5, 'rational': 8, 'fisheye': 4}[model]
    while len(coefficients) > length and coefficients[-1] == 0:
        coefficients = coefficients[:-1]
    return model, coefficients


def _windowed(camera: Camera, info: Calibration) -> Camera:
    """The camera of the region of interest after binning."""
    left, top, width, height = info.roi_xywh
    size_wh = (width or camera.width, height or camera.height)
    across, down = (max(1, factor) for factor in info.binning_xy)
    # Whole superpixels only, so that the scale is exactly 1 / binning.
    whole = (size_wh[0] // across * across, size_wh[1] // down * down)
    window = camera.cropped(left, top, whole)
    return window.resized((whole[0] // across, whole[1] // down))
