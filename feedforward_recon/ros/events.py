"""Quality-of-service events under the names that each ROS 2 distribution gave them."""

from __future__ import annotations

from collections.abc import Callable

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks


def subscription_events(on_lost: Callable[[int], None],
                        on_unmatched: Callable[[int], None]) -> SubscriptionEventCallbacks:
    """Callbacks for totals: messages lost on the way, publishers with incompatible QoS."""
    return SubscriptionEventCallbacks(
        message_lost=lambda event: on_lost(event.total_count),
        incompatible_qos=lambda event: on_unmatched(event.total_count))
