"""The service ``localize`` and the topic ``query_image``: where is the camera of this image?"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import Trigger

from feedforward_recon.errors import ReconError
from feedforward_recon.geometry.transforms import quat_xyzw_from_matrix
from feedforward_recon.ros.arrivals import DEFAULT_FRAME, Arrival, decoded_frame
from feedforward_recon.ros.convert import stamp_ns
from feedforward_recon.ros.frames import BodyPose
from feedforward_recon.ros.host import Host
from feedforward_recon.ros.positioning import Positioning
from feedforward_recon.ros.service_calls import Outcome, ServiceCalls
from feedforward_recon.ros.tf_buffer import TransformError
from feedforward_recon.session.live import SessionInfo
from feedforward_recon.types import Estimate


class ImageQueries:
    """Finds single images in the memory, on the worker; nothing is written to the map."""

    def __init__(self, host: Host, positioning: Positioning, calls: ServiceCalls) -> None:
        self._host, self._positioning, self._calls = host, positioning, calls
        host.node.create_subscription(Image, 'query_image', self._query, 5)
        host.node.create_subscription(CompressedImage, 'query_image/compressed', self._query, 5)

    async def localize(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Service: the pose of the newest image as JSON, or the reason for none."""
        await self._calls.answer(response, self._localize_newest)
        if not response.message.startswith('{'):  # refused before anything was looked up
            pipeline = self._calls.pipeline
            newest = pipeline.newest if pipeline else None
            response.message = _refusal(newest.stamp_ns if newest else 0, response.message)
        return response

    async def _localize_newest(self) -> Outcome:
        arrival = self._calls.configured().newest
        if arrival is None:
            raise ReconError(f'no image yet on {self._host.node.resolve_topic_name("image")}; ask '
                             '~/doctor why')
        estimate, body, text = await self._locate(arrival, self._host.config.localize_timeout_s)
        pipeline = self._calls.pipeline
        if body is not None and pipeline is not None \
                and not pipeline.outputs.is_old(body.stamp_ns):
            pipeline.outputs.pose(body)
        return estimate.T_map_cam is not None, text

    async def _locate(self, arrival: Arrival, timeout_s: float | None = None
                      ) -> tuple[Estimate, BodyPose | None, str]:
        """The estimate of an image, the robot's pose, and both as JSON."""
        host, runner = self._host, self._calls.configured().runner
        session = runner.session

        def run() -> tuple[Estimate, SessionInfo]:
            return session.locate(decoded_frame(arrival, host.health.inputs)), session.info

        estimate, info = await self._calls.ask(runner, run, timeout_s)
        body = None
        if estimate.T_map_cam is not None:
            try:
                body = self._positioning.poses.body(arrival, estimate, info)
            except TransformError as error:
                host.notice('TF_LATE', f'a localised pose was not published: {error}')
        age_s = (time.monotonic_ns() - arrival.arrived_ns) / 1e9
        return estimate, body, _as_json(estimate, body, info, host.config.map_frame, age_s)

    def _query(self, message: Image | CompressedImage) -> None:
        host, pipeline = self._host, self._calls.pipeline
        if pipeline is None or host.health.state != 'active':
            return
        frame_id = host.config.camera_frame or message.header.frame_id or DEFAULT_FRAME
        camera = pipeline.inputs.camera(message.header.frame_id) if pipeline.inputs else None
        if camera is not None and hasattr(message, 'width') \
                and camera.size_wh != (message.width, message.height):
            camera = None
        arrival = Arrival(stamp_ns(message.header), frame_id, message, None, camera,
                          time.monotonic_ns())
        if host.node.executor is not None:
            host.node.executor.create_task(self._answer_query, arrival)

    async def _answer_query(self, arrival: Arrival) -> None:
        body = None
        try:
            _, body, text = await self._locate(arrival)
        except ReconError as error:
            text = _refusal(arrival.stamp_ns, str(error))
        except Exception as error:  # whatever an image does, its sender waits for an answer
            self._host.notice('INTERNAL_ERROR', f'a query image failed: {error!r}')
            text = _refusal(arrival.stamp_ns, f'internal error: {error!r}')
        if self._calls.pipeline is not None:
            self._calls.pipeline.outputs.query(body, text)


def _refusal(stamp: int, reason: str) -> str:
    """The answer where nothing could be looked up in the memory, in the form of ``_as_json``."""
    return json.dumps({'stamp_ns': stamp, 'status': 'NOT_LOCALISED',
                       'reason': reason, 'pose': None})


def _as_json(estimate: Estimate, body: BodyPose | None, info: SessionInfo,
             map_frame: str, age_s: float) -> str:
    """An answer for programs: the pose of the body in the map, or the reason for none.

    age_s: seconds since the image arrived.
    """
    reply: dict[str, Any] = {
        'stamp_ns': estimate.stamp_ns, 'status': estimate.status.value,
        'reason': estimate.reason, 'inliers': estimate.inliers, 'score': estimate.score,
        'runner_up': estimate.runner_up, 'ms': estimate.latency_ms, 'age_s': round(age_s, 3),
        'asked': info.asked, 'frame_id': map_frame, 'scale_source': info.scale_source,
        'pose': None}
    if body is not None:
        reply['pose'] = {'position': body.T_map_body[:3, 3].tolist(),
                         'orientation_xyzw': np.asarray(
                             quat_xyzw_from_matrix(body.T_map_body[:3, :3])).tolist(),
                         'covariance': body.covariance.ravel().tolist(),
                         'body_frame': body.body_frame}
    return json.dumps(reply)
