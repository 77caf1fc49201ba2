"""Messages to the values of the core and back; pixels are decoded by `io.images`.

Reading does not copy what it need not; written messages own their bytes. Poses are float64
[4, 4], quaternions x, y, z, w. Every InputError starts with ``where``, the topic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from geometry_msgs.msg import Point, Pose, Quaternion, Transform, TransformStamped, Vector3
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import (
    make_transform,
    matrix_from_quat_xyzw,
    quat_xyzw_from_matrix,
)
from feedforward_recon.io.images import (
    DEPTH_ENCODINGS,
    MILLIMETRES_PER_METRE,
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
from feedforward_recon.ros.fields import fill, header_msg, stamp_msg, stamp_ns
from feedforward_recon.ros.optional import (
    BRIDGED_COLOUR,
    BRIDGED_DEPTH,
    chosen,
    conversion_paths,
)
from feedforward_recon.ros.pointcloud import cloud_from_msg, cloud_msg

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    'calibration_of', 'camera_from_info', 'cloud_from_msg', 'cloud_msg', 'conversion_paths',
    'covariance_list', 'depth_metres', 'depth_msg', 'fill', 'header_msg', 'image_msg',
    'image_rgb', 'info_msg', 'matrix_from_pose', 'matrix_from_transform', 'pose_msg',
    'stamp_msg', 'stamp_ns', 'transform_msg',
]

ROS_MODELS = {'plumb_bob': 'plumb_bob', 'rational': 'rational_polynomial',
              'fisheye': 'equidistant'}
SMALLEST_VARIANCE = 1e-12  # 1 um, 1 urad: no measurement is better
SMALLEST_EIGENVALUE = 1e-9  # of the correlation matrix
CORRELATION_TOLERANCE = 1e-6


# -- images -------------------------------------------------------------------------------------

def image_rgb(msg: Image | CompressedImage, where: str = 'image') -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3]. Raises InputError for depth, unknown encodings and damage."""
    if hasattr(msg, 'format'):
        return decode_compressed(msg.data, where)
    bridge = chosen('cv_bridge')
    if bridge is not None and msg.encoding in BRIDGED_COLOUR and _is_plain(msg):
        image = np.ascontiguousarray(bridge.imgmsg_to_cv2(msg, 'rgb8'))
        shared = np.may_share_memory(image, np.frombuffer(msg.data, np.uint8))
        return image.copy() if shared else image
    return decode_image(_raw(msg), where)


def depth_metres(msg: Image | CompressedImage, where: str = 'depth') -> NDArray[np.float32]:
    """Depth float32 [H, W] in metres, 0 where unknown, of 16UC1, 32FC1 and compressedDepth.

    Raises InputError for other encodings and damage.
    """
    if hasattr(msg, 'format'):
        if 'compressedDepth' in msg.format:
            return decode_compressed_depth(msg.data, msg.format, where)
        return depth_in_metres(decode_depth_image(msg.data, where))
    bridge = chosen('cv_bridge')
    if bridge is not None and msg.encoding in BRIDGED_DEPTH and _is_plain(msg):
        return depth_in_metres(np.asarray(bridge.imgmsg_to_cv2(msg, 'passthrough')))
    return decode_depth(_raw(msg), where)


def _is_plain(msg: Image) -> bool:
    """What an optional library may see: whole, little-endian, rows without padding.

    The rest is for `decode`, which also says what is wrong.
    """
    pixel_bytes = {'rgb8': 3, 'bgr8': 3, 'mono8': 1, '16UC1': 2, '32FC1': 4}[msg.encoding]
    return min(msg.height, msg.width) > 0 and not msg.is_bigendian \
        and msg.step == msg.width * pixel_bytes and len(msg.data) >= msg.height * msg.step


def _raw(msg: Image) -> RawImage:
    return RawImage(msg.height, msg.width, msg.encoding, msg.step, bool(msg.is_bigendian),
                    msg.data)


def image_msg(rgb: NDArray[np.uint8], frame_id: str, ns: int) -> Image:
    """An rgb8 image of uint8 [H, W, 3]."""
    return _image_msg(rgb, 'rgb8', frame_id, ns)


def depth_msg(depth_m: NDArray[np.float32], frame_id: str, ns: int, encoding: str = '32FC1'
              ) -> Image:
    """Depth [H, W] in metres as 32FC1 (unknown: NaN) or 16UC1 millimetres (unknown: 0), REP 118.

    Raises InputError for other encodings.
    """
    if encoding not in DEPTH_ENCODINGS:
        raise InputError(f'expected a depth encoding of {DEPTH_ENCODINGS}, found {encoding!r}')
    known = depth_m > 0
    if encoding == '32FC1':
        stored = np.where(known, depth_m, np.nan).astype('<f4')
    else:
        millimetres = np.rint(np.where(known, depth_m, 0) * MILLIMETRES_PER_METRE)
        # What 16 bits cannot hold is no measurement, as in depth_image_proc.
        stored = np.where(millimetres > np.iinfo(np.uint16).max, 0, millimetres).astype('<u2')
    return _image_msg(stored, encoding, frame_id, ns)


