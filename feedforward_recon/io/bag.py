"""ROS 2 bags (sqlite3 and mcap) without ROS, through the pure-Python package rosbags.

A bag is indexed once when it is opened: header stamps of image, depth and calibration. Frames
come in the order of their header stamps, whatever the order of recording, and depth and right
images are paired with the nearest image within 20 ms. Nothing depends on the clock: a bag reads
as fast as the disk and the decoder allow, and the same way every time.
"""

from __future__ import annotations

import logging
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.stereo import StereoRig
from feedforward_recon.io.images import (
    DEPTH_ENCODINGS,
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
from feedforward_recon.io.source import (
    SECOND_NS,
    Source,
    SourceOptions,
    check_stamps,
    checked_size,
    mutual_nearest,
    seconds,
)
from feedforward_recon.io.stereo import right_pose
from feedforward_recon.types import FloatArray, Frame, RightImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from feedforward_recon.geometry.camera import Camera

logger = logging.getLogger(__name__)

BAG_SUFFIXES = frozenset({'.mcap', '.db3'})
IMAGE = 'sensor_msgs/msg/Image'
COMPRESSED = 'sensor_msgs/msg/CompressedImage'
CAMERA_INFO = 'sensor_msgs/msg/CameraInfo'
LEFT_NAME = r'left(?=[/_]|$)'  # in topics: /left/image_raw, /camera_left/image_raw
TRANSPORTS = ('/compressed', '/compressedDepth')
# Networks deliver late by milliseconds; a longer step back is a restarted clock or a loop.
LATE_NS = SECOND_NS


@dataclass
class _Stamps:
    """Header and recording stamps of one topic, in the order of recording."""

    header_ns: list[int] = field(default_factory=list)
    recorded_ns: list[int] = field(default_factory=list)

    def chosen(self, topic: str) -> NDArray[np.int64]:
        """Header stamps, or recording stamps when no header was ever filled in."""
        if self.header_ns and not any(self.header_ns):
            logger.warning('%s: headers carry no time stamps; the recording times are used', topic)
            return np.array(self.recorded_ns, np.int64)
        return np.array(self.header_ns, np.int64)


@dataclass(frozen=True)
class _Pair:
    """One frame of the bag: positions of its messages within their topics (-1: none)."""

    stamp_ns: int
    image: int
    depth: int
    right: int = -1


class _RightHalf:
    """The right images of a stereo pair in a bag: their topic and how they were taken."""

    def __init__(self, topic: str, info_topic: str) -> None:
        self.topic, self.info_topic = topic, info_topic
        self._infos: dict[str, Calibration] = {}  # the first of each camera
        self._found: tuple[Camera, FloatArray] | None = None

    def note(self, topic: str, message: Any) -> None:
        """A CameraInfo of either camera."""
        self._infos.setdefault(topic, _calibration(message))

    def calibrate(self, cameras: list[tuple[int, Camera]], left_topic: str, where: str, *,
                  rectified: bool) -> None:
        """Right camera and T_left_right from what was noted. Raises InputError without them."""
        right = self._infos.pop(self.info_topic, None)
        left = next(iter(self._infos.values()), None)
        if left is None or right is None:
            raise InputError(f'{where}: expected CameraInfo of both cameras beside {left_topic} '
                             f'and {self.topic}, found none for the '
                             f'{"left" if left is None else "right"} one; record both, or leave '
                             'the right images out (--mono)')
        rectified = rectified or _is_rectified(self.topic)
        camera = camera_from_calibration(right, self.info_topic, rectified)
        if camera is None or not cameras:
            raise InputError(f'{self.info_topic}: expected two calibrated cameras, found fx = 0; '
                             'calibrate the pair')
        T_left_right = right_pose(left, right, rectified=rectified)
        try:
            StereoRig(cameras[0][1], camera, T_left_right)
        except InputError as error:
            raise InputError(f'{self.info_topic}: {error}, or leave the right images out (--mono)'
                             ) from None
        self._found = camera, T_left_right

    def image(self, pixels: NDArray[np.uint8]) -> RightImage | None:
        """A right image with its camera."""
        return None if self._found is None else RightImage(pixels, *self._found)

    def check(self, partner: NDArray, where: str) -> None:
        """Images without their right one (-1) are used; a pair that never meets is none."""
        alone = int((partner < 0).sum())
        if alone == len(partner):
            raise InputError(f'{where}: expected images on {self.topic} within 20 ms of the left '
                             'ones, found none; check the stamps or leave the right images out '
                             '(--mono)')
        if alone:
            logger.warning('%s: %d of %d images have no right image within 20 ms and are used '
                           'without', where, alone, len(partner))


class BagSource(Source):
    """Frames of one camera in a bag folder, or in a single .mcap or .db3 file."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        """Choose the topics and index their stamps.

        Raises InputError when the bag is damaged, a topic is unknown or the choice not unique,
        there are no images, none has depth, or the clock was set back.
        """
        super().__init__(str(path), options)
        self._path = path
        self._typestore = _typestore()
        with self._reader() as reader:
            topics = _Topics(path, reader, self._message, options)
            self.image_topic, self.depth_topic = topics.image, topics.depth
            self.camera_info_topic = topics.camera_info
            self._types = {c.topic: c.msgtype for c in reader.connections}
            self.right = _RightHalf(topics.right, topics.right_info) if topics.right else None
            self._cameras, self._pairs = self._indexed(reader)
        self.has_depth, self.has_right = bool(self.depth_topic), self.right is not None
        self.calibrated = options.has_camera or bool(self._cameras)

    @property
    def total(self) -> int:
        """Frames in the bag."""
        return len(self._pairs)

    def describe(self) -> str:
        """One line for people, with the topics."""
        topics = [*self._image_topics, *filter(None, (self.camera_info_topic,))]
        return f'{super().describe()} ({", ".join(topics)})'

    @property
    def frame_id(self) -> str:
        """TF frame of the first image."""
        with self._reader() as reader:
            _, _, raw = next(self._raw(reader, {self.image_topic}))
        return self._message(raw, self._types[self.image_topic]).header.frame_id

    def topics_of(self, msgtype: str) -> list[str]:
        """Topics of a type, such as nav_msgs/msg/Odometry."""
        return sorted(topic for topic, found in self._types.items() if found == msgtype)

    def messages(self, topics: set[str]) -> Iterator[tuple[str, Any]]:
        """Topic and content of the messages on other topics than the images', as recorded.

        Raises InputError for a damaged bag.
        """
        if not topics:  # to rosbags no connections mean all of them
            return
        with self._reader() as reader:
            for topic, _, raw in self._raw(reader, topics):
                yield topic, self._message(raw, self._types[topic])

    @contextmanager
    def _reader(self) -> Iterator[Any]:
        """An open rosbags reader; whatever a damaged bag makes it raise becomes InputError."""
        from rosbags.rosbag2 import Reader

        try:
            with Reader(self._path) as reader:
                yield reader
        except (InputError, GeneratorExit):
            raise
        except Exception as error:  # storage plug-ins raise anything from sqlite, struct, zstd
            detail = ' '.join(str(error).split()) or type(error).__name__
            raise InputError(f'{self._path}: expected a readable ROS 2 bag, found {detail}; '
                             'record it again or repair it') from error

    def _message(self, raw: bytes, msgtype: str) -> Any:
        return self._typestore.deserialize_cdr(raw, msgtype)

    def _indexed(self, reader: Any) -> tuple[list[tuple[int, Camera]], list[_Pair]]:
        """Calibrations by stamp, and which messages make a frame."""
        stamps = {topic: _Stamps() for topic in self._image_topics}
        infos: list[tuple[int, Camera]] = []
        right_info = '' if self.right is None else self.right.info_topic
        for topic, recorded_ns, raw in self._raw(reader, {*stamps, self.camera_info_topic,
                                                          right_info}):
            if topic in (self.camera_info_topic, right_info):
                if self.right is not None:
                    self.right.note(topic, self._message(raw, CAMERA_INFO))
                if topic == self.camera_info_topic:
                    self._note_camera(infos, _header_stamp_ns(raw), raw)
                continue
            stamps[topic].header_ns.append(_header_stamp_ns(raw))
            stamps[topic].recorded_ns.append(recorded_ns)
        infos.sort(key=lambda item: item[0])
        if self.right is not None:
            self.right.calibrate(infos, self.image_topic, str(self._path),
                                 rectified=self.options.rectified)
        return infos, self._paired(stamps)

    def _raw(self, reader: Any, topics: set[str]) -> Iterator[tuple[str, int, bytes]]:
        """Topic, recording stamp and bytes of the messages on some topics, as recorded."""
        connections = [c for c in reader.connections if c.topic in topics]
        for connection, recorded_ns, raw in reader.messages(connections):
            yield connection.topic, recorded_ns, raw

    def _note_camera(self, infos: list[tuple[int, Camera]], stamp_ns: int, raw: bytes) -> None:
        """Append the calibration when it differs from the last one."""
        message = self._message(raw, CAMERA_INFO)
        camera = camera_from_calibration(_calibration(message), self.camera_info_topic,
                                         self.options.rectified
                                         or _is_rectified(self.image_topic))
        if camera is not None and (not infos or infos[-1][1] != camera):
            infos.append((stamp_ns, camera))

    def _paired(self, stamps: dict[str, _Stamps]) -> list[_Pair]:
        stamps_ns, order = self._sorted(self.image_topic, stamps)
        partner = np.full(len(order), -1)
        if self.depth_topic:
            depth_ns, depth_order = self._sorted(self.depth_topic, stamps)
            partner = mutual_nearest(stamps_ns, depth_ns)
            partner = np.where(partner >= 0, depth_order[partner], -1)
            stamps_ns, order, partner = self._with_depth(stamps_ns, order, partner)
        columns = [stamps_ns.tolist(), order.tolist(), partner.tolist()]
        if self.right is not None:
            right_ns, right_order = self._sorted(self.right.topic, stamps)
            right = mutual_nearest(stamps_ns, right_ns)
            self.right.check(right, str(self._path))
            columns.append(np.where(right >= 0, right_order[right], -1).tolist())
        return [_Pair(*row) for row in zip(*columns, strict=True)]

    @property
    def _image_topics(self) -> list[str]:
        right = '' if self.right is None else self.right.topic
        return [topic for topic in (self.image_topic, right, self.depth_topic) if topic]

    def _sorted(self, topic: str, stamps: dict[str, _Stamps]
                ) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
        """Increasing stamps and the positions in the recording they belong to."""
        stamps_ns = stamps[topic].chosen(topic)
        late_ns = np.maximum.accumulate(stamps_ns) - stamps_ns
        if len(late_ns) and late_ns.max() > LATE_NS:
            index = int(late_ns.argmax())
            raise InputError(f'{self._path}: expected time stamps that increase on {topic}, found '
                             f'message {index} going back {seconds(int(late_ns[index]))} s to '
                             f'{seconds(int(stamps_ns[index]))} s; split the recording there')
        order = np.argsort(stamps_ns, kind='stable')
        ordered = stamps_ns[order]
        repeated = np.flatnonzero(np.diff(ordered) == 0)
        if len(repeated):
            index = repeated[0]
            check_stamps(int(ordered[index]), int(ordered[index + 1]), f'{self._path}: {topic}')
        return ordered, order

    def _with_depth(self, stamps_ns: NDArray, order: NDArray, partner: NDArray
                    ) -> tuple[NDArray, NDArray, NDArray]:
        """Only the images that have depth."""
        paired = partner >= 0
        if not paired.any():
            raise InputError(f'{self._path}: expected depth on {self.depth_topic} within 20 ms of '
                             'the images, found none; check the stamps or leave the depth out')
        if not paired.all():
            logger.warning('%s: %d of %d images have no depth within 20 ms and are left out',
                           self._path, int((~paired).sum()), len(paired))
        return stamps_ns[paired], order[paired], partner[paired]

    def _read(self, indices: range) -> Iterator[Frame]:
        """Stream the bag once, holding messages back until their frame is due."""
        wanted = [self._pairs[index] for index in indices]
        needed = {(self.image_topic, p.image) for p in wanted}
        needed |= {(self.depth_topic, p.depth) for p in wanted if p.depth >= 0}
        if self.right is not None:
            needed |= {(self.right.topic, p.right) for p in wanted if p.right >= 0}
        held: dict[tuple[str, int], bytes] = {}
        due = iter(zip(indices, wanted, strict=True))
        index, pair = next(due, (0, None))
        with self._reader() as reader:
            counts = dict.fromkeys(self._image_topics, 0)
            for topic, _, raw in self._raw(reader, set(counts)) if pair else ():
                key = (topic, counts[topic])
                counts[topic] += 1
                if key in needed:
                    held[key] = raw
                while pair is not None and self._is_held(pair, held):
                    yield self._frame(index, pair, held)
                    index, pair = next(due, (0, None))
                if pair is None:
                    break

    def _is_held(self, pair: _Pair, held: dict[tuple[str, int], bytes]) -> bool:
        right = '' if self.right is None else self.right.topic
        return all(place < 0 or (topic, place) in held for topic, place in (
            (self.image_topic, pair.image), (self.depth_topic, pair.depth), (right, pair.right)))

    def _frame(self, index: int, pair: _Pair, held: dict[tuple[str, int], bytes]) -> Frame:
        source = f'{self.image_topic}#{index}'
        where = f'{self._path}: {source}'
        image = _decoded(self._message(held.pop((self.image_topic, pair.image)),
                                       self._types[self.image_topic]), where)
        depth = right = None
        if pair.depth >= 0:
            depth_where = f'{self._path}: {self.depth_topic}#{pair.depth}'
            depth = self._depth(held.pop((self.depth_topic, pair.depth)), depth_where)
        if pair.right >= 0 and self.right is not None:
            topic = self.right.topic
            message = self._message(held.pop((topic, pair.right)), self._types[topic])
            right = self.right.image(_decoded(message, f'{self._path}: {topic}#{pair.right}'))
        camera = self._camera(pair.stamp_ns, (image.shape[1], image.shape[0]), where)
        return Frame(pair.stamp_ns, image, depth, camera, source, right=right)

    def _depth(self, raw: bytes, where: str) -> NDArray[np.float32]:
        message = self._message(raw, self._types[self.depth_topic])
        units = self.options.depth_units_per_metre
        if not hasattr(message, 'format'):
            return decode_depth(_raw_image(message), where, units)
        if 'compressedDepth' in message.format:
            return decode_compressed_depth(message.data, message.format, where, units)
        return depth_in_metres(decode_depth_image(message.data, where), units)

    def _camera(self, stamp_ns: int, size_wh: tuple[int, int], where: str) -> Camera | None:
        """The newest calibration at a stamp (the first one before that), or the user's."""
        if self.options.has_camera or not self._cameras:
            return self.options.camera_for(size_wh)
        newest = bisect_right(self._cameras, stamp_ns, key=lambda item: item[0]) - 1
        return checked_size(self._cameras[max(0, newest)][1], size_wh, where)


class _Topics:
    """Which topics hold the image, its depth, its calibration and its right half ('' for none)."""

    def __init__(self, path: Path, reader: Any, message: Any, options: SourceOptions) -> None:
        """Look at the first message of every image topic and choose."""
        self._path = path
        self._types = {c.topic: c.msgtype for c in reader.connections if c.msgcount}
        depths = {topic: self._is_depth(reader, message, topic) for topic, msgtype
                  in sorted(self._types.items()) if msgtype in (IMAGE, COMPRESSED)}
        images = [topic for topic, is_depth in depths.items() if not is_depth]
        left = self._left_of_pair(images, options)
        self.image = left or self._chosen('image', options.image_topic, images)
        if not self.image:
            raise InputError(f'{path}: expected images, found none; {self._listing()}')
        self.depth = self._chosen('depth', options.depth_topic,
                                  [topic for topic, is_depth in depths.items() if is_depth]) \
            if options.use_depth else ''
        self.camera_info = self._info(options.camera_info_topic)
        self.right = self.right_info = ''
        if options.use_stereo and not self.depth:
            self.right = self._chosen('right image', options.right_image_topic, images) \
                if options.right_image_topic else self._right_of(self.image, images)
            self.right_info = self._beside(self.right)

    def _left_of_pair(self, images: list[str], options: SourceOptions) -> str:
        """The left topic where the images are one stereo pair and none was named."""
        raw = [topic for topic in images if _base(topic) == topic or _base(topic) not in images]
        if options.image_topic or len(raw) != 2:
            return ''
        return next((topic for topic in raw if self._right_of(topic, raw)), '')

    def _right_of(self, left: str, images: list[str]) -> str:
        """The topic called right where ``left`` is called left, or below it; '' without one.

        Only of a calibrated pair: else the left images are used alone.
        """
        space, _, name = _base(left).rpartition('/')
        found = (re.sub(LEFT_NAME, 'right', _base(left)), f'{space}/right/{name}')
        return next((topic for base in found for topic in (base, *(base + t for t in TRANSPORTS))
                     if base != _base(left) and topic in images
                     and self._beside(left) and self._beside(base)), '')

    def _beside(self, topic: str) -> str:
        """The CameraInfo topic beside an image topic; '' if there is none."""
        sibling = f'{_base(topic).rsplit("/", 1)[0]}/camera_info'
        return sibling if topic and self._types.get(sibling) == CAMERA_INFO else ''

    def _is_depth(self, reader: Any, message: Any, topic: str) -> bool:
        connections = [c for c in reader.connections if c.topic == topic]
        _, _, raw = next(reader.messages(connections))
        first = message(raw, self._types[topic])
        if self._types[topic] == COMPRESSED:
            return 'compressedDepth' in first.format or first.format.startswith(DEPTH_ENCODINGS)
        return first.encoding in DEPTH_ENCODINGS or (
            first.encoding == 'mono16' and 'depth' in topic)

    def _chosen(self, kind: str, wanted: str, candidates: list[str]) -> str:
        """The wanted topic (its transports count), or the only candidate."""
        if wanted:
            for topic in (wanted, *(wanted + transport for transport in TRANSPORTS)):
                if topic in candidates:
                    return topic
            raise InputError(f'{self._path}: expected {kind} messages on topic {wanted}, found '
                             f'none; {self._listing()}')
        # A raw topic beats its own compressed copy.
        candidates = [topic for topic in candidates if _base(topic) == topic
                      or _base(topic) not in candidates]
        if len(candidates) > 1:
            raise InputError(f'{self._path}: expected one {kind} topic, found '
                             f'{", ".join(candidates)}; choose one')
        return candidates[0] if candidates else ''

    def _info(self, wanted: str) -> str:
        """The CameraInfo topic beside the image, or the only one in the bag."""
        infos = [topic for topic, msgtype in self._types.items() if msgtype == CAMERA_INFO]
        if wanted:
            return self._chosen('CameraInfo', wanted, infos)
        if self._beside(self.image):
            return self._beside(self.image)
        if len(infos) == 1:
            logger.warning('%s: %s is used for %s, the only calibration in the bag', self._path,
                           infos[0], self.image)
            return infos[0]
        return ''

    def _listing(self) -> str:
        listing = ', '.join(f'{topic} ({msgtype.rsplit("/", 1)[-1]})'
                            for topic, msgtype in sorted(self._types.items()))
        return f'topics with messages: {listing or "none"}'


def _typestore() -> Any:
    try:
        from rosbags.typesys import Stores, get_typestore
    except ImportError:
        raise InputError('expected the package rosbags to read a bag, found none; '
                         'pip install rosbags') from None
    return get_typestore(Stores.ROS2_HUMBLE)


def _header_stamp_ns(raw: bytes) -> int:
    """Stamp of a CDR message that begins with a std_msgs/Header."""
    order = '<' if raw[1] & 1 else '>'
    sec, nanosec = struct.unpack_from(f'{order}iI', raw, 4)
    return sec * SECOND_NS + nanosec


def _base(topic: str) -> str:
    """The topic without its image transport."""
    for transport in TRANSPORTS:
        topic = topic.removesuffix(transport)
    return topic


def _is_rectified(image_topic: str) -> bool:
    """True for image_rect, image_rect_color: undistorted by image_proc, so that P counts."""
    return 'image_rect' in _base(image_topic).rsplit('/', 1)[-1]


def _decoded(message: Any, where: str) -> NDArray[np.uint8]:
    return decode_compressed(message.data, where) if hasattr(message, 'format') \
        else decode_image(_raw_image(message), where)


def _raw_image(message: Any) -> RawImage:
    return RawImage(message.height, message.width, message.encoding, message.step,
                    bool(message.is_bigendian), message.data)


def _calibration(message: Any) -> Calibration:
    roi = message.roi
    return Calibration(message.width, message.height, message.distortion_model, message.d,
                       message.k, message.p, (message.binning_x, message.binning_y),
                       (roi.x_offset, roi.y_offset, roi.width, roi.height), message.r)
