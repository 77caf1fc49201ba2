"""The calibration of the camera: from CameraInfo messages, judged against the images."""

from __future__ import annotations

from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.ros.convert import camera_from_info
from feedforward_recon.ros.health import Health, InfoState, info_state


class Calibrations:
    """The camera of each optical frame; keeps ``camera_info`` and ``info_wh`` of the health."""

    def __init__(self, config: NodeConfig, health: Health) -> None:
        self._config, self._health = config, health
        self._cameras: dict[str, Camera] = {}
        health.camera_info, health.info_wh = InfoState.UNKNOWN, None

    def configure(self, config: NodeConfig) -> None:
        """Take over settings that changed while running."""
        self._config = config

    def take(self, message: CameraInfo) -> tuple[Camera | None, Camera | None]:
        """The camera of a message, and the one that its frame had before.

        None stands for an all-zero calibration, and for no camera before.
        Raises InputError for a message that cannot be used.
        """
        camera = camera_from_info(message, self._config.rectified)
        health, frame_id = self._health, message.header.frame_id
        health.info_wh = camera.size_wh if camera else (message.width, message.height)
        health.camera_info = InfoState.ZERO if camera is None else info_state(
            camera.K.ravel().tolist(), camera.size_wh, health.inputs['image'].traffic.size_wh)
        before = self._cameras.get(frame_id)
        if camera is not None:
            self._cameras[frame_id] = camera
        return camera, before

    def camera(self, frame_id: str) -> Camera | None:
        """The calibration for images of a frame; the only one there is serves all."""
        if frame_id not in self._cameras and len(self._cameras) == 1:
            return next(iter(self._cameras.values()))
        return self._cameras.get(frame_id)

    def may_come(self, image: Image | CompressedImage, waited_s: float) -> bool:
        """No calibration yet, and images did not wait long for one."""
        return (self.camera(image.header.frame_id) is None
                and self._health.camera_info is InfoState.UNKNOWN
                and waited_s < self._config.info_wait_s)

    def camera_of(self, image: Image | CompressedImage) -> tuple[bool, Camera | None]:
        """May the image be used, and with which camera? None is guessed later."""
        health, camera = self._health, self.camera(image.header.frame_id)
        if camera is None:
            if health.camera_info is InfoState.UNKNOWN:
                health.camera_info = InfoState.MISSING
            return True, None
        size_wh = (image.width, image.height) if hasattr(image, 'width') else camera.size_wh
        health.camera_info = info_state(camera.K.ravel().tolist(), camera.size_wh, size_wh)
        return health.camera_info is InfoState.GOOD, camera
