"""Messages and core values: what goes in comes out, with any library or none."""

import struct
import sys
from array import array
from dataclasses import replace
from types import ModuleType

import cv2
import numpy as np
import pytest

pytest.importorskip('sensor_msgs.msg', reason='ros: no sensor_msgs; install ROS 2 or its wheels')

from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2, PointField

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import (
    matrix_from_quat_xyzw,
    quat_xyzw_from_matrix,
    se3_exp,
)
from feedforward_recon.io.images import RawImage, decode_image
from feedforward_recon.ros import convert, optional
from feedforward_recon.types import PointCloud

HEIGHT, WIDTH = 6, 10
STAMP = 1_790_000_000_123_456_789
LIBRARIES = {'cv_bridge': 'cv_bridge', 'sensor_msgs_py': 'sensor_msgs_py.point_cloud2',
             'tf_transformations': 'tf_transformations'}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def rgb(rng):
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def block(monkeypatch, *names):
    """Make the optional libraries look as if they were not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, LIBRARIES[name], None)


@pytest.fixture(autouse=True)
def own_code(monkeypatch):
    """Each test starts without optional libraries, whatever this machine has."""
    block(monkeypatch, *LIBRARIES)
    optional.tested_libraries.cache_clear()
    yield
    optional.tested_libraries.cache_clear()


def through_dds(message):
    """The message as a subscriber gets it: serialised and read again."""
    serialization = pytest.importorskip('rclpy.serialization', reason='ros: no rclpy')
    return serialization.deserialize_message(serialization.serialize_message(message),
                                             type(message))


def padded_image(pixels, encoding, padding=0, big_endian=False, height=None):
    values = pixels.astype(pixels.dtype.newbyteorder('>' if big_endian else '<'))
    rows = values.reshape(len(values), -1).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    message = Image(height=height or len(rows), width=pixels.shape[1], encoding=encoding,
                    step=rows.shape[1], is_bigendian=int(big_endian))
    convert.fill(message.data, rows)
    return message


# -- images -------------------------------------------------------------------------------------

@pytest.mark.parametrize('padding', [0, 5])
@pytest.mark.parametrize(('encoding', 'order'), [('rgb8', [0, 1, 2]), ('bgr8', [2, 1, 0])])
def test_colour_messages_become_rgb(rgb, encoding, order, padding):
    message = padded_image(rgb[..., order], encoding, padding)
    np.testing.assert_array_equal(convert.image_rgb(message), rgb)


@pytest.mark.parametrize(('encoding', 'channels', 'dtype', 'rows'), [
    ('rgba8', 4, 'u1', 1), ('bgra8', 4, 'u1', 1), ('8UC4', 4, 'u1', 1), ('8UC3', 3, 'u1', 1),
    ('mono8', 1, 'u1', 1), ('8UC1', 1, 'u1', 1), ('mono16', 1, 'u2', 1), ('yuv422', 2, 'u1', 1),
    ('yuv422_yuy2', 2, 'u1', 1), ('nv12', 1, 'u1', 1.5), ('nv21', 1, 'u1', 1.5),
    *((f'bayer_{order}8', 1, 'u1', 1) for order in ('rggb', 'bggr', 'gbrg', 'grbg'))])
def test_messages_of_every_encoding_reach_the_decoder_whole(rng, encoding, channels, dtype, rows):
    shape = (int(HEIGHT * rows), WIDTH, channels)[:2 + (channels > 1)]
    pixels = rng.integers(0, 256, shape).astype(dtype) << (8 if dtype == 'u2' else 0)
    message = padded_image(pixels, encoding, 6, height=HEIGHT)
    found = convert.image_rgb(through_dds(message))
    whole = np.ascontiguousarray(pixels)
    raw = RawImage(HEIGHT, WIDTH, encoding, whole.nbytes // len(whole), False, whole.tobytes())
    np.testing.assert_array_equal(found, decode_image(raw, 'x'))
    assert found.shape == (HEIGHT, WIDTH, 3) and found.dtype == np.uint8


@pytest.mark.parametrize('suffix', ['.png', '.jpg'])
def test_compressed_images(suffix):
    v, u = np.mgrid[:48, :64]
    ramp = np.stack([3 * u, 4 * v, 90 + 0 * u], -1).astype(np.uint8)
    message = CompressedImage(format=f'rgb8; {suffix[1:]} compressed bgr8')
    convert.fill(message.data, cv2.imencode(suffix, ramp[..., ::-1])[1])
    found = convert.image_rgb(message)
    assert np.abs(found.astype(int) - ramp).mean() < (0.001 if suffix == '.png' else 4)


@pytest.mark.parametrize('big_endian', [False, True])
@pytest.mark.parametrize('padding', [0, 6])
def test_depth_messages(rng, padding, big_endian):
    millimetres = rng.integers(1, 9000, (HEIGHT, WIDTH)).astype(np.uint16)
    for stored, encoding in ((millimetres, '16UC1'),
                             ((millimetres / 1000).astype(np.float32), '32FC1')):
        found = convert.depth_metres(padded_image(stored, encoding, padding, big_endian))
        np.testing.assert_allclose(found, millimetres / 1000, rtol=1e-6)
        assert found.dtype == np.float32


@pytest.mark.parametrize(('kind', 'header'), [
    ('16UC1; compressedDepth png', struct.pack('<iff', 0, 0, 0)), ('16UC1; png compressed', b'')])
def test_compressed_depth_messages(rng, kind, header):
    millimetres = rng.integers(0, 9000, (HEIGHT, WIDTH)).astype(np.uint16)
    message = CompressedImage(format=kind)
    png = header + cv2.imencode('.png', millimetres)[1].tobytes()
    convert.fill(message.data, np.frombuffer(png, np.uint8))
    np.testing.assert_allclose(convert.depth_metres(message), millimetres / 1000, rtol=1e-6)


@pytest.mark.parametrize('change', [{'data': array('B', b'123')}, {'encoding': 'magic'},
                                    {'step': 3}, {'height': 0}])
def test_bad_images_start_with_the_topic(rgb, change):
    message = padded_image(rgb, 'rgb8')
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(InputError, match=r'/cam: expected'):
        convert.image_rgb(message, '/cam')
    with pytest.raises(InputError, match=r'/cam: expected'):
        convert.depth_metres(message, '/cam')


def test_images_written_are_read_back_with_stamp_and_frame(rgb):
    message = through_dds(convert.image_msg(rgb, 'camera', STAMP))
    np.testing.assert_array_equal(convert.image_rgb(message), rgb)
    assert (message.header.frame_id, convert.stamp_ns(message.header)) == ('camera', STAMP)
    # A view with strides, as a mirrored image is.
    mirrored = convert.image_rgb(convert.image_msg(rgb[:, ::-1], 'camera', STAMP))
    np.testing.assert_array_equal(mirrored, rgb[:, ::-1])


@pytest.mark.parametrize('encoding', ['32FC1', '16UC1'])
def test_depth_written_is_read_back_and_unknown_stays_unknown(rng, encoding):
    depth = np.rint(rng.uniform(0.3, 60, (HEIGHT, WIDTH)) * 1000).astype(np.float32) / 1000
    depth[0, :2] = 0
    message = convert.depth_msg(depth, 'camera', STAMP, encoding)
    np.testing.assert_allclose(convert.depth_metres(through_dds(message)), depth, rtol=1e-6)
    assert message.encoding == encoding


def test_depth_that_16_bits_cannot_hold_is_unknown():
    message = convert.depth_msg(np.full((2, 2), 70.0, np.float32), 'c', 0, '16UC1')
    assert not convert.depth_metres(message).any()
    with pytest.raises(InputError, match='rgb8'):
        convert.depth_msg(np.ones((2, 2), np.float32), 'c', 0, 'rgb8')


def test_unknown_float_depth_is_nan_on_the_wire():
    message = convert.depth_msg(np.array([[0, 2]], np.float32), 'c', 0)
    np.testing.assert_array_equal(np.frombuffer(message.data, '<f4'), [np.nan, 2])


# -- writing ------------------------------------------------------------------------------------

def test_fill_writes_in_place_and_replaces():
    field = array('B', b'old content')
    same = field
    convert.fill(field, np.array([1, 2], '<u2'))
    assert same.tobytes() == b'\x01\x00\x02\x00'
    convert.fill(field, np.zeros((0, 3), np.float32))
    assert len(field) == 0


def test_messages_are_written_without_the_checked_assignment(rgb, monkeypatch):
    """On Humble that assignment looks at each byte of an image."""
    for kind, make in ((Image, lambda: convert.image_msg(rgb, 'c', 0)),
                       (PointCloud2, lambda: convert.cloud_msg(PointCloud(), 'map', 0))):
        assignments = []
        original = kind.data
        monkeypatch.setattr(kind, 'data', property(
            original.fget, lambda self, value, original=original, seen=assignments:
            (seen.append(len(value)), original.fset(self, value))))
        make()
        assert not any(assignments)  # only the empty array of the constructor


# -- cameras ------------------------------------------------------------------------------------

@pytest.mark.parametrize('camera', [
    Camera(64, 48, 50.0, 52.0, 31.0, 23.0),
    Camera(64, 48, 50.0, 52.0, 31.0, 23.0, (.1, -.2, .01, .02, .3)),
    Camera(64, 48, 50.0, 52.0, 31.0, 23.0, (.1, .2, .01, .02, .3, .4, .5, .6), 'rational'),
    Camera(64, 48, 50.0, 52.0, 31.0, 23.0, (.1, .02, .03, .04), 'fisheye')])
def test_cameras_written_are_read_back(camera):
    message = through_dds(convert.info_msg(camera, 'camera', STAMP))
    assert convert.camera_from_info(message) == camera
    straight = replace(camera, distortion=(), model='plumb_bob')
    assert convert.camera_from_info(message, rectified=True) == straight
    assert message.distortion_model in ('plumb_bob', 'rational_polynomial', 'equidistant')


def test_binning_and_region_of_interest_are_honoured():
    message = convert.info_msg(Camera(64, 48, 50.0, 52.0, 31.0, 23.0), 'camera', 0)
    message.binning_x = message.binning_y = 2
    message.roi.x_offset, message.roi.y_offset = 8, 4
    message.roi.width, message.roi.height = 32, 24
    camera = convert.camera_from_info(message)
    assert camera.size_wh == (16, 12)
    assert (camera.fx, camera.cx) == (25.0, (31 - 8 + 0.5) / 2 - 0.5)


def test_an_empty_calibration_is_no_camera_and_a_bad_one_is_named():
    assert convert.camera_from_info(CameraInfo()) is None
    message = convert.info_msg(Camera.from_fov(60, (64, 48)), 'camera', 0)
    message.distortion_model, message.d = 'magic', [0.1]
    with pytest.raises(InputError, match=r'/info: expected a distortion model.*magic'):
        convert.camera_from_info(message, where='/info')


# -- stamps, poses, covariance --------------------------------------------------------------------

@pytest.mark.parametrize('ns', [0, 1, 999_999_999, 1_000_000_000, STAMP])
def test_stamps_keep_every_nanosecond(ns):
    stamp = convert.stamp_msg(ns)
    assert convert.stamp_ns(stamp) == ns
    assert 0 <= stamp.nanosec < 1_000_000_000


@pytest.mark.parametrize('seed', range(8))
def test_poses_and_transforms_are_read_back(seed):
    rng = np.random.default_rng(seed)
    T = se3_exp(np.r_[rng.normal(0, 10, 3), rng.uniform(-1.8, 1.8, 3)])
    pose = through_dds(convert.pose_msg(T))
    np.testing.assert_allclose(convert.matrix_from_pose(pose), T, atol=1e-12)
    q = pose.orientation
    assert q.x**2 + q.y**2 + q.z**2 + q.w**2 == pytest.approx(1, abs=1e-12)
    stamped = through_dds(convert.transform_msg(T, 'map', 'camera', STAMP))
    assert (stamped.header.frame_id, stamped.child_frame_id) == ('map', 'camera')
    assert convert.stamp_ns(stamped.header) == STAMP
    for message in (stamped, stamped.transform):
        np.testing.assert_allclose(convert.matrix_from_transform(message), T, atol=1e-12)


def test_quaternions_have_w_last():
    T = np.eye(4)
    T[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    q = convert.pose_msg(T).orientation
    np.testing.assert_allclose(np.array([q.x, q.y, q.z, q.w]) * np.sign(q.w),
                               [0, 0, np.sqrt(.5), np.sqrt(.5)], atol=1e-12)


@pytest.mark.parametrize(('field', 'value', 'words'), [
    ('orientation', 0.0, 'quaternion'), ('position', float('nan'), 'finite position')])
def test_poses_without_meaning_are_refused(field, value, words):
    pose = convert.pose_msg(np.eye(4))
    if field == 'orientation':
        pose.orientation.w = value
    else:
        pose.position.x = value
    with pytest.raises(InputError, match=words):
        convert.matrix_from_pose(pose)


def random_covariance(rng):
    """Positive definite, with position in metres and rotation in thousandths of a radian."""
    A = rng.normal(size=(6, 6)) * np.repeat([1.0, 1e-3], 3)[:, None]
    return A @ A.T


def test_covariance_is_passed_on_row_major(rng):
    C = random_covariance(rng)
    found = convert.covariance_list(C)
    np.testing.assert_allclose(np.reshape(found, (6, 6)), C, rtol=1e-12)
    assert len(found) == 36 and all(type(value) is float for value in found)


@pytest.mark.parametrize('kind', ['zero', 'flat', 'rounding', 'asymmetric rounding'])
def test_covariance_comes_out_symmetric_positive_definite(rng, kind):
    C = random_covariance(rng)
    if kind == 'zero':
        C = np.zeros((6, 6))
    elif kind == 'flat':
        direction = rng.normal(size=6)
        C = np.outer(direction, direction)
    elif kind == 'rounding':
        C[2] = C[:, 2] = 0
        C[2, 2] = -1e-15
    else:
        C += 1e-9 * np.outer(*2 * [np.sqrt(np.diag(C))]) * rng.normal(size=(6, 6))
    found = np.reshape(convert.covariance_list(C), (6, 6))
    np.testing.assert_array_equal(found, found.T)
    np.linalg.cholesky(found)
    sigma = np.sqrt(np.maximum(np.diag(C), 1e-12))
    # Where there was no variance at all, the smallest one is new.
    limit = 1.01 if kind in ('zero', 'rounding') else 1e-6
    assert np.abs((found - C) / np.outer(sigma, sigma)).max() < limit


@pytest.mark.parametrize('damage', ['negative', 'coupled', 'indefinite', 'asymmetric', 'nan',
                                    'shape'])
def test_what_is_no_covariance_is_refused(rng, damage):
    C = random_covariance(rng)
    if damage == 'negative':
        C = np.diag([1.0, 1, 1, 1, -1e-6, 1])
    elif damage == 'coupled':
        C[4, 4] = -1e-6
    elif damage == 'indefinite':
        C[0, 1] = C[1, 0] = 2 * np.sqrt(C[0, 0] * C[1, 1])
    elif damage == 'asymmetric':
        C[3, 5] += 0.1 * np.sqrt(C[3, 3] * C[5, 5])
    elif damage == 'nan':
        C[1, 1] = np.nan
    else:
        C = C[:3]
    with pytest.raises(InputError, match='covariance'):
        convert.covariance_list(C)


# -- clouds ---------------------------------------------------------------------------------------

def random_cloud(rng, count=50):
    return PointCloud(rng.normal(size=(count, 3)).astype(np.float32),
                      rng.integers(0, 256, (count, 3), np.uint8))


@pytest.mark.parametrize('count', [0, 1, 50])
def test_clouds_are_read_back_exactly(rng, count):
    cloud = random_cloud(rng, count)
    found = convert.cloud_from_msg(through_dds(convert.cloud_msg(cloud, 'map', STAMP)))
    np.testing.assert_array_equal(found.xyz, cloud.xyz)
    np.testing.assert_array_equal(found.rgb, cloud.rgb)


def test_the_layout_of_clouds_is_what_rviz_and_pcl_read():
    cloud = PointCloud(np.array([[1, 2, 3]], np.float32), np.array([[10, 20, 30]], np.uint8))
    message = convert.cloud_msg(cloud, 'map', STAMP)
    assert [(f.name, f.offset, f.datatype, f.count) for f in message.fields] == [
        ('x', 0, 7, 1), ('y', 4, 7, 1), ('z', 8, 7, 1), ('rgb', 12, 7, 1)]
    assert (message.point_step, message.row_step, message.width, message.height) == (16, 16, 1, 1)
    assert message.is_dense and not message.is_bigendian
    assert struct.unpack('<fffI', message.data.tobytes()) == (1, 2, 3, 10 << 16 | 20 << 8 | 30)
    assert (message.header.frame_id, convert.stamp_ns(message.header)) == ('map', STAMP)


def test_points_that_are_not_finite_are_left_out(rng):
    cloud = random_cloud(rng)
    cloud.xyz[3, 1], cloud.xyz[7, 0] = np.nan, np.inf
    message = convert.cloud_msg(cloud, 'map', 0)
    assert message.width == 48
    np.testing.assert_array_equal(convert.cloud_from_msg(message).rgb,
                                  np.delete(cloud.rgb, [3, 7], 0))


def foreign_cloud(rng, colour='rgba', order='>', padding=11):
    """Two rows of three points with gaps, float64 positions and noise behind each row."""
    layout = np.dtype({'names': ['y', 'x', 'z', colour, 'ring'], 'itemsize': 40,
                       'formats': [order + 'f8'] * 3 + [order + 'u4', order + 'u2'],
                       'offsets': [0, 8, 16, 28, 34]})
    points = np.zeros((2, 3), layout)
    for name in 'xyz':
        points[name] = rng.normal(size=(2, 3)).astype(np.float32)
    points[colour] = rng.integers(0, 2**32, (2, 3))
    rows = np.pad(points.view(np.uint8).reshape(2, -1), ((0, 0), (0, padding)), constant_values=9)
    message = PointCloud2(height=2, width=3, point_step=40, row_step=rows.shape[1],
                          is_bigendian=order == '>')
    kinds = {'y': 8, 'x': 8, 'z': 8, colour: PointField.UINT32, 'ring': PointField.UINT16}
    message.fields = [PointField(name=name, offset=layout.fields[name][1], datatype=kind, count=1)
                      for name, kind in kinds.items()]
    convert.fill(message.data, rows)
    return message, points.ravel()


@pytest.mark.parametrize('order', ['<', '>'])
def test_clouds_of_other_layouts_are_read(rng, order):
    message, points = foreign_cloud(rng, order=order)
    found = convert.cloud_from_msg(message)
    np.testing.assert_array_equal(found.xyz, np.stack([points[n] for n in 'xyz'], -1))
    np.testing.assert_array_equal(found.rgb[:, 0], points['rgba'] >> 16 & 255)
    np.testing.assert_array_equal(found.rgb[:, 2], points['rgba'] & 255)


def test_clouds_without_colour_are_white_and_without_z_are_refused(rng):
    message, _ = foreign_cloud(rng, colour='intensity')
    assert (convert.cloud_from_msg(message).rgb == 255).all()
    message.fields = [field for field in message.fields if field.name != 'z']
    with pytest.raises(InputError, match='fields x y z'):
        convert.cloud_from_msg(message)


def test_truncated_clouds_are_refused(rng):
    message, _ = foreign_cloud(rng)
    convert.fill(message.data, np.zeros(9, np.uint8))
    with pytest.raises(InputError, match='truncated'):
        convert.cloud_from_msg(message)


# -- optional libraries -------------------------------------------------------------------------

class GoodBridge:
    """What cv_bridge promises, by way of our decoder."""

    calls = 0

    def imgmsg_to_cv2(self, msg, encoding):
        type(self).calls += 1
        kind = {'16UC1': 'u2', '32FC1': 'f4'}.get(msg.encoding)
        if kind is None:
            assert encoding == 'rgb8'
            return decode_image(RawImage(msg.height, msg.width, msg.encoding, msg.step, False,
                                         msg.data), 'x')
        kind = np.dtype(kind).newbyteorder('>' if msg.is_bigendian else '<')
        rows = np.frombuffer(msg.data, np.uint8).reshape(msg.height, msg.step)
        rows = np.ascontiguousarray(rows[:, :msg.width * kind.itemsize]).view(kind)
        return rows.astype(kind.newbyteorder('='))


class PlainBridge(GoodBridge):
    """Like the released ones: padded rows and big-endian samples are beyond it."""

    def imgmsg_to_cv2(self, msg, encoding):
        channels = 3 if msg.encoding in ('rgb8', 'bgr8') else 1
        assert not msg.is_bigendian and len(msg.data) == msg.height * msg.step
        assert msg.step in (size * msg.width * channels for size in (1, 2, 4))
        return super().imgmsg_to_cv2(msg, encoding)


class ByteBridge(GoodBridge):
    """Reads 16-bit depth as bytes."""

    def imgmsg_to_cv2(self, msg, encoding):
        image = super().imgmsg_to_cv2(msg, encoding)
        return image.astype(np.uint8) if msg.encoding == '16UC1' else image


class SwappedBridge(GoodBridge):
    """Gives BGR whatever one asks for."""

    def imgmsg_to_cv2(self, msg, encoding):
        image = super().imgmsg_to_cv2(msg, encoding)
        return image[..., ::-1] if image.ndim == 3 else image


class RaisingBridge(GoodBridge):
    """Built for NumPy 1."""

    def imgmsg_to_cv2(self, msg, encoding):
        raise AttributeError('_ARRAY_API not found')


def install(monkeypatch, name, **content):
    """Put a stand-in where ``import name`` finds it, and choose anew."""
    parts = LIBRARIES[name].split('.')
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, '.'.join(parts[:depth]), ModuleType(parts[depth - 1]))
    vars(sys.modules[LIBRARIES[name]]).update(content)
    optional.tested_libraries.cache_clear()


def test_without_libraries_everything_is_our_own():
    assert convert.conversion_paths() == dict.fromkeys(LIBRARIES, 'own: not installed')


@pytest.mark.parametrize(('bridge', 'words'), [
    (ByteBridge, '16UC1'), (SwappedBridge, 'rgb8'),
    (RaisingBridge, '_ARRAY_API')])
def test_a_wrong_bridge_is_never_used_and_we_say_why(monkeypatch, rgb, bridge, words):
    install(monkeypatch, 'cv_bridge', CvBridge=bridge)
    path = convert.conversion_paths()['cv_bridge']
    assert path.startswith('own: cv_bridge failed the self-test (') and words in path
    for padding in (0, 5):
        np.testing.assert_array_equal(convert.image_rgb(padded_image(rgb, 'rgb8', padding)), rgb)


def test_a_right_bridge_gets_the_plain_messages_and_changes_nothing(monkeypatch, rgb, rng):
    depth = rng.integers(0, 60000, (HEIGHT, WIDTH)).astype(np.uint16)
    metres = depth.astype(np.float32) / 7
    messages = [padded_image(rgb[..., ::-1], 'bgr8'), padded_image(rgb, 'rgb8'),
                padded_image(rgb[..., 0], 'mono8'), padded_image(rgb, '8UC3'),
                *(padded_image(rgb, 'rgb8', padding) for padding in (3, 5))]
    depths = [padded_image(depth, '16UC1'), padded_image(metres, '32FC1'),
              padded_image(depth, '16UC1', 4), padded_image(depth, '16UC1', 0, True)]

    def all_read():
        return [convert.image_rgb(m) for m in messages] + [convert.depth_metres(m) for m in depths]

    own = all_read()
    install(monkeypatch, 'cv_bridge', CvBridge=PlainBridge)
    assert convert.conversion_paths()['cv_bridge'] == 'cv_bridge'
    before = PlainBridge.calls
    for found, expected in zip(all_read(), own, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert PlainBridge.calls == before + 5  # plain, and of an encoding it was tested with


def test_damage_gets_our_sentence_with_a_bridge_too(monkeypatch, rgb):
    install(monkeypatch, 'cv_bridge', CvBridge=GoodBridge)
    message = padded_image(rgb, 'rgb8')
    del message.data[50:]
    with pytest.raises(InputError, match=r'/cam: expected .* bytes'):
        convert.image_rgb(message, '/cam')


def test_a_bridge_that_shows_the_message_itself_gets_copied(monkeypatch, rgb):
    class Viewing(GoodBridge):
        def imgmsg_to_cv2(self, msg, encoding):
            if msg.encoding == 'rgb8' and msg.step == 3 * msg.width:
                return np.frombuffer(msg.data, np.uint8).reshape(msg.height, msg.width, 3)
            return super().imgmsg_to_cv2(msg, encoding)

    install(monkeypatch, 'cv_bridge', CvBridge=Viewing)
    message = padded_image(rgb, 'rgb8')
    found = convert.image_rgb(message)
    found[:] = 0
    assert message.data.tobytes() == rgb.tobytes()


def test_libraries_that_cannot_be_imported_are_named(monkeypatch):
    monkeypatch.setattr(optional.importlib, 'import_module',
                        lambda name: (_ for _ in ()).throw(ImportError('built for NumPy 1')))
    optional.tested_libraries.cache_clear()
    assert convert.conversion_paths()['cv_bridge'] == \
        'own: cv_bridge cannot be imported (ImportError: built for NumPy 1)'


def test_what_a_library_misses_is_named(monkeypatch):
    def halted(name):
        raise ModuleNotFoundError("No module named 'transforms3d'", name='transforms3d')
    monkeypatch.setattr(optional.importlib, 'import_module', halted)
    optional.tested_libraries.cache_clear()
    assert convert.conversion_paths()['tf_transformations'] == \
        'own: tf_transformations needs transforms3d, which is not installed'


def read_points(message, field_names):
    """What sensor_msgs_py does: it takes rows for unpadded and samples for little-endian."""
    kinds = {7: '<f4', 8: '<f8', 6: '<u4'}
    fields = {field.name: field for field in message.fields}
    layout = np.dtype({'names': field_names, 'itemsize': message.point_step,
                       'formats': [kinds[fields[n].datatype] for n in field_names],
                       'offsets': [fields[n].offset for n in field_names]})
    return np.ndarray(message.width * message.height, layout, message.data)


@pytest.mark.parametrize(('order', 'padding', 'used'), [('<', 0, True), ('<', 11, False),
                                                        ('>', 0, False)])
def test_a_right_cloud_reader_gets_plain_clouds_and_changes_nothing(monkeypatch, rng, order,
                                                                    padding, used):
    calls = []

    def reader(message, field_names):
        calls.append(message)
        return read_points(message, field_names)

    message, _ = foreign_cloud(rng, order=order, padding=padding)
    own = convert.cloud_from_msg(message)
    install(monkeypatch, 'sensor_msgs_py', read_points=reader)
    assert convert.conversion_paths()['sensor_msgs_py'] == 'sensor_msgs_py'
    found = convert.cloud_from_msg(message)
    assert (calls[-1] is message) == used
    np.testing.assert_array_equal(found.xyz, own.xyz)
    np.testing.assert_array_equal(found.rgb, own.rgb)


@pytest.mark.parametrize(('reader', 'words'), [
    (lambda message, field_names: np.roll(read_points(message, field_names), 1), 'field x'),
    (lambda message, field_names: iter([(1, 2, 3, 4)]), 'no array'),
    (None, 'TypeError')])
def test_a_wrong_cloud_reader_is_never_used(monkeypatch, rng, reader, words):
    install(monkeypatch, 'sensor_msgs_py', read_points=reader)
    path = convert.conversion_paths()['sensor_msgs_py']
    assert path.startswith('own: sensor_msgs_py failed the self-test') and words in path
    cloud = random_cloud(rng)
    found = convert.cloud_from_msg(convert.cloud_msg(cloud, 'map', 0))
    np.testing.assert_array_equal(found.xyz, cloud.xyz)


W_LAST, W_FIRST = [0, 1, 2, 3], [3, 0, 1, 2]


def quaternion_library(given, taken):
    """What tf_transformations promises, with components given and taken in some order."""
    def to_matrix(q):
        T = np.eye(4)
        T[:3, :3] = matrix_from_quat_xyzw(np.asarray(q)[np.argsort(taken)])
        return T
    return {'quaternion_from_matrix': lambda T: quat_xyzw_from_matrix(T[:3, :3])[given],
            'quaternion_matrix': to_matrix}


@pytest.mark.parametrize(('orders', 'path'), [
    ((W_LAST, W_LAST), 'tf_transformations'),
    *(((given, taken), 'own: tf_transformations failed the self-test (quaternion convention)')
      for given, taken in ((W_FIRST, W_FIRST), (W_FIRST, W_LAST), (W_LAST, W_FIRST)))])
def test_quaternions_are_used_only_with_w_last(monkeypatch, rng, orders, path):
    install(monkeypatch, 'tf_transformations', **quaternion_library(*orders))
    assert convert.conversion_paths()['tf_transformations'] == path
    T = se3_exp(rng.normal(size=6))
    pose = convert.pose_msg(T)
    np.testing.assert_allclose(convert.matrix_from_pose(pose), T, atol=1e-12)
    assert matrix_from_quat_xyzw(np.array([pose.orientation.x, pose.orientation.y,
                                           pose.orientation.z, pose.orientation.w])) \
        == pytest.approx(T[:3, :3])


@pytest.mark.parametrize('name', LIBRARIES)
def test_the_real_library_and_our_own_code_agree(monkeypatch, rng, rgb, name):
    """Where ROS brings it; one that fails the self-test is not used, so that they agree too."""
    cloud = convert.cloud_msg(random_cloud(rng), 'map', 0)
    image, depth = padded_image(rgb, 'bgr8', 5), padded_image(rgb[..., 0].astype('u2'), '16UC1')
    T = se3_exp(rng.normal(size=6))

    def everything():
        return (convert.image_rgb(image), convert.depth_metres(depth),
                convert.cloud_from_msg(cloud).xyz, convert.cloud_from_msg(cloud).rgb,
                convert.matrix_from_pose(convert.pose_msg(T)))

    own = everything()
    for module in {LIBRARIES[name].split('.')[0], LIBRARIES[name]}:
        monkeypatch.delitem(sys.modules, module)
    optional.tested_libraries.cache_clear()
    if convert.conversion_paths()[name] == 'own: not installed':
        pytest.skip(f'no {name}: it comes with a full ROS install')
    for found, expected in zip(everything(), own, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-9)