def _image_msg(pixels: np.ndarray, encoding: str, frame_id: str, ns: int) -> Image:
    height, width = pixels.shape[:2]
    message = Image(header=header_msg(frame_id, ns), height=height, width=width,
                    encoding=encoding, is_bigendian=0, step=pixels.nbytes // height)
    fill(message.data, pixels)
    return message


# -- cameras ------------------------------------------------------------------------------------

def camera_from_info(msg: CameraInfo, rectified: bool = False, where: str = 'camera_info'
                     ) -> Camera | None:
    """The camera of the published image (binned, region of interest); None when K is zero.

    rectified: the image was undistorted, so P counts and there is no distortion.
    Raises InputError for unknown distortion models and impossible values.
    """
    return camera_from_calibration(calibration_of(msg), where, rectified)


def calibration_of(msg: CameraInfo) -> Calibration:
    """The fields of a CameraInfo as the readers of files have them."""
    roi = msg.roi
    return Calibration(msg.width, msg.height, msg.distortion_model, msg.d, msg.k, msg.p,
                       (msg.binning_x, msg.binning_y),
                       (roi.x_offset, roi.y_offset, roi.width, roi.height), msg.r)


def info_msg(camera: Camera, frame_id: str, ns: int,
             stereo: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None
             ) -> CameraInfo:
    """Calibration of an unbinned, whole image.

    stereo: R [3, 3] and P [3, 4] of one camera of a pair; without, P is K: a monocular camera.
    """
    R, P = stereo or (np.eye(3), np.c_[camera.K, np.zeros(3)])
    message = CameraInfo(header=header_msg(frame_id, ns), height=camera.height,
                         width=camera.width, distortion_model=ROS_MODELS[camera.model])
    message.d = list(map(float, camera.distortion))
    message.k = camera.K.ravel()
    message.r, message.p = R.ravel(), P.ravel()
    return message


# -- poses --------------------------------------------------------------------------------------

def pose_msg(T: NDArray[np.floating]) -> Pose:
    """A Pose of T [4, 4]."""
    x, y, z = map(float, T[:3, 3])
    return Pose(position=Point(x=x, y=y, z=z), orientation=_quaternion(T))


def matrix_from_pose(msg: Pose) -> NDArray[np.float64]:
    """T [4, 4] of a Pose. Raises InputError for a quaternion of zero length and for NaN."""
    return _matrix(msg.position, msg.orientation)


def transform_msg(T_parent_child: NDArray[np.floating], parent: str, child: str, ns: int
                  ) -> TransformStamped:
    """The transform that TF needs to place ``child`` in ``parent``."""
    x, y, z = map(float, T_parent_child[:3, 3])
    transform = Transform(translation=Vector3(x=x, y=y, z=z),
                          rotation=_quaternion(T_parent_child))
    return TransformStamped(header=header_msg(parent, ns), child_frame_id=child,
                            transform=transform)


def matrix_from_transform(msg: Transform | TransformStamped) -> NDArray[np.float64]:
    """T_parent_child [4, 4]. Raises InputError as `matrix_from_pose` does."""
    transform = getattr(msg, 'transform', msg)
    return _matrix(transform.translation, transform.rotation)


def _quaternion(T: NDArray[np.floating]) -> Quaternion:
    library = chosen('tf_transformations')
    quat_xyzw = quat_xyzw_from_matrix(T[:3, :3]) if library is None \
        else np.asarray(library.quaternion_from_matrix(T))
    x, y, z, w = map(float, quat_xyzw / np.linalg.norm(quat_xyzw))
    return Quaternion(x=x, y=y, z=z, w=w)


def _matrix(position: Any, quaternion: Any) -> NDArray[np.float64]:
    t = np.array([position.x, position.y, position.z], float)
    quat_xyzw = np.array([quaternion.x, quaternion.y, quaternion.z, quaternion.w], float)
    if not np.isfinite(t).all():
        raise InputError(f'expected a finite position, found {t}; check the pose source')
    R = matrix_from_quat_xyzw(quat_xyzw)  # refuses what is no rotation
    library = chosen('tf_transformations')
    if library is not None:
        R = np.asarray(library.quaternion_matrix(quat_xyzw / np.linalg.norm(quat_xyzw)))[:3, :3]
    return make_transform(R, t)


def covariance_list(covariance: NDArray[np.floating]) -> list[float]:
    """36 floats, row-major, of [6, 6] over (x y z rx ry rz); positive definite.

    Rounding is repaired: what is symmetric and has no negative eigenvalue but for rounding comes
    out positive definite. Raises InputError for everything else.
    """
    C = np.asarray(covariance, float)
    if C.shape != (6, 6) or not np.isfinite(C).all():
        raise InputError(f'expected a finite covariance [6, 6], found {C.shape} with '
                         f'{np.count_nonzero(~np.isfinite(C))} values that are not finite')
    sigma = np.sqrt(np.maximum(np.diag(C), SMALLEST_VARIANCE))
    # Units differ by many orders: only correlations can be compared with a tolerance.
    correlation = np.where(np.eye(6, dtype=bool), 1, C / np.outer(sigma, sigma))
    values, vectors = np.linalg.eigh(0.5 * (correlation + correlation.T))
    if np.diag(C).min() < -SMALLEST_VARIANCE or values[0] < -CORRELATION_TOLERANCE \
            or np.abs(correlation - correlation.T).max() > CORRELATION_TOLERANCE:
        raise InputError('expected a symmetric covariance without negative eigenvalues, found '
                         f'variances from {np.diag(C).min():.2g} and {values[0]:.2g} as the '
                         'smallest eigenvalue of the correlations')
    if values[0] < SMALLEST_EIGENVALUE:
        correlation = vectors * np.maximum(values, SMALLEST_EIGENVALUE) @ vectors.T
    C = correlation * np.outer(sigma, sigma)
    return (0.5 * (C + C.T)).ravel().tolist()
