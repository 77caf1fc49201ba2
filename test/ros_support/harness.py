"""Real nodes over real DDS in tests: own domain, own processes, hard kill, no leftovers.

Fixtures in conftest.py build on this: ``ros_domain``, ``start_node``, ``probe``.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import signal
import subprocess
import tempfile
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ros_support import shared_memory
from ros_support.programs import FreshProcess, WarmProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / 'config' / 'fastdds.xml'
# Above 101 the ports of a domain meet those that Linux hands out; below 30 people work.
DOMAINS = range(30, 102)
POLL_S = 0.02


def missing_ros(package: str = 'rclpy') -> str:
    """Reason to skip what needs this ROS package, or ''."""
    if importlib.util.find_spec(package) is not None:
        return ''
    return f'ros: {package} is not installed; run `make ros` or source a ROS 2'


@dataclass(frozen=True)
class RosDomain:
    """A ROS domain that no other test of this machine uses at the same time.

    environment: variables for processes that shall meet in this domain.
    leftovers: shared memory of killed processes that others still had open.
    """

    id: int
    environment: dict[str, str]
    leftovers: set[Path] = field(default_factory=set)


@contextmanager
def own_domain(name: str) -> Iterator[RosDomain]:
    """A free domain: the first choice depends on the name and the process, a lock decides."""
    first = zlib.crc32(f'{name} {os.getpid()}'.encode())
    for attempt in range(len(DOMAINS)):
        domain_id = DOMAINS[(first + attempt) % len(DOMAINS)]
        with (Path(tempfile.gettempdir()) / f'ffrecon-ros-domain-{domain_id}').open('w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            domain = RosDomain(domain_id, ros_environment(domain_id))
            try:
                yield domain
            finally:
                shared_memory.remove(domain.leftovers | shared_memory.ports_of(domain_id))
            return
    raise RuntimeError(f'all ROS domains {DOMAINS} are in use on this machine')


def ros_environment(domain_id: int) -> dict[str, str]:
    """Variables of a process in a domain of this machine only, with room for whole images."""
    return {'ROS_DOMAIN_ID': str(domain_id), 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
            'RMW_IMPLEMENTATION': 'rmw_fastrtps_cpp',
            profile_variable(os.environ.get('ROS_DISTRO', '')): str(PROFILE),
            'RCUTILS_LOGGING_BUFFERED_STREAM': '1', 'PYTHONUNBUFFERED': '1'}


def profile_variable(distro: str) -> str:
    """Environment variable with the profile of Fast DDS, which 3.0 renamed."""
    fast_dds_2 = distro in ('humble', 'jazzy')
    return 'FASTRTPS_DEFAULT_PROFILES_FILE' if fast_dds_2 else 'FASTDDS_DEFAULT_PROFILES_FILE'


class NodeProcess:
    """A program in its own process group, with its output in a file.

    module: dotted name; a node of the package may be named alone (``mapping_node``).
    fresh: a new interpreter, for tests of how a process begins and ends; others are forked from
    a server that has imported everything already.
    """

    def __init__(self, domain: RosDomain, log: Path, module: str, *arguments: str,
                 parameters: Mapping[str, Any] | None = None,
                 remap: Mapping[str, str] | None = None, environment: Mapping[str, str] | None
                 = None, fresh: bool = False) -> None:
        """Start it."""
        module = module if '.' in module else f'feedforward_recon.ros.{module}'
        words = [module, *arguments]
        ros = [*(word for name, value in (parameters or {}).items()
                 for word in ('-p', f'{name}:={yaml_value(value)}')),
               *(word for old, new in (remap or {}).items() for word in ('-r', f'{old}:={new}'))]
        words += ['--ros-args', *ros] if ros else []
        self.name, self.log = module, log
        path = os.pathsep.join([str(ROOT), str(ROOT / 'test'), os.environ.get('PYTHONPATH', '')])
        self._leftovers = domain.leftovers
        variables = {**os.environ, **domain.environment, 'PYTHONPATH': path,
                     **(environment or {})}
        self.process = (FreshProcess if fresh else WarmProcess)(words, log, variables)

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors='replace')

    def is_running(self) -> bool:
        """True until the process has ended."""
        return self.process.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Exit code; AssertionError with the output when it takes longer."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f'{self.name} still runs after {timeout_s} s:\n{self.output}'
                                 ) from None

    def wait_for_output(self, text: str, timeout_s: float = 15.0) -> None:
        """Return once it has printed a text; AssertionError when it ends or takes longer."""
        end = time.monotonic() + timeout_s
        while text not in self.output:
            if not self.is_running() or time.monotonic() > end:
                raise AssertionError(f'{self.name} did not print {text!r}:\n{self.output}')
            time.sleep(POLL_S)

    def interrupt(self) -> None:
        """Ctrl+C."""
        self._signal(signal.SIGINT)

    def terminate(self) -> None:
        """What a launch file or systemd sends."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group now and remove the shared memory it leaves behind."""
        self._signal(signal.SIGKILL)
        self.process.wait(10)
        shared_memory.remove(self._leftovers)

    def _signal(self, number: signal.Signals) -> None:
        self._leftovers |= shared_memory.mapped_by(self.pid)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def yaml_value(value: object) -> str:
    """A parameter as the command line of ROS reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, Path)):
        return f"'{value}'"
    return str(value)


def spin_until(node: Any, predicate: Callable[[], object], timeout_s: float = 15.0) -> bool:
    """Serve the callbacks of a node until the predicate holds; False when it does not in time.

    The node must belong to an executor (as the one of the ``probe`` fixture does).
    """
    end = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > end:
            return False
        node.executor.spin_once(timeout_sec=POLL_S)
    return True
