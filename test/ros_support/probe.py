"""The test's own node: listens, publishes, calls, in the domain of the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSDurabilityPolicy, QoSProfile, QoSReliabilityPolicy

from ros_support.harness import RosDomain, spin_until

TRANSITIONS = {name: getattr(Transition, f'TRANSITION_{name.upper()}')
               for name in ('configure', 'activate', 'deactivate', 'cleanup')}


def profile(depth: int = 100, *, reliable: bool = True, latched: bool = False) -> QoSProfile:
    """QoS in the words of these tests."""
    return QoSProfile(
        depth=depth,
        reliability=QoSReliabilityPolicy.RELIABLE if reliable
        else QoSReliabilityPolicy.BEST_EFFORT,
        durability=QoSDurabilityPolicy.TRANSIENT_LOCAL if latched
        else QoSDurabilityPolicy.VOLATILE)


class Probe:
    """A node with its own context and executor; nothing runs but inside these methods."""

    def __init__(self, domain: RosDomain, name: str = 'probe') -> None:
        """Join the domain."""
        self.context = Context()
        rclpy.init(context=self.context, domain_id=domain.id)
        self.node: Node = rclpy.create_node(name, context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)

    def close(self) -> None:
        """Leave the domain."""
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def spin_until(self, predicate: Callable[[], object], timeout_s: float = 15.0) -> bool:
        """Serve callbacks until the predicate holds; False when it does not in time."""
        return spin_until(self.node, predicate, timeout_s)

    def spin_for(self, duration_s: float) -> None:
        """Serve callbacks for a while: only where nothing is expected to happen."""
        self.spin_until(lambda: False, duration_s)

    def collect(self, message_type: type, topic: str, depth: int = 100, *, reliable: bool = True,
                latched: bool = False) -> list[Any]:
        """A list that grows with every message of a topic."""
        messages: list[Any] = []
        self.node.create_subscription(message_type, topic, messages.append,
                                      profile(depth, reliable=reliable, latched=latched))
        return messages

    def publisher(self, message_type: type, topic: str, depth: int = 10, *,
                  reliable: bool = True, latched: bool = False) -> Any:
        """A publisher on a topic."""
        return self.node.create_publisher(message_type, topic,
                                          profile(depth, reliable=reliable, latched=latched))

    def call(self, service_type: Any, name: str, request: Any = None,
             timeout_s: float = 15.0) -> Any:
        """The answer of a service; AssertionError when there is none in time."""
        client = self.node.create_client(service_type, name)
        try:
            assert self.spin_until(client.service_is_ready, timeout_s), f'no service {name}'
            future = client.call_async(request or service_type.Request())
            assert self.spin_until(future.done, timeout_s), f'no answer from {name}'
            return future.result()
        finally:
            self.node.destroy_client(client)

    def ask(self, service_type: Any, name: str, timeout_s: float = 30.0) -> Any:
        """The answer of a service that changes nothing; AssertionError when there is none in time.

        Asked again each second: what is ready may be the service of a node of this name that was
        killed, which DDS shows for another 20 s.
        """
        client, futures = self.node.create_client(service_type, name), []

        def answered() -> Any:
            return next((future for future in futures if future.done()), None)

        def answers_now() -> bool:
            if self.spin_until(client.service_is_ready, 1.0):
                futures.append(client.call_async(service_type.Request()))
            return self.spin_until(answered, 1.0)
        try:
            assert self.spin_until(answers_now, timeout_s), f'no answer from {name}'
            return answered().result()
        finally:
            self.node.destroy_client(client)

    def change_state(self, node: str, transition: str, timeout_s: float = 30.0) -> bool:
        """Send a lifecycle transition (configure, activate, deactivate, cleanup) to a node."""
        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[transition]
        return self.call(ChangeState, f'{node}/change_state', request, timeout_s).success

    def state(self, node: str, timeout_s: float = 15.0) -> str:
        """Lifecycle state of a node: unconfigured, inactive, active, finalized."""
        return self.ask(GetState, f'{node}/get_state', timeout_s).current_state.label

    def wait_for_state(self, node: str, state: str, timeout_s: float = 30.0) -> bool:
        """True once a node reports this lifecycle state."""
        return self.spin_until(lambda: self.state(node, timeout_s) == state, timeout_s)

    def publisher_of(self, topic: str, timeout_s: float = 30.0) -> str:
        """Full name of the node that publishes a topic; AssertionError when none does in time."""
        def found() -> list[str]:
            return [f'{publisher.node_namespace.rstrip("/")}/{publisher.node_name}'
                    for publisher in self.node.get_publishers_info_by_topic(topic)
                    if 'UNKNOWN' not in publisher.node_name]
        assert self.spin_until(found, timeout_s), f'nobody publishes {topic}'
        return found()[0]

    def is_known_to(self, node: str) -> bool:
        """True once a lifecycle node is active and sends to the subscriptions made so far.

        A publisher may have matched on this side alone, and what it sends then is lost. Fast DDS
        tells a process of another's subscriptions in the order of their making: who answers a
        new client knows the one for its answers, and all before.
        """
        return self.wait_for_state(node, 'active')
