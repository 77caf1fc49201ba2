"""Textured rooms with exact ground truth: images, depth and poses from a seed, no data needed.

>>> room = Room.generate(seed=7)
>>> poses = room.walk(300, seed=0)
>>> image, depth = room.render(Camera.from_fov(65, (640, 480)), poses[0])

World frame: z up, origin in the middle of the floor, metres. Cameras use OpenCV axes.
"""

from feedforward_recon.synthetic.room import Room, render_walk, right_image

__all__ = ['Room', 'render_walk', 'right_image']
