"""Bags: frames written come back pixel for pixel, topics are chosen, damage is said."""

import re
import struct
from dataclasses import replace

import cv2
import numpy as np
import pytest

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io import SourceOptions, open_source, require_cameras

pytest.importorskip('rosbags', reason='bags need the extra [bag]')

from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from feedforward_recon.io.bag_writer import BagTopics, write_bag

STORE = get_typestore(Stores.ROS2_HUMBLE)
STORAGES = ('sqlite3', 'mcap')
SECOND_NS = 1_000_000_000


def message(name, **values):
    return STORE.types[name](**values)


def header(stamp_ns, frame_id='camera'):
    sec, nanosec = divmod(stamp_ns, SECOND_NS)
    stamp = message('builtin_interfaces/msg/Time', sec=sec, nanosec=nanosec)
    return message('std_msgs/msg/Header', stamp=stamp, frame_id=frame_id)


def image_message(stamp_ns, pixels, encoding='rgb8'):
    pixels = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    return message('sensor_msgs/msg/Image', header=header(stamp_ns), height=height, width=width,
                   encoding=encoding, is_bigendian=0, step=pixels.nbytes // height,
                   data=pixels.reshape(-1).view(np.uint8))


def compressed_message(stamp_ns, data, encoding):
    return message('sensor_msgs/msg/CompressedImage', header=header(stamp_ns), format=encoding,
                   data=np.frombuffer(data, np.uint8))


def info_message(stamp_ns, camera, p=None, fx=None):
    roi = message('sensor_msgs/msg/RegionOfInterest', x_offset=0, y_offset=0, height=0, width=0,
                  do_rectify=False)
    k = camera.K.ravel()
    k[0] = camera.fx if fx is None else fx
    return message('sensor_msgs/msg/CameraInfo', header=header(stamp_ns), height=camera.height,
                   width=camera.width, distortion_model='plumb_bob',
                   d=np.array(camera.distortion or [0.0] * 5), k=k, r=np.eye(3).ravel(),
                   p=np.zeros(12) if p is None else np.array(p, float), binning_x=0, binning_y=0,
                   roi=roi)


def write_messages(path, messages, storage='sqlite3'):
    """A bag of (topic, message) or (topic, message, recorded_ns), recorded in that order."""
    with Writer(path, version=8, storage_plugin=StoragePlugin[storage.upper()]) as writer:
        connections = {}
        for index, (topic, content, *recorded) in enumerate(messages):
            kind = content.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(connections[topic], recorded[0] if recorded else 1 + index,
                         STORE.serialize_cdr(content, kind))
    return path


def distinct(frames):
    """Messages of the frames' images on /image."""
    return [('/image', image_message(f.stamp_ns, f.image)) for f in frames]


@pytest.mark.parametrize('storage', STORAGES)
def test_raw_frames_come_back_exactly(tmp_path, room_frames, storage):
    offset_ns = 1_700_000_000_123_456_789
    frames = [replace(f, stamp_ns=f.stamp_ns + offset_ns) for f in room_frames]
    assert write_bag(tmp_path / 'bag', frames, storage) == len(frames)
    source = open_source(tmp_path / 'bag')
    require_cameras(source)
    for _ in range(2):  # reading again starts anew
        found = list(source)
        assert len(found) == len(source) == len(frames)
        for a, b in zip(found, frames, strict=True):
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.depth, b.depth)
            assert (a.stamp_ns, a.camera) == (b.stamp_ns, b.camera)


@pytest.mark.parametrize('storage', STORAGES)
def test_compressed_frames_come_back_closely(tmp_path, room_frames, storage):
    write_bag(tmp_path / 'bag', room_frames, storage, compressed=True)
    source = open_source(tmp_path / 'bag')
    assert source.image_topic == '/camera/image_raw/compressed'
    assert source.depth_topic == '/camera/depth/image_raw/compressedDepth'
    for a, b in zip(source, room_frames, strict=True):
        assert np.abs(a.image.astype(int) - b.image).mean() < 4
        np.testing.assert_allclose(a.depth, b.depth, atol=0.00051)
        assert (a.stamp_ns, a.camera) == (b.stamp_ns, b.camera)


