"""Services and query images: questions to the worker, answered when it has the answer.

Every call gets an answer: what was done, or in one sentence why not. A failed call leaves the
node as it was. Calls may overlap; nothing blocks the executor while the worker thinks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.task import Future
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import SetBool, Trigger

from feedforward_recon.errors import ReconError
from feedforward_recon.geometry.transforms import quat_xyzw_from_matrix
from feedforward_recon.ros.convert import stamp_ns
from feedforward_recon.ros.diagnostics import report_json
from feedforward_recon.ros.frames import BodyPose
from feedforward_recon.ros.inputs import DEFAULT_FRAME, Arrival
from feedforward_recon.ros.positioning import STEADY
from feedforward_recon.ros.tf_buffer import TransformError
from feedforward_recon.ros.worker import Job, Worker
from feedforward_recon.session.live import SessionInfo
from feedforward_recon.session.map_folder import SavedMap
from feedforward_recon.types import Estimate

if TYPE_CHECKING:
    from feedforward_recon.ros.node import CameraNode


class Services:
    """The services of one node, from its start to its end."""

    def __init__(self, node: CameraNode) -> None:
        self._node = node
        group = ReentrantCallbackGroup()  # a call that awaits must not hold up the others
        for type_, name, handler in (
                (Trigger, 'localize', self._localize),
                (Trigger, '~/save_map', self._save_map),
                (Trigger, '~/load_map', self._load_map),
                (Trigger, '~/reset', self._reset),
                (Trigger, '~/doctor', self._doctor),
                (SetBool, '~/pause', self._pause),
                (SetBool, '~/set_localization_mode', self._set_localization_mode)):
            node.create_service(type_, name, handler, callback_group=group)
        node.create_subscription(Image, 'query_image', self._query, 5)
        node.create_subscription(CompressedImage, 'query_image/compressed', self._query, 5)

    # -- asking ----------------------------------------------------------------------------

    async def _ask(self, worker: Worker, run: Callable[[], Any],
                   timeout_s: float | None = None) -> Any:
        """What ``run`` returns on a worker. Raises what it raises, or ReconError: too late."""
        future: Any = Future()

        def done(result: Any, error: Exception | None) -> None:
            if not future.done():
                future.set_result((result, error))

        worker.ask(Job(run, done))
        timer = None if timeout_s is None else self._node.create_timer(
            timeout_s, lambda: done(None, ReconError(f'no answer within {timeout_s:g} s; the '
                                                     'computer is too busy')), clock=STEADY)
        result, error = await future
        if timer is not None:
            self._node.destroy_timer(timer)
        if error is not None:
            raise error
        return result

    async def _answer(self, response: Any, act: Callable[[], Any]) -> Any:
        """Fill a response with what ``act`` says or why it failed."""
        try:
            response.success, response.message = await act()
        except ReconError as error:
            response.success, response.message = False, str(error)
        except Exception as error:
            self._node.notice('INTERNAL_ERROR', f'a service failed: {error!r}')
            response.success, response.message = False, f'internal error: {error!r}'
        return response

    def _working(self) -> tuple[Any, Worker]:
        """Session and worker; raises ReconError before the node is configured."""
        if self._node.session is None or self._node.worker is None:
            raise ReconError(f'expected a configured node, found it {self._node.health.state}; '
                             'configure and activate it first')
        return self._node.session, self._node.worker

    # -- localising ------------------------------------------------------------------------

    async def _localize(self, _: Trigger.Request, response: Trigger.Response
                        ) -> Trigger.Response:
        await self._answer(response, self._localize_newest)
        if not response.message.startswith('{'):  # a refusal before anybody looked
            newest = self._node.newest
            response.message = _refusal(newest.stamp_ns if newest else 0, response.message)
        return response

    async def _localize_newest(self) -> tuple[bool, str]:
        arrival = self._node.newest
        if arrival is None:
            self._working()
            raise ReconError(f'no image yet on {self._node.resolve_topic_name("image")}; ask '
                             '~/doctor why')
        estimate, body, text = await self._locate(arrival, self._node.config.localize_timeout_s)
        outputs = self._node.outputs
        if body is not None and outputs is not None and not outputs.is_old(body.stamp_ns):
            outputs.pose(body)
        return estimate.T_map_cam is not None, text

    async def _locate(self, arrival: Arrival, timeout_s: float | None = None
                      ) -> tuple[Estimate, BodyPose | None, str]:
        """The estimate of an image, the robot's pose, and both as JSON."""
        session, worker = self._working()
        node = self._node

        def run() -> tuple[Estimate, SessionInfo]:
            return session.locate(node.decode(arrival)), session.info

        estimate, info = await self._ask(worker, run, timeout_s)
        body = None
        if estimate.T_map_cam is not None:
            try:
                body = node.positioning.body(arrival, estimate, info)
            except TransformError as error:
                node.notice('TF_LATE', f'a localised pose was not published: {error}')
        age_s = (time.monotonic_ns() - arrival.arrived_ns) / 1e9
        return estimate, body, _as_json(estimate, body, info, node.config.map_frame, age_s)

    def _query(self, message: Image | CompressedImage) -> None:
        node = self._node
        if node.session is None or node.outputs is None or node.health.state != 'active':
            return
        frame_id = node.config.camera_frame or message.header.frame_id or DEFAULT_FRAME
        camera = node.inputs.camera(message.header.frame_id) if node.inputs else None
        if camera is not None and hasattr(message, 'width') \
                and camera.size_wh != (message.width, message.height):
            camera = None
        arrival = Arrival(stamp_ns(message.header), frame_id, message, None, camera,
                          time.monotonic_ns())
        if node.executor is not None:
            node.executor.create_task(self._answer_query, arrival)

    async def _answer_query(self, arrival: Arrival) -> None:
        body = None
        try:
            _, body, text = await self._locate(arrival)
        except ReconError as error:
            text = _refusal(arrival.stamp_ns, str(error))
        except Exception as error:  # whatever an image does, its sender waits for an answer
            self._node.notice('INTERNAL_ERROR', f'a query image failed: {error!r}')
            text = _refusal(arrival.stamp_ns, f'internal error: {error!r}')
        if self._node.outputs is not None:
            self._node.outputs.query(body, text)

    # -- the map ---------------------------------------------------------------------------

    async def _save_map(self, _: Trigger.Request, response: Trigger.Response
                        ) -> Trigger.Response:
        return await self._answer(response, self._save)

    async def _save(self) -> tuple[bool, str]:
        session, worker = self._working()
        future: Any = Future()
        self._node.keeper.save(session, worker, self._node.config.map,
                               lambda *answer: future.set_result(answer))
        text, error = await future
        if error is not None:
            raise error
        return True, text

    async def _load_map(self, _: Trigger.Request, response: Trigger.Response
                        ) -> Trigger.Response:
        return await self._answer(response, self._load)

    async def _load(self) -> tuple[bool, str]:
        session, worker = self._working()
        path, given_up = self._node.config.map, session.info.unsaved_keyframes
        saved: SavedMap = await self._ask(worker, lambda: session.load(path))
        self._node.new_map(session.info)
        lost = f'; the map of {given_up} keyframes being made was not saved' if given_up else ''
        return True, (f'loaded {saved.path.resolve()}: {saved.info.keyframes} keyframes; '
                      f'localising in it{lost}')

    async def _reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return await self._answer(response, self._forget)

    async def _forget(self) -> tuple[bool, str]:
        session, worker = self._working()
        if self._node.queue is not None:
            self._node.queue.clear()  # images from before are not the start of the new map
        text, info = await self._ask(worker, lambda: (session.reset(), session.info))
        self._node.new_map(info)
        return True, text

    # -- modes -----------------------------------------------------------------------------

    async def _pause(self, request: SetBool.Request, response: SetBool.Response
                     ) -> SetBool.Response:
        self._node.health.paused = request.data
        response.success = True
        response.message = 'paused: images are not used' if request.data else 'running'
        return response

    async def _set_localization_mode(self, request: SetBool.Request, response: SetBool.Response
                                     ) -> SetBool.Response:
        async def act() -> tuple[bool, str]:
            session, worker = self._working()
            text = await self._ask(worker, lambda: session.set_localization(request.data))
            self._node.health.mode = session.mode
            return True, text

        return await self._answer(response, act)

    async def _doctor(self, _: Trigger.Request, response: Trigger.Response
                      ) -> Trigger.Response:
        node, found = self._node, self._node.causes()
        if node.inputs is not None:
            node.inputs.watch()
        response.success = not found
        response.message = report_json(node.health, found, node.now_ns())
        return response


def _refusal(stamp: int, reason: str) -> str:
    """The answer where nothing could be asked of the memory, in the form of ``_as_json``."""
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
        'frame_id': map_frame, 'scale_source': info.scale_source, 'pose': None}
    if body is not None:
        reply['pose'] = {'position': body.T_map_body[:3, 3].tolist(),
                         'orientation_xyzw': np.asarray(
                             quat_xyzw_from_matrix(body.T_map_body[:3, :3])).tolist(),
                         'covariance': body.covariance.ravel().tolist(),
                         'body_frame': body.body_frame}
    return json.dumps(reply)
