"""The services of a node: each call is answered when the worker has the answer.

Every call gets an answer: what was done, or in one sentence why not. A failed call leaves the
node as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.task import Future
from std_srvs.srv import SetBool, Trigger

from feedforward_recon.ros.diagnostics import report_json
from feedforward_recon.ros.host import Host
from feedforward_recon.ros.image_queries import ImageQueries
from feedforward_recon.ros.map_saver import MapSaver
from feedforward_recon.ros.pipeline import Pipeline
from feedforward_recon.ros.positioning import Positioning
from feedforward_recon.ros.reporting import Reporting
from feedforward_recon.ros.service_calls import Outcome, ServiceCalls
from feedforward_recon.session.map_folder import SavedMap


class Services:
    """The services of one node, from its start to its end.

    pipeline: gives what the node consists of now, None while it is not configured.
    """

    def __init__(self, host: Host, positioning: Positioning, saver: MapSaver,
                 reporting: Reporting, pipeline: Callable[[], Pipeline | None]) -> None:
        self._host, self._saver, self._reporting = host, saver, reporting
        self._calls = ServiceCalls(host, pipeline)
        queries = ImageQueries(host, positioning, self._calls)
        group = ReentrantCallbackGroup()  # a call that awaits must not hold up the others
        for type_, name, handler in (
                (Trigger, 'localize', queries.localize),
                (Trigger, '~/save_map', self._save_map),
                (Trigger, '~/load_map', self._load_map),
                (Trigger, '~/reset', self._reset),
                (Trigger, '~/doctor', self._doctor),
                (SetBool, '~/pause', self._pause),
                (SetBool, '~/set_localization_mode', self._set_localization_mode)):
            host.node.create_service(type_, name, handler, callback_group=group)

    # -- the map ---------------------------------------------------------------------------

    async def _save_map(self, _: Trigger.Request, response: Trigger.Response
                        ) -> Trigger.Response:
        return await self._calls.answer(response, self._save)

    async def _save(self) -> Outcome:
        runner = self._calls.configured().runner
        future: Any = Future()
        self._saver.save(runner, self._host.config.map,
                          lambda *answer: future.set_result(answer))
        text, error = await future
        if error is not None:
            raise error
        return True, text

    async def _load_map(self, _: Trigger.Request, response: Trigger.Response
                        ) -> Trigger.Response:
        return await self._calls.answer(response, self._load)

    async def _load(self) -> Outcome:
        pipeline, path = self._calls.configured(), self._host.config.map
        session = pipeline.runner.session
        given_up = session.info.unsaved_keyframes
        saved: SavedMap = await self._calls.ask(pipeline.runner, lambda: session.load(path))
        pipeline.new_map(session.info)
        lost = f'; the map of {given_up} keyframes being made was not saved' if given_up else ''
        return True, (f'loaded {saved.path.resolve()}: {saved.info.keyframes} keyframes; '
                      f'localising in it{lost}')

    async def _reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return await self._calls.answer(response, self._forget)

    async def _forget(self) -> Outcome:
        pipeline = self._calls.configured()
        session = pipeline.runner.session
        pipeline.runner.forget_images()  # images from before are not the start of the new map
        text, info = await self._calls.ask(pipeline.runner,
                                           lambda: (session.reset(), session.info))
        pipeline.new_map(info)
        return True, text

    # -- modes -----------------------------------------------------------------------------

    async def _pause(self, request: SetBool.Request, response: SetBool.Response
                     ) -> SetBool.Response:
        self._host.health.paused = request.data
        response.success = True
        response.message = 'paused: images are not used' if request.data else 'running'
        return response

    async def _set_localization_mode(self, request: SetBool.Request, response: SetBool.Response
                                     ) -> SetBool.Response:
        async def act() -> Outcome:
            runner = self._calls.configured().runner
            session = runner.session
            text = await self._calls.ask(runner, lambda: session.set_localization(request.data))
            self._host.health.mode = session.mode
            return True, text

        return await self._calls.answer(response, act)

    # -- diagnosis -------------------------------------------------------------------------

    async def _doctor(self, _: Trigger.Request, response: Trigger.Response
                      ) -> Trigger.Response:
        host, pipeline, found = self._host, self._calls.pipeline, self._reporting.diagnose()
        if pipeline is not None and pipeline.inputs is not None:
            pipeline.inputs.watch()
        response.success = not found
        response.message = report_json(host.health, found, host.now_ns())
        return response
