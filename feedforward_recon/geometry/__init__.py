"""Closed-form multi-view geometry: knows cameras and points, no network, no ROS."""
