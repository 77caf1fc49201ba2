"""Decoding: every encoding gives the pixels that were put in, damage gives one sentence."""

import struct

import cv2
import numpy as np
import pytest

from feedforward_recon.errors import InputError
from feedforward_recon.io.images import (
    Calibration,
    RawImage,
    camera_from_calibration,
    decode_compressed,
    decode_compressed_depth,
    decode_depth,
    decode_depth_image,
    decode_image,
    depth_in_metres,
)

HEIGHT, WIDTH = 12, 18


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture
def smooth():
    """Slow colour ramps, which chroma subsampling and demosaicing keep."""
    v, u = np.mgrid[:48, :64]
    return np.stack([80 + u, 60 + 2 * v, 200 - u], -1).astype(np.uint8)


def raw_image(pixels, encoding, padding=0, big_endian=False, height=None):
    """The message of pixels [rows, W, ...], with ``padding`` bytes of noise behind each row."""
    values = pixels.astype(pixels.dtype.newbyteorder('>' if big_endian else '<'))
    rows = values.reshape(len(values), -1).view(np.uint8)
    noise = np.random.default_rng(1).integers(0, 256, (len(rows), padding), np.uint8)
    data = np.hstack([rows, noise])
    return RawImage(height or len(rows), pixels.shape[1], encoding, data.shape[1], big_endian,
                    data.tobytes())


@pytest.mark.parametrize('padding', [0, 5])
@pytest.mark.parametrize(('encoding', 'order'), [('rgb8', [0, 1, 2]), ('bgr8', [2, 1, 0]),
                                                 ('8UC3', [2, 1, 0])])
def test_three_channels_come_back_exactly(rgb, encoding, order, padding):
    np.testing.assert_array_equal(
        decode_image(raw_image(rgb[..., order], encoding, padding), 'x'), rgb)


@pytest.mark.parametrize('padding', [0, 3])
@pytest.mark.parametrize(('encoding', 'order'), [('rgba8', [0, 1, 2]), ('bgra8', [2, 1, 0]),
                                                 ('8UC4', [2, 1, 0])])
def test_alpha_is_dropped(rgb, encoding, order, padding):
    alpha = np.full((HEIGHT, WIDTH, 1), 7, np.uint8)
    stored = np.concatenate([rgb[..., order], alpha], -1)
    np.testing.assert_array_equal(decode_image(raw_image(stored, encoding, padding), 'x'), rgb)


@pytest.mark.parametrize('encoding', ['mono8', '8UC1'])
def test_grey_fills_three_channels(rgb, encoding):
    grey = rgb[..., 0]
    decoded = decode_image(raw_image(grey, encoding, 2), 'x')
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, -1))


@pytest.mark.parametrize('big_endian', [False, True])
def test_mono16_keeps_the_high_byte_in_either_byte_order(big_endian):
    values = np.random.default_rng(2).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    decoded = decode_image(raw_image(values, 'mono16', 6, big_endian), 'x')
    np.testing.assert_array_equal(decoded[..., 1], values >> 8)


