"""What a node publishes: poses, path, clouds, markers, TF. Translation only."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from geometry_msgs.msg import Point, PoseStamped, PoseWithCovarianceStamped, TransformStamped
from nav_msgs.msg import Odometry, Path
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import String
from visualization_msgs.msg import Marker, MarkerArray

from feedforward_recon.geometry.transforms import transform_points
from feedforward_recon.ros.convert import covariance_list, header_msg, pose_msg
from feedforward_recon.ros.frames import UNKNOWN_VARIANCE, BodyPose
from feedforward_recon.ros.pointcloud import cloud_msg
from feedforward_recon.ros.tf_messages import TFMessage
from feedforward_recon.types import FloatArray, PointCloud, Trajectory

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
REMEMBERED = 64
# A keyframe as a little pyramid: apex, then the corners of the image, as shares of a metre.
FRUSTUM = 0.05 * np.array([[0, 0, 0], [-1, -0.75, 1], [1, -0.75, 1], [1, 0.75, 1],
                           [-1, 0.75, 1]])
EDGES = ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1))


class PoseOutputs:
    """Publishers of poses and transforms; silent while the node is inactive."""

    def __init__(self, node: LifecycleNode, map_frame: str) -> None:
        self._node, self._map_frame = node, map_frame
        create = node.create_lifecycle_publisher
        self._pose = create(PoseWithCovarianceStamped, 'pose', 10)
        self._odometry = create(Odometry, 'odometry', 10)
        self._query_pose = create(PoseWithCovarianceStamped, 'query_pose', 10)
        self._query_result = create(String, 'query_result', 10)
        self._tf = create(TFMessage, '/tf', QoSProfile(depth=100)) if TFMessage else None
        self._published_ns: deque[int] = deque(maxlen=REMEMBERED)  # stamps of poses

    def destroy(self) -> None:
        """Take the publishers down."""
        for publisher in (self._pose, self._odometry, self._query_pose, self._query_result,
                          self._tf):
            if publisher is not None:
                self._node.destroy_publisher(publisher)

    def pose(self, body: BodyPose) -> None:
        """Publish a measured pose as pose and odometry, once for each stamp.

        Raises InputError for a pose or covariance that no message can hold.
        """
        if body.stamp_ns in self._published_ns:
            return
        self._published_ns.append(body.stamp_ns)
        message = self._stamped(body)
        self._pose.publish(message)
        odometry = Odometry(header=message.header, child_frame_id=body.body_frame,
                            pose=message.pose)
        # The velocity is not measured: a variance that no filter will follow says so.
        odometry.twist.covariance = covariance_list(UNKNOWN_VARIANCE * np.eye(6))
        self._odometry.publish(odometry)

    def is_old(self, stamp_ns: int) -> bool:
        """A pose with a later stamp went out already."""
        return bool(self._published_ns) and stamp_ns < max(self._published_ns)

    def new_time_line(self) -> None:
        """Another map, or stamps that went back: the stamps sent so far mean nothing."""
        self._published_ns.clear()

    def query(self, body: BodyPose | None, result_json: str) -> None:
        """Answer a query image: the pose if there is one, and the result as JSON."""
        if body is not None:
            self._query_pose.publish(self._stamped(body))
        self._query_result.publish(String(data=result_json))

    def transforms(self, transforms: list[TransformStamped]) -> None:
        """Send transforms on /tf, where its message is installed."""
        if transforms and self._tf is not None:
            self._tf.publish(TFMessage(transforms=transforms))

    def _stamped(self, body: BodyPose) -> PoseWithCovarianceStamped:
        message = PoseWithCovarianceStamped(header=header_msg(self._map_frame, body.stamp_ns))
        message.pose.pose = pose_msg(body.T_map_body)
        message.pose.covariance = covariance_list(body.covariance)
        return message


class MapOutputs:
    """Publishers of the map: path, clouds, keyframes; silent while the node is inactive."""

    def __init__(self, node: LifecycleNode, map_frame: str) -> None:
        self._node, self._map_frame = node, map_frame
        create = node.create_lifecycle_publisher
        self._path = create(Path, 'path', LATCHED)
        self._cloud = create(PointCloud2, 'cloud', 5)
        self._cloud_map = create(PointCloud2, 'cloud_map', LATCHED)
        self._markers = create(MarkerArray, 'markers', LATCHED)

    def destroy(self) -> None:
        """Take the publishers down."""
        for publisher in (self._path, self._cloud, self._cloud_map, self._markers):
            self._node.destroy_publisher(publisher)

    @property
    def wants_path(self) -> bool:
        """Somebody subscribes to path."""
        return _is_heard(self._path)

    @property
    def wants_markers(self) -> bool:
        """Somebody subscribes to markers."""
        return _is_heard(self._markers)

    @property
    def wants_cloud(self) -> bool:
        """Somebody subscribes to what keyframes add to the cloud."""
        return _is_heard(self._cloud)

    @property
    def wants_cloud_map(self) -> bool:
        """Somebody subscribes to the whole cloud."""
        return _is_heard(self._cloud_map)

    def path(self, bodies: Trajectory, length: int) -> None:
        """Publish body poses with their own stamps, the newest ``length`` of them."""
        poses = [PoseStamped(header=header_msg(self._map_frame, int(stamp_ns)), pose=pose_msg(T))
                 for stamp_ns, T in zip(bodies.stamps_ns[-length:], bodies.T_map_cam[-length:],
                                        strict=True)]
        stamp_ns = int(bodies.stamps_ns[-1]) if len(bodies) else 0
        self._path.publish(Path(header=header_msg(self._map_frame, stamp_ns), poses=poses))

    def cloud(self, cloud: PointCloud, stamp_ns: int, whole: bool) -> None:
        """Publish points: the whole map latched, or what a keyframe added."""
        publisher = self._cloud_map if whole else self._cloud
        publisher.publish(cloud_msg(cloud, self._map_frame, stamp_ns))

    def markers(self, T_map_cam: FloatArray, stamp_ns: int) -> None:
        """Publish keyframes [K, 4, 4] as pyramids."""
        marker = Marker(header=header_msg(self._map_frame, stamp_ns), ns='keyframes', id=0,
                        type=Marker.LINE_LIST, action=Marker.ADD)
        marker.pose.orientation.w = 1.0
        marker.scale.x = 0.005
        marker.color.r, marker.color.g, marker.color.b, marker.color.a = 0.1, 0.6, 1.0, 0.9
        marker.points = [_point(corners[index]) for corners in
                         (transform_points(T, FRUSTUM) for T in T_map_cam)
                         for edge in EDGES for index in edge]
        self._markers.publish(MarkerArray(markers=[marker]))


def _is_heard(publisher: Any) -> bool:
    return bool(publisher.get_subscription_count())


def _point(xyz: Any) -> Point:
    return Point(x=float(xyz[0]), y=float(xyz[1]), z=float(xyz[2]))
