"""Frames into a ROS 2 bag, without ROS: for tests, for exchange and for replay."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.stereo import StereoRig
from feedforward_recon.geometry.transforms import quat_xyzw_from_matrix
from feedforward_recon.io import encode
from feedforward_recon.io.source import SECOND_NS
from feedforward_recon.io.writers import not_writable
from feedforward_recon.types import FloatArray, Frame

STORAGES = ('sqlite3', 'mcap')
_ROS_MODELS = {'plumb_bob': 'plumb_bob', 'rational': 'rational_polynomial',
               'fisheye': 'equidistant'}


@dataclass(frozen=True)
class BagTopics:
    """Topic and frame names; depth is that of the image, so it shares its frame."""

    image: str = '/camera/image_raw'
    camera_info: str = '/camera/camera_info'
    depth: str = '/camera/depth/image_raw'
    right: str = '/camera/right/image_raw'
    right_info: str = '/camera/right/camera_info'
    camera_frame: str = 'camera_optical_frame'
    map_frame: str = 'map'


def write_bag(path: str | Path, frames: Iterable[Frame], storage: str = 'sqlite3', *,
              compressed: bool = False, ground_truth: bool = False,
              topics: BagTopics | None = None) -> int:
    """Write what each frame holds to a new bag folder: image, camera_info, depth, right image.

    Returns the number of frames.

    Raw images are rgb8 and raw depth is 32FC1, so that reading gives back the same pixels.
    compressed: JPEG images on <image>/compressed and millimetres as PNG on
        <depth>/compressedDepth, as image_transport names and packs them.
    ground_truth: known poses go to /tf, from the camera frame to the map frame.
    Raises InputError when rosbags is missing, the storage is unknown or the folder exists.
    """
    path = Path(path)
    if storage not in STORAGES:
        raise InputError(f'expected a storage of {STORAGES}, found {storage!r}')
    if path.exists():
        raise InputError(f'{path}: expected a new folder for the bag, found one there; choose '
                         'another output')
    try:
        from rosbags.rosbag2 import StoragePlugin, Writer
    except ImportError:
        raise InputError('expected the package rosbags to write a bag, found none; '
                         'pip install rosbags') from None
    count = 0
    try:
        # The older of the two metadata versions that rosbags writes.
        with Writer(path, version=8, storage_plugin=StoragePlugin[storage.upper()]) as writer:
            bag = _Bag(writer, topics or BagTopics(), compressed, ground_truth)
            for frame in frames:
                bag.write(frame)
                count += 1
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise not_writable(path, error) from None
        raise
    return count


class _Bag:
    """One open bag: makes messages and adds each topic when it is first used."""

    def __init__(self, writer: Any, topics: BagTopics, compressed: bool,
                 ground_truth: bool) -> None:
        from rosbags.typesys import Stores, get_typestore

        self._writer = writer
        self._topics = topics
        self._compressed = compressed
        self._ground_truth = ground_truth
        self._store = get_typestore(Stores.ROS2_HUMBLE)
        self._connections: dict[str, Any] = {}

    def write(self, frame: Frame) -> None:
        """All messages of one frame, recorded at its stamp."""
        header = self._header(frame.stamp_ns, self._topics.camera_frame)
        rig = None if frame.camera is None or frame.right is None else StereoRig(
            frame.camera, frame.right.camera, frame.right.T_left_right)
        if frame.camera is not None:
            self._add(self._topics.camera_info, frame.stamp_ns, self._camera_info(
                header, frame.camera, None if rig is None else rig.calibration(right=False)))
        if rig is not None:
            self._add(self._topics.right_info, frame.stamp_ns, self._camera_info(
                header, rig.right, rig.calibration(right=True)))
        if self._compressed:
            self._write_compressed(frame, header)
        else:
            self._write_raw(frame, header)
        if self._ground_truth and frame.T_map_cam is not None:
            self._add('/tf', frame.stamp_ns, self._transform(frame.stamp_ns, frame.T_map_cam))

    def _write_raw(self, frame: Frame, header: Any) -> None:
        self._add(self._topics.image, frame.stamp_ns, self._image(header, frame.image, 'rgb8'))
        if frame.right is not None:
            self._add(self._topics.right, frame.stamp_ns,
                      self._image(header, frame.right.image, 'rgb8'))
        if frame.depth is not None:
            depth = frame.depth.astype('<f4')
            self._add(self._topics.depth, frame.stamp_ns, self._image(header, depth, '32FC1'))

    def _write_compressed(self, frame: Frame, header: Any) -> None:
        images = {self._topics.image: frame.image}
        if frame.right is not None:
            images[self._topics.right] = frame.right.image
        for topic, image in images.items():
            self._add(f'{topic}/compressed', frame.stamp_ns,
                      self._make('sensor_msgs/msg/CompressedImage', header=header,
                                 format=encode.JPEG_FORMAT, data=encode.jpeg(image)))
        if frame.depth is None:
            return
        self._add(f'{self._topics.depth}/compressedDepth', frame.stamp_ns,
                  self._make('sensor_msgs/msg/CompressedImage', header=header,
                             format=encode.DEPTH_FORMAT,
                             data=encode.compressed_depth(frame.depth)))

    def _add(self, topic: str, stamp_ns: int, message: Any) -> None:
        msgtype = message.__msgtype__
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, msgtype,
                                                                   typestore=self._store)
        self._writer.write(self._connections[topic], stamp_ns,
                           self._store.serialize_cdr(message, msgtype))

    def _make(self, msgtype: str, **values: Any) -> Any:
        return self._store.types[msgtype](**values)

    def _header(self, stamp_ns: int, frame_id: str) -> Any:
        sec, nanosec = divmod(stamp_ns, SECOND_NS)
        stamp = self._make('builtin_interfaces/msg/Time', sec=sec, nanosec=nanosec)
        return self._make('std_msgs/msg/Header', stamp=stamp, frame_id=frame_id)

    def _image(self, header: Any, pixels: np.ndarray, encoding: str) -> Any:
        height, width = pixels.shape[:2]
        return self._make('sensor_msgs/msg/Image', header=header, height=height, width=width,
                          encoding=encoding, is_bigendian=0, step=pixels.nbytes // height,
                          data=np.ascontiguousarray(pixels).reshape(-1).view(np.uint8))

    def _camera_info(self, header: Any, camera: Camera,
                     stereo: tuple[np.ndarray, np.ndarray] | None = None) -> Any:
        """stereo: R [3, 3] and P [3, 4] of a camera of a pair; else P is K."""
        roi = self._make('sensor_msgs/msg/RegionOfInterest', x_offset=0, y_offset=0, height=0,
                         width=0, do_rectify=False)
        R, P = stereo or (np.eye(3), np.c_[camera.K, np.zeros(3)])
        return self._make('sensor_msgs/msg/CameraInfo', header=header, height=camera.height,
                          width=camera.width, distortion_model=_ROS_MODELS[camera.model],
                          d=np.array(camera.distortion, float), k=camera.K.ravel(),
                          r=R.ravel(), p=P.ravel(), binning_x=0, binning_y=0, roi=roi)

    def _transform(self, stamp_ns: int, T_map_cam: FloatArray) -> Any:
        x, y, z = map(float, T_map_cam[:3, 3])
        qx, qy, qz, qw = map(float, quat_xyzw_from_matrix(T_map_cam[:3, :3]))
        transform = self._make(
            'geometry_msgs/msg/Transform',
            translation=self._make('geometry_msgs/msg/Vector3', x=x, y=y, z=z),
            rotation=self._make('geometry_msgs/msg/Quaternion', x=qx, y=qy, z=qz, w=qw))
        stamped = self._make('geometry_msgs/msg/TransformStamped',
                             header=self._header(stamp_ns, self._topics.map_frame),
                             child_frame_id=self._topics.camera_frame, transform=transform)
        return self._make('tf2_msgs/msg/TFMessage', transforms=[stamped])
