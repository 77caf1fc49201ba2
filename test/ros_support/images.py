"""Sends numbered raw images, as a camera in another process does: COUNT RATE_HZ RELIABLE."""

from __future__ import annotations

import sys
import time

import numpy as np
import rclpy
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from sensor_msgs.msg import Image

WIDTH, HEIGHT = 640, 480


def main() -> None:
    """Wait for one subscriber, then send COUNT images whose stamp is their number."""
    count, rate_hz, reliable = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == 'reliable'
    rclpy.init()
    node = rclpy.create_node('camera')
    policy = QoSReliabilityPolicy.RELIABLE if reliable else QoSReliabilityPolicy.BEST_EFFORT
    publisher = node.create_publisher(Image, 'image', QoSProfile(depth=5, reliability=policy))
    while publisher.get_subscription_count() == 0:
        time.sleep(0.02)
    time.sleep(0.5)  # the other side learns of this one a little later
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8).tobytes()
    message = Image(width=WIDTH, height=HEIGHT, encoding='rgb8', step=3 * WIDTH, data=pixels)
    for number in range(count):
        message.header.stamp.sec = number
        publisher.publish(message)
        time.sleep(1 / rate_hz)
    node.destroy_node()
    rclpy.shutdown()


if __name__ == '__main__':
    main()
