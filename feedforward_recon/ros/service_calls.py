"""What all services share: work that a call waits for, and an answer whatever happens.

Calls may overlap; nothing blocks the executor while the worker is busy.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from rclpy.task import Future

from feedforward_recon.errors import ReconError
from feedforward_recon.ros.host import STEADY, Host
from feedforward_recon.ros.pipeline import Pipeline
from feedforward_recon.ros.session_runner import SessionRunner

# Whether a call succeeded, and the message for its caller.
Outcome = tuple[bool, str]


class ServiceCalls:
    """Lets calls wait for the worker of the pipeline that the node has at the moment.

    pipeline: gives it, None while the node is not configured.
    """

    def __init__(self, host: Host, pipeline: Callable[[], Pipeline | None]) -> None:
        self._host, self._pipeline = host, pipeline

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline now, None while the node is not configured."""
        return self._pipeline()

    def configured(self) -> Pipeline:
        """The pipeline now; raises ReconError before the node is configured."""
        pipeline = self._pipeline()
        if pipeline is None:
            raise ReconError(f'expected a configured node, found it {self._host.health.state}; '
                             'configure and activate it first')
        return pipeline

    async def ask(self, runner: SessionRunner, run: Callable[[], Any],
                  timeout_s: float | None = None) -> Any:
        """What ``run`` returns on the worker. Raises what it raises, or ReconError: too late."""
        future: Any = Future()

        def done(result: Any, error: Exception | None) -> None:
            if not future.done():
                future.set_result((result, error))

        runner.ask(run, done)
        timer = None if timeout_s is None else self._host.node.create_timer(
            timeout_s, lambda: done(None, ReconError(f'no answer within {timeout_s:g} s; the '
                                                     'computer is too busy')), clock=STEADY)
        result, error = await future
        if timer is not None:
            self._host.node.destroy_timer(timer)
        if error is not None:
            raise error
        return result

    async def answer(self, response: Any, act: Callable[[], Awaitable[Outcome]]) -> Any:
        """Fill a response with what ``act`` brings, or why it failed."""
        try:
            response.success, response.message = await act()
        except ReconError as error:
            response.success, response.message = False, str(error)
        except Exception as error:
            self._host.notice('INTERNAL_ERROR', f'a service failed: {error!r}')
            response.success, response.message = False, f'internal error: {error!r}'
        return response