@pytest.mark.parametrize('storage', STORAGES)
def test_slices_of_a_bag_are_the_same_frames(tmp_path, room_frames, storage):
    write_bag(tmp_path / 'bag', room_frames, storage)
    source = open_source(tmp_path / 'bag', SourceOptions(step=2))
    for a, b in zip(source.frames(1, 5, 3), room_frames[2:10:6], strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.depth, b.depth)
    assert not list(source.frames(99))


@pytest.mark.parametrize(('storage', 'suffix'), [('sqlite3', 'db3'), ('mcap', 'mcap')])
def test_the_storage_file_alone_is_a_source(tmp_path, room_frames, storage, suffix):
    write_bag(tmp_path / 'bag', room_frames, storage)
    (path,) = (tmp_path / 'bag').glob(f'*.{suffix}')
    assert len(list(open_source(path))) == len(room_frames)


@pytest.mark.parametrize('camera', [
    Camera(160, 120, 100, 101, 80, 60, (.1, -.2, .001, .002)),
    Camera(160, 120, 100, 101, 80, 60, (.1, -.2, .001, .002, .05)),
    Camera(160, 120, 100, 101, 80, 60, (.1, -.2, .001, .002, .05, .01, .02, .03), 'rational'),
    Camera(160, 120, 100, 101, 80, 60, (.1, -.2, .001, .002), 'fisheye')])
def test_calibrations_come_back(tmp_path, room_frames, camera):
    write_bag(tmp_path / 'bag', [replace(room_frames[0], camera=camera)])
    assert next(iter(open_source(tmp_path / 'bag'))).camera == camera


def test_ground_truth_goes_to_tf(tmp_path, room_frames):
    write_bag(tmp_path / 'bag', room_frames, ground_truth=True)
    with Reader(tmp_path / 'bag') as reader:
        connections = [c for c in reader.connections if c.topic == '/tf']
        found = [STORE.deserialize_cdr(raw, c.msgtype).transforms[0]
                 for c, _, raw in reader.messages(connections)]
    positions = [[getattr(t.transform.translation, axis) for axis in 'xyz'] for t in found]
    np.testing.assert_allclose(positions, [f.T_map_cam[:3, 3] for f in room_frames])
    assert (found[0].header.frame_id, found[0].child_frame_id) == ('map', 'camera_optical_frame')


def test_a_failing_bag_leaves_nothing(tmp_path, room_frames):
    def broken():
        yield room_frames[0]
        raise RuntimeError('camera unplugged')

    with pytest.raises(RuntimeError, match='unplugged'):
        write_bag(tmp_path / 'bag', broken())
    assert not list(tmp_path.iterdir())


def test_bags_are_never_overwritten(tmp_path, room_frames):
    write_bag(tmp_path / 'bag', room_frames[:1])
    with pytest.raises(InputError, match='bag: expected a new folder'):
        write_bag(tmp_path / 'bag', room_frames)
    assert len(open_source(tmp_path / 'bag')) == 1
    with pytest.raises(InputError, match='storage'):
        write_bag(tmp_path / 'other', room_frames, 'lmdb')


# Stamps


def test_frames_come_in_stamp_order_whatever_the_order_of_recording(tmp_path, room_frames):
    order = [1, 0, 2, 5, 3, 4, 6, 7, 9, 8, 10, 11]
    depth_order = [0, 3, 2, 1, 4, 5, 7, 6, 8, 9, 11, 10]
    depths = [('/depth', image_message(room_frames[i].stamp_ns, room_frames[i].depth, '32FC1'))
              for i in depth_order]
    write_messages(tmp_path / 'bag', [*distinct([room_frames[i] for i in order]), *depths])
    for a, b in zip(open_source(tmp_path / 'bag'), room_frames, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.depth, b.depth)
        assert a.stamp_ns == b.stamp_ns


def test_a_clock_set_back_is_refused(tmp_path, room_frames):
    late = [replace(f, stamp_ns=f.stamp_ns + 5 * SECOND_NS) for f in room_frames[:3]]
    write_messages(tmp_path / 'bag', distinct([*late, *room_frames[3:]]))
    with pytest.raises(InputError, match=r'/image, found message 3 going back'):
        open_source(tmp_path / 'bag')