@pytest.mark.parametrize('order', ['rggb', 'bggr', 'gbrg', 'grbg'])
@pytest.mark.parametrize('bits', [8, 16])
def test_bayer_recovers_a_smooth_image(smooth, order, bits):
    mosaic = np.zeros(smooth.shape[:2], np.uint8)
    for position, letter in enumerate(order):
        window = np.s_[position // 2::2, position % 2::2]
        mosaic[window] = smooth[..., 'rgb'.index(letter)][window]
    stored = mosaic if bits == 8 else mosaic.astype(np.uint16) << 8
    decoded = decode_image(raw_image(stored, f'bayer_{order}{bits}'), 'x')
    inside = np.s_[2:-2, 2:-2]
    assert np.abs(decoded[inside].astype(int) - smooth[inside]).max() <= 3


def yuv_planes(rgb):
    """BT.601 limited-range Y, U, V of an RGB image, in floats (ITU-R BT.601-7, 2.5.3)."""
    r, g, b = np.moveaxis(rgb.astype(float), -1, 0)
    y = 16 + (65.738 * r + 129.057 * g + 25.064 * b) / 256
    u = 128 + (-37.945 * r - 74.494 * g + 112.439 * b) / 256
    v = 128 + (112.439 * r - 94.154 * g - 18.285 * b) / 256
    return tuple(np.rint(plane).astype(np.uint8) for plane in (y, u, v))


@pytest.mark.parametrize(('encoding', 'luma', 'padding'), [
    ('yuv422', 1, 0), ('uyvy', 1, 4), ('yuv422_yuy2', 0, 0), ('yuyv', 0, 4)])
def test_packed_yuv_recovers_a_smooth_image(smooth, encoding, luma, padding):
    y, u, v = yuv_planes(smooth)
    stored = np.zeros((*y.shape, 2), np.uint8)
    stored[..., luma] = y
    stored[:, ::2, 1 - luma], stored[:, 1::2, 1 - luma] = u[:, ::2], v[:, ::2]
    decoded = decode_image(raw_image(stored, encoding, padding), 'x')
    assert np.abs(decoded.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize(('encoding', 'swap', 'padding'), [('nv12', 0, 0), ('nv21', 1, 8)])
def test_semi_planar_yuv_recovers_a_smooth_image(smooth, encoding, swap, padding):
    y, u, v = yuv_planes(smooth)
    chroma = np.zeros((y.shape[0] // 2, y.shape[1]), np.uint8)
    chroma[:, swap::2], chroma[:, 1 - swap::2] = u[::2, ::2], v[::2, ::2]
    stored = raw_image(np.vstack([y, chroma]), encoding, padding, height=y.shape[0])
    assert np.abs(decode_image(stored, 'x').astype(int) - smooth).max() <= 6


@pytest.mark.parametrize('big_endian', [False, True])
@pytest.mark.parametrize('padding', [0, 4])
def test_integer_depth_is_millimetres(padding, big_endian):
    stored = np.random.default_rng(3).integers(1, 9000, (HEIGHT, WIDTH)).astype(np.uint16)
    depth = decode_depth(raw_image(stored, '16UC1', padding, big_endian), 'x')
    np.testing.assert_allclose(depth, stored / 1000, rtol=1e-6)
    assert depth.dtype == np.float32


@pytest.mark.parametrize('big_endian', [False, True])
def test_float_depth_is_metres_and_what_is_no_depth_becomes_zero(big_endian):
    stored = np.full((HEIGHT, WIDTH), 2.5, np.float32)
    stored[0, :4] = np.nan, np.inf, -1.0, -np.inf
    depth = decode_depth(raw_image(stored, '32FC1', 8, big_endian), 'x')
    np.testing.assert_array_equal(depth[0, :4], 0)
    assert (depth.ravel()[4:] == 2.5).all()


def test_depth_units_are_the_users():
    np.testing.assert_allclose(depth_in_metres(np.array([[5000]], np.uint16), 5000), [[1.0]])


def test_the_last_row_may_lack_its_padding(rgb):
    raw = raw_image(rgb, 'rgb8', 5)
    shorter = RawImage(raw.height, raw.width, raw.encoding, raw.step, False, raw.data[:-5])
    np.testing.assert_array_equal(decode_image(shorter, 'x'), rgb)


def test_decoded_images_own_their_memory(rgb):
    raw = raw_image(rgb, 'rgb8')
    decoded = decode_image(raw, 'x')
    decoded[:] = 0
    assert bytes(raw.data) == rgb.tobytes()


@pytest.mark.parametrize(('change', 'words'), [
    ({'encoding': 'rgb9'}, 'encoding'),
    ({'encoding': '16UC1'}, 'colour'),
    ({'data': b'1234'}, 'truncated'),
    ({'step': 3}, 'mislabelled'),
    ({'height': 0}, 'mislabelled'),
    ({'encoding': 'nv12', 'width': 5, 'height': 6}, 'even size'),
])
def test_bad_raw_images_are_refused(rgb, change, words):
    raw = raw_image(rgb, 'rgb8')
    fields = {'height': HEIGHT, 'width': WIDTH, 'encoding': 'rgb8', 'step': raw.step,
              'is_bigendian': False, 'data': raw.data, **change}
    with pytest.raises(InputError, match=f'/camera.*{words}'):
        decode_image(RawImage(**fields), '/camera')


def test_colour_is_no_depth(rgb):
    with pytest.raises(InputError, match=r'/depth: expected depth .*rgb8'):
        decode_depth(raw_image(rgb, 'rgb8'), '/depth')


def test_png_comes_back_exactly_and_jpeg_closely(smooth):
    bgr = smooth[..., ::-1]
    png, jpeg = (cv2.imencode(suffix, bgr)[1].tobytes() for suffix in ('.png', '.jpg'))
    np.testing.assert_array_equal(decode_compressed(png, 'x'), smooth)
    assert np.abs(decode_compressed(jpeg, 'x').astype(int) - smooth).mean() < 4


def progressive_jpeg(bgr):
    return cv2.imencode('.jpg', bgr, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()


@pytest.mark.parametrize('suffix', ['.jpg', '.png', 'progressive'])
@pytest.mark.parametrize('share', [0.02, 0.3, 0.7, 0.95, 0.999])
def test_truncation_is_noticed_wherever_it_happens(rgb, suffix, share):
    big = cv2.resize(rgb, (320, 240))
    content = progressive_jpeg(big) if suffix == 'progressive' else \
        cv2.imencode(suffix, big)[1].tobytes()
    decode_compressed(content, 'a.jpg')
    with pytest.raises(InputError, match=r'a\.jpg: expected'):
        decode_compressed(content[:int(len(content) * share)], 'a.jpg')


def test_a_thumbnail_does_not_hide_truncation_and_trailing_bytes_do_no_harm(rgb):
    jpeg = cv2.imencode('.jpg', cv2.resize(rgb, (320, 240)))[1].tobytes()
    thumbnail = cv2.imencode('.jpg', rgb)[1].tobytes()
    segment = b'\xff\xe1' + struct.pack('>H', len(thumbnail) + 2) + thumbnail
    with_thumbnail = jpeg[:2] + segment + jpeg[2:]
    whole = decode_compressed(with_thumbnail + b'\x00' * 100 + thumbnail, 'a.jpg')
    np.testing.assert_array_equal(whole, decode_compressed(jpeg, 'b.jpg'))
    with pytest.raises(InputError, match='truncated'):
        decode_compressed(with_thumbnail[:len(with_thumbnail) // 2], 'a.jpg')


def test_exif_rotation_is_ignored_because_calibrations_are(smooth):
    jpeg = cv2.imencode('.jpg', smooth[..., ::-1])[1].tobytes()
    # A big-endian TIFF directory with one entry: orientation (0x0112), one short, 6 (rotate).
    tiff = b'MM\x00*' + struct.pack('>IHHHIHHI', 8, 1, 0x0112, 3, 1, 6, 0, 0)
    exif = b'Exif\x00\x00' + tiff
    rotated = jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(exif) + 2) + exif + jpeg[2:]
    assert cv2.imdecode(np.frombuffer(rotated, np.uint8), cv2.IMREAD_COLOR).shape[:2] == (64, 48)
    assert decode_compressed(rotated, 'x').shape == smooth.shape


@pytest.mark.parametrize('content', [b'', b'not an image at all', b'\xff\xd8\xff'])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(InputError, match=r'a\.jpg: expected'):
        decode_compressed(content, 'a.jpg')


def test_depth_images_must_have_one_16_bit_channel(rgb):
    with pytest.raises(InputError, match=r'd\.png: .*16-bit'):
        decode_depth_image(cv2.imencode('.png', rgb)[1].tobytes(), 'd.png')
    with pytest.raises(InputError, match=r'd\.png: .*16-bit'):
        decode_depth_image(cv2.imencode('.png', rgb[..., 0])[1].tobytes(), 'd.png')


def test_compressed_depth_in_millimetres():
    stored = np.random.default_rng(4).integers(0, 9000, (HEIGHT, WIDTH)).astype(np.uint16)
    data = struct.pack('<iff', 0, 0, 0) + cv2.imencode('.png', stored)[1].tobytes()
    depth = decode_compressed_depth(data, '16UC1; compressedDepth png', 'x')
    np.testing.assert_allclose(depth, stored / 1000, rtol=1e-6)


def test_compressed_depth_as_inverse_depth():
    depth = np.random.default_rng(5).uniform(0.5, 8, (HEIGHT, WIDTH)).astype(np.float32)
    depth[0, 0] = 0
    a, limit = 100.0 * 101.0, 10.0
    b = 1 - a / limit
    quantised = np.rint(a / np.maximum(depth, 0.1) + b)
    stored = np.where(depth > 0, quantised, 0).astype(np.uint16)
    data = struct.pack('<iff', 0, a, b) + cv2.imencode('.png', stored)[1].tobytes()
    found = decode_compressed_depth(data, '32FC1; compressedDepth', 'x')
    # Half a step of v = a / z + b moves z by z^2 / (2 a).
    assert np.all(np.abs(found - depth) <= depth**2 / (2 * a) * 1.01 + 1e-6)
    assert found[0, 0] == 0


@pytest.mark.parametrize(('data', 'encoding'), [(b'123', '16UC1; compressedDepth png'),
                                                (b'1' * 99, '16UC1; compressedDepth rvl'),
                                                (b'1' * 99, '16UC1; compressedDepth png')])
def test_damaged_compressed_depth_is_refused(data, encoding):
    with pytest.raises(InputError, match='/depth: expected'):
        decode_compressed_depth(data, encoding, '/depth')


def calibration(**changes):
    fields = {'width': 64, 'height': 48, 'model': 'plumb_bob', 'd': [0.1, -0.2, 0.01, 0.02, 0.3],
              'k': [50, 0, 31, 0, 52, 23, 0, 0, 1], 'p': [40, 0, 30, 0, 0, 41, 22, 0, 0, 0, 1, 0]}
    return Calibration(**{**fields, **changes})


@pytest.mark.parametrize(('model', 'coefficients', 'name', 'kept'), [
    ('plumb_bob', [.1, .2, .3, .4], 'plumb_bob', 4),
    ('plumb_bob', [.1, .2, .3, .4, .5], 'plumb_bob', 5),
    ('plumb_bob', [.1, .2, .3, .4, .5, 0, 0, 0], 'plumb_bob', 5),
    ('rational_polynomial', [.1, .2, .3, .4, .5, .6, .7, .8], 'rational', 8),
    ('rational_polynomial', [.1, .2, .3, .4, .5, .6, .7, .8, 0, 0, 0, 0], 'rational', 8),
    ('equidistant', [.1, .2, .3, .4], 'fisheye', 4),
    ('plumb_bob', [0.0] * 5, 'plumb_bob', 0),
    ('', [], 'plumb_bob', 0),
])
def test_distortion_models_are_passed_on(model, coefficients, name, kept):
    camera = camera_from_calibration(calibration(model=model, d=coefficients), '/info')
    assert (camera.model, camera.distortion) == (name, tuple(coefficients[:kept]))


def test_binning_and_region_show_the_same_point_of_the_scene():
    full = camera_from_calibration(calibration(), '/info')
    camera = camera_from_calibration(calibration(binning_xy=(2, 3), roi_xywh=(8, 6, 33, 24)),
                                     '/info')
    assert camera.size_wh == (16, 8)
    points = np.random.default_rng(6).uniform((-.2, -.2, 1), (.2, .2, 2), (20, 3))
    # Superpixel i holds sensor pixels 2 i .. 2 i + 1 behind the corner of the window.
    expected = (full.project(points) - (8, 6) + 0.5) / (2, 3) - 0.5
    np.testing.assert_allclose(camera.project(points), expected, atol=1e-9)


def test_rectified_images_use_the_projection_and_no_distortion():
    camera = camera_from_calibration(calibration(), '/info', rectified=True)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (40, 41, 30, 22)
    assert not camera.is_distorted


def test_an_empty_calibration_is_none():
    assert camera_from_calibration(calibration(k=[0.0] * 9), '/info') is None


@pytest.mark.parametrize('changes', [{'model': 'magic'}, {'d': [1.0] * 8}, {'d': [1.0, 2.0]},
                                     {'k': [np.nan, 0, 1, 0, 1, 1, 0, 0, 1]}, {'width': 0}])
def test_impossible_calibrations_are_refused(changes):
    with pytest.raises(InputError, match='/info: expected'):
        camera_from_calibration(calibration(**changes), '/info')
