"""Images as they arrive, with what belongs to them, and how they become frames of the core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sensor_msgs.msg import CompressedImage, Image

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io.images import scaled_depth
from feedforward_recon.ros.convert import depth_metres, image_rgb
from feedforward_recon.ros.input_health import InputHealth
from feedforward_recon.ros.stereo import RightArrival
from feedforward_recon.types import Frame

DEFAULT_FRAME = 'camera_optical_frame'  # where neither image nor settings name one


@dataclass(frozen=True)
class Arrival:
    """An image that may be used, with what belongs to it.

    camera: None while there is no calibration. frame_id: optical frame of the camera.
    arrived_ns: steady clock when the image came. right: the other half of a stereo pair.
    """

    stamp_ns: int
    frame_id: str
    image: Image | CompressedImage
    depth: Image | CompressedImage | None
    camera: Camera | None
    arrived_ns: int
    right: RightArrival | None = None


def decoded_frame(arrival: Arrival, inputs: Mapping[str, InputHealth]) -> Frame:
    """The frame of an arrival; takes milliseconds, so it is called on a worker.

    inputs: kind -> input, for the topics that errors name. Raises InputError for damage, unknown
    encodings, and a calibration of another size.
    """
    image, camera = image_rgb(arrival.image), arrival.camera
    size_wh = (image.shape[1], image.shape[0])  # compressed messages do not say
    if camera is not None and camera.size_wh != size_wh:
        raise InputError(f'expected a calibration for {size_wh[0]}x{size_wh[1]} images, found '
                         f'one for {camera.width}x{camera.height}; calibrate at this size')
    depth = None if arrival.depth is None else scaled_depth(
        depth_metres(arrival.depth), size_wh, inputs['depth'].topic)
    topic = inputs['image'].topic if 'image' in inputs else 'image'
    # Depth is better and costs less: where both come, the right image is not even decoded.
    right = None if arrival.right is None or depth is not None \
        else arrival.right.decoded(inputs['right'].topic)
    return Frame(arrival.stamp_ns, image, depth, camera, topic, right=right)