def test_equal_stamps_are_refused(tmp_path, room_frames):
    frames = [replace(f, stamp_ns=f.stamp_ns // SECOND_NS * SECOND_NS + 1) for f in room_frames]
    write_messages(tmp_path / 'bag', distinct(frames))
    with pytest.raises(InputError, match=r'/image: expected a later time stamp'):
        open_source(tmp_path / 'bag')


def test_recording_times_replace_stamps_that_were_never_set(tmp_path, room_frames, caplog):
    messages = [('/image', image_message(0, f.image), SECOND_NS + f.stamp_ns)
                for f in room_frames]
    write_messages(tmp_path / 'bag', messages)
    stamps = [f.stamp_ns - SECOND_NS for f in open_source(tmp_path / 'bag')]
    assert stamps == [f.stamp_ns for f in room_frames]
    assert 'no time stamps' in caplog.text


@pytest.mark.parametrize('storage', STORAGES)
def test_depth_is_paired_by_nearest_stamp(tmp_path, room_frames, storage, caplog):
    """Depth 8 ms late, recorded half a second late, one image lost on the way."""
    messages = [(f.stamp_ns, '/image', image_message(f.stamp_ns, f.image)) for f in room_frames]
    messages += [(f.stamp_ns + SECOND_NS // 2, '/depth',
                  image_message(f.stamp_ns + 8_000_000, f.depth, '32FC1'))
                 for index, f in enumerate(room_frames) if index != 4]
    write_messages(tmp_path / 'bag', [(topic, content, stamp) for stamp, topic, content
                                      in sorted(messages, key=lambda item: item[0])], storage)
    source = open_source(tmp_path / 'bag')
    kept = [f for index, f in enumerate(room_frames) if index != 4]
    for a, b in zip(source, kept, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.depth, b.depth)
    assert '1 of 12 images have no depth' in caplog.text
    assert len(open_source(tmp_path / 'bag', SourceOptions(use_depth=False))) == 12


def test_depth_that_never_matches_is_refused(tmp_path, room_frames):
    messages = distinct(room_frames)
    messages += [('/depth', image_message(f.stamp_ns + 30_000_000, f.depth, '32FC1'))
                 for f in room_frames]
    write_messages(tmp_path / 'bag', messages)
    with pytest.raises(InputError, match=r'depth on /depth within 20 ms'):
        open_source(tmp_path / 'bag')


# Topics


def two_cameras(frames):
    return [(topic, image_message(f.stamp_ns, f.image[::flip]))
            for f in frames for topic, flip in (('/left/image_raw', 1), ('/right/image_raw', -1))]


def test_one_of_two_cameras_must_be_chosen(tmp_path, room_frames):
    write_messages(tmp_path / 'bag', two_cameras(room_frames))
    with pytest.raises(InputError, match=r'one image topic, found /left/image_raw, /right/im'):
        open_source(tmp_path / 'bag')
    source = open_source(tmp_path / 'bag', SourceOptions(image_topic='/right/image_raw'))
    np.testing.assert_array_equal(next(iter(source)).image, room_frames[0].image[::-1])
    assert next(iter(source)).source == '/right/image_raw#0'


@pytest.mark.parametrize('name', ['image_topic', 'depth_topic', 'camera_info_topic'])
def test_unknown_topics_are_refused_with_a_list(tmp_path, room_frames, name):
    write_messages(tmp_path / 'bag', distinct(room_frames))
    with pytest.raises(InputError, match=r'on topic /nowhere, found none; .*/image \(Image\)'):
        open_source(tmp_path / 'bag', SourceOptions(**{name: '/nowhere'}))


def test_a_base_topic_finds_its_compressed_images_but_raw_wins(tmp_path, room_frames):
    write_bag(tmp_path / 'packed', room_frames, compressed=True)
    options = SourceOptions(image_topic='/camera/image_raw', depth_topic='/camera/depth/image_raw')
    assert open_source(tmp_path / 'packed', options).image_topic.endswith('/compressed')
    frame = room_frames[0]
    jpeg = cv2.imencode('.jpg', frame.image)[1].tobytes()
    write_messages(tmp_path / 'both', [
        ('/image', image_message(1, frame.image)),
        ('/image/compressed', compressed_message(1, jpeg, 'jpeg'))])
    assert open_source(tmp_path / 'both').image_topic == '/image'


def test_depth_packed_as_plain_png_is_depth(tmp_path, room_frames):
    frame = room_frames[0]
    png = cv2.imencode('.png', np.rint(frame.depth * 1000).astype(np.uint16))[1].tobytes()
    write_messages(tmp_path / 'bag', [
        ('/image', image_message(1, frame.image)),
        ('/depth/compressed', compressed_message(1, png, '16UC1; png compressed '))])
    (found,) = open_source(tmp_path / 'bag')
    np.testing.assert_allclose(found.depth, frame.depth, atol=0.00051)


def test_bags_without_images_are_refused(tmp_path, room_frames):
    camera = room_frames[0].camera
    write_messages(tmp_path / 'bag', [('/camera_info', info_message(1, camera))])
    with pytest.raises(InputError, match=r'expected images.*/camera_info \(CameraInfo\)'):
        open_source(tmp_path / 'bag')
    write_messages(tmp_path / 'depth', [('/d', image_message(1, room_frames[0].depth, '32FC1'))])
    with pytest.raises(InputError, match=r'expected images.*/d \(Image\)'):
        open_source(tmp_path / 'depth')
    write_messages(tmp_path / 'empty', [])
    with pytest.raises(InputError, match='topics with messages: none'):
        open_source(tmp_path / 'empty')


# Calibration


def test_the_camera_info_beside_the_image_counts(tmp_path, room_frames):
    frame = room_frames[0]
    other = replace(frame.camera, fx=33.0)
    write_messages(tmp_path / 'bag', [
        ('/other/camera_info', info_message(1, other)),
        ('/cam/camera_info', info_message(1, frame.camera)),
        ('/cam/image_raw', image_message(1, frame.image))])
    assert next(iter(open_source(tmp_path / 'bag'))).camera == frame.camera
    options = SourceOptions(camera_info_topic='/other/camera_info')
    assert next(iter(open_source(tmp_path / 'bag', options))).camera.fx == 33.0
    options = SourceOptions(fx=44.0)
    assert next(iter(open_source(tmp_path / 'bag', options))).camera.fx == 44.0


def test_a_calibration_that_changes_is_followed(tmp_path, room_frames):
    zoomed = replace(room_frames[0].camera, fx=77.0)
    change_ns = room_frames[6].stamp_ns
    write_messages(tmp_path / 'bag', [
        ('/camera_info', info_message(0, room_frames[0].camera)),
        ('/camera_info', info_message(change_ns, zoomed)), *distinct(room_frames)])
    cameras = [f.camera for f in open_source(tmp_path / 'bag')]
    assert cameras == [room_frames[0].camera] * 6 + [zoomed] * 6


def test_rectified_images_use_the_projection(tmp_path, room_frames):
    frame = room_frames[0]
    distorted = replace(frame.camera, distortion=(.1, 0, 0, 0, 0))
    p = [90, 0, 70, 0, 0, 91, 50, 0, 0, 0, 1, 0]
    write_messages(tmp_path / 'bag', [('/cam/camera_info', info_message(1, distorted, p)),
                                      ('/cam/image_rect_color', image_message(1, frame.image))])
    assert next(iter(open_source(tmp_path / 'bag'))).camera == Camera(160, 120, 90, 91, 70, 50)


def test_an_empty_calibration_leaves_the_bag_uncalibrated(tmp_path, room_frames):
    frame = room_frames[0]
    write_messages(tmp_path / 'bag', [('/camera_info', info_message(1, frame.camera, fx=0.0)),
                                      ('/image', image_message(1, frame.image))])
    source = open_source(tmp_path / 'bag')
    assert next(iter(source)).camera is None
    with pytest.raises(InputError, match='bag: expected camera intrinsics'):
        require_cameras(source)


def test_a_calibration_of_another_size_is_refused(tmp_path, room_frames):
    frame = room_frames[0]
    write_messages(tmp_path / 'bag', [
        ('/camera_info', info_message(1, frame.camera.resized((320, 240)))),
        ('/image', image_message(1, frame.image))])
    with pytest.raises(InputError, match=r'/image#0: .*160x120 images, found one of 320x240'):
        list(open_source(tmp_path / 'bag'))


# Damage


@pytest.mark.parametrize('storage', STORAGES)
def test_a_folder_without_metadata_is_refused(tmp_path, room_frames, storage):
    write_bag(tmp_path / 'bag', room_frames[:1], storage)
    (tmp_path / 'bag/metadata.yaml').unlink()
    with pytest.raises(InputError, match=r'expected metadata\.yaml beside .*reindex'):
        open_source(tmp_path / 'bag')


@pytest.mark.parametrize('storage', STORAGES)
@pytest.mark.parametrize('share', [0.0, 0.3, 0.6, 0.99])
def test_truncated_bags_are_refused(tmp_path, room_frames, storage, share):
    write_bag(tmp_path / 'bag', room_frames, storage)
    (path,) = (p for p in (tmp_path / 'bag').iterdir() if p.suffix != '.yaml')
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    with pytest.raises(InputError, match=f'^{re.escape(str(tmp_path))}.*: expected'):
        list(open_source(tmp_path / 'bag'))


@pytest.mark.parametrize('text', ['', '{', 'rosbag2_bagfile_information: {version: 99}', '[]'])
def test_damaged_metadata_is_refused(tmp_path, room_frames, text):
    write_bag(tmp_path / 'bag', room_frames[:1])
    (tmp_path / 'bag/metadata.yaml').write_text(text)
    with pytest.raises(InputError, match='bag: expected a readable ROS 2 bag'):
        open_source(tmp_path / 'bag')


@pytest.mark.parametrize(('pixels', 'words'), [
    (np.zeros((120, 160), np.float32), 'no valid value'),
    (np.full((120, 160), np.nan, np.float32), 'no valid value'),
    (np.ones((60, 100), np.float32), 'expected depth of 160x120')])
def test_unusable_depth_is_refused(tmp_path, room_frames, pixels, words):
    write_messages(tmp_path / 'bag', [('/image', image_message(1, room_frames[0].image)),
                                      ('/depth', image_message(1, pixels, '32FC1'))])
    with pytest.raises(InputError, match=f'/image#0: .*{words}'):
        list(open_source(tmp_path / 'bag'))


def test_damaged_messages_are_refused_by_name(tmp_path, room_frames):
    image = image_message(1, room_frames[0].image)
    image.data = image.data[:100]
    write_messages(tmp_path / 'short', [('/image', image)])
    with pytest.raises(InputError, match=r'short: /image#0: .*truncated'):
        list(open_source(tmp_path / 'short'))
    jpeg = cv2.imencode('.jpg', room_frames[0].image)[1].tobytes()[:-50]
    write_messages(tmp_path / 'jpeg', [('/image/compressed', compressed_message(1, jpeg, 'jpeg'))])
    with pytest.raises(InputError, match=r'jpeg: /image/compressed#0: .*truncated'):
        list(open_source(tmp_path / 'jpeg'))


def test_changing_resolution_is_refused(tmp_path, room_frames):
    images = [f.image if index < 3 else f.image[:100] for index, f in enumerate(room_frames)]
    write_messages(tmp_path / 'bag', [
        ('/image', image_message(f.stamp_ns, image))
        for f, image in zip(room_frames, images, strict=True)])
    with pytest.raises(InputError, match='/image#3: expected 160x120 pixels like /image#0'):
        list(open_source(tmp_path / 'bag'))


def test_big_endian_messages_are_understood(tmp_path, room_frames):
    """Whole messages serialised big-endian: the stamps are peeked at without rosbags."""
    content = image_message(5 * SECOND_NS + 7, room_frames[0].image)
    with Writer(tmp_path / 'bag', version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection('/image', content.__msgtype__, typestore=STORE)
        raw = STORE.serialize_cdr(content, content.__msgtype__, little_endian=False)
        assert struct.unpack_from('>iI', raw, 4) == (5, 7)
        writer.write(connection, 1, raw)
    (frame,) = open_source(tmp_path / 'bag')
    assert frame.stamp_ns == 5 * SECOND_NS + 7
    np.testing.assert_array_equal(frame.image, room_frames[0].image)


def test_topics_of_a_written_bag_can_be_named(tmp_path, room_frames):
    topics = BagTopics(image='/a/image', camera_info='/a/camera_info', depth='/a/depth')
    write_bag(tmp_path / 'bag', room_frames[:2], topics=topics)
    source = open_source(tmp_path / 'bag')
    assert (source.image_topic, source.depth_topic, source.camera_info_topic) == (
        '/a/image', '/a/depth', '/a/camera_info')
    assert '/a/image' in source.describe()
