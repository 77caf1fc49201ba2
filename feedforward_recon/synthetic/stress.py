"""Hard walks with exact truth: fast turns, blur, jumping exposure, white walls, moving things.

>>> frames = stress_walk('fast_turns', seed=0, images=160)

Every case changes one thing about a walk through a room or a hall, so that a table of them tells
what a tracker cannot bear. Truth is the pose in the middle of the exposure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import make_transform, so3_exp
from feedforward_recon.synthetic.hall import hall
from feedforward_recon.synthetic.layout import Box
from feedforward_recon.synthetic.room import Room, box_faces
from feedforward_recon.synthetic.walk import look
from feedforward_recon.types import Frame

CAMERA = Camera.from_fov(68.0, (320, 240))
FPS = 20.0
# Poses from one image to the next: a blurred image is the mean of as many views as it needs.
STEPS = 16
BLUR_STEP_PX = 2.5  # image motion from one of these views to the next
NOISE = 1.0  # of the sensor, grey levels
HEIGHT_M = 1.4
SWING_S = 5.0  # in which a moving box crosses the view and comes back, at up to 1.6 m/s


@dataclass(frozen=True)
class Plan:
    """What happens on a walk of N images.

    poses: T_world_cam [N * STEPS, 4, 4], STEPS to an image. exposure [N]: how long the shutter
    is open, as a share of the time between images. light [N, 2]: gain and gamma of each image.
    intruders: boxes at image i, in front of what stands in the room.
    """

    room: Room
    poses: NDArray[np.float64]
    exposure: NDArray[np.float64]
    light: NDArray[np.float64]
    intruders: Callable[[int], list[Box]] = field(default=lambda index: [])


def stress_walk(case: str, seed: int, images: int = 160, camera: Camera = CAMERA) -> list[Frame]:
    """Frames of one of ``CASES`` with depth and true poses (the map frame is the room's frame).

    Raises InputError for another case, or fewer than 20 images.
    """
    if case not in CASES or images < 20:
        raise InputError(f'expected a case of {", ".join(CASES)} and at least 20 images, found '
                         f'{case} and {images}')
    rng = np.random.default_rng((seed, list(CASES).index(case)))
    plan = CASES[case](np.random.default_rng(seed), rng, images)
    return [_frame(plan, index, camera, rng) for index in range(images)]


def _frame(plan: Plan, index: int, camera: Camera, rng: np.random.Generator) -> Frame:
    middle = index * STEPS
    room = _with(plan.room, plan.intruders(index))
    image, depth = room.render(camera, plan.poses[middle])
    bright = image.astype(np.float32)
    open_steps = _exposed(plan, index, camera)
    if len(open_steps):
        for step in open_steps:
            bright += room.render(camera, plan.poses[step])[0]
        bright /= 1 + len(open_steps)
    gain, gamma = plan.light[index]
    bright = 255 * gain * (bright / 255)**gamma + rng.normal(0, NOISE, bright.shape)
    return Frame(round(index / FPS * 1e9), np.clip(np.rint(bright), 0, 255).astype(np.uint8),
                 depth, camera, f'stress/{index:06d}', plan.poses[middle])


def _with(room: Room, boxes: list[Box]) -> Room:
    """The room with other boxes in it, which keep the light in which they were first seen."""
    if not boxes:
        return room
    more = box_faces(np.random.default_rng(room.seed), boxes)
    return replace(room, faces=[*room.faces, *more])


def _exposed(plan: Plan, index: int, camera: Camera) -> NDArray[np.intp]:
    """Steps beside the middle of an exposure from which its image is averaged as well."""
    middle, last = index * STEPS, len(plan.poses) - 1
    reach = round(plan.exposure[index] * STEPS / 2)
    first, end = plan.poses[max(middle - reach, 0)], plan.poses[min(middle + reach, last)]
    axes = first[:3, :3].T @ end[:3, :3]
    # How far the middle of the image moves: turns blur more than steps.
    motion_px = camera.fx * np.hypot(*axes[:2, 2])
    count = int(np.clip(motion_px / BLUR_STEP_PX, 0, 2 * reach)) // 2
    offsets = np.rint(np.linspace(1 / max(count, 1), 1, count) * reach).astype(int)
    steps = np.concatenate([middle - offsets[::-1], middle + offsets])
    return steps[(steps >= 0) & (steps <= last)]


# -- the cases --------------------------------------------------------------------------------

def _walked(room_rng: np.random.Generator, images: int) -> Plan:
    """A calm walk through a room, with a short exposure."""
    seed = int(room_rng.integers(2**31))
    room = Room.generate(seed)
    poses = np.stack(room.walk(images * STEPS, seed=0, fps=FPS * STEPS))
    return Plan(room, poses, np.full(images, 0.2), np.ones((images, 2)))


def _plain(room_rng: np.random.Generator, rng: np.random.Generator, images: int) -> Plan:
    return _walked(room_rng, images)


def _fast_turns(room_rng: np.random.Generator, rng: np.random.Generator, images: int) -> Plan:
    """Turns of 70 to 140 degrees per second to and fro, beside the walk's own."""
    plan = _walked(room_rng, images)
    rate = np.zeros(len(plan.poses))
    for turn, start in enumerate(np.linspace(0.12, 0.82, 4)):
        length = round(0.7 * FPS * STEPS)
        first = round(start * len(rate))
        side = 1 if turn % 2 else -1
        ramp = np.clip(4 * np.sin(np.pi * np.linspace(0, 1, length)), 0, 1)
        rate[first:first + length] = (side * np.deg2rad(rng.uniform(70, 140))
                                      * ramp)[:max(len(rate) - first, 0)]
    yaw = np.cumsum(rate) / (FPS * STEPS)
    return replace(plan, poses=_turned(plan.poses, yaw), exposure=np.full(images, 0.35))


def _turned(poses: NDArray, yaw: NDArray) -> NDArray:
    """The poses [N, 4, 4], each turned about the vertical through its camera by yaw [N]."""
    zero = np.zeros_like(yaw)
    R = so3_exp(np.stack([zero, zero, yaw], -1)) @ poses[:, :3, :3]
    return make_transform(R, poses[:, :3, 3])


def _blur(room_rng: np.random.Generator, rng: np.random.Generator, images: int) -> Plan:
    """Three stretches in dim light: the shutter stays open while the hand trembles."""
    plan = _walked(room_rng, images)
    seconds = np.arange(len(plan.poses)) / (FPS * STEPS)
    exposure, tremble = plan.exposure.copy(), np.zeros(len(seconds))
    for start in (0.15, 0.45, 0.75):
        first, last = round(start * images), round((start + 0.12) * images)
        exposure[first:last] = 0.9
        span = slice(first * STEPS, last * STEPS)
        tremble[span] = np.sin(np.pi * np.linspace(0, 1, last * STEPS - first * STEPS))
    phases = rng.uniform(0, 2 * np.pi, 2)
    shake = np.deg2rad(2.5) * np.sin(2 * np.pi * np.array([[3.1], [4.3]]) * seconds
                                     + phases[:, None]) * tremble
    R = plan.poses[:, :3, :3] @ so3_exp(np.stack([*shake, np.zeros_like(seconds)], -1))
    return replace(plan, poses=make_transform(R, plan.poses[:, :3, 3]), exposure=exposure)


def _exposure(room_rng: np.random.Generator, rng: np.random.Generator, images: int) -> Plan:
    """Brightness jumps by a factor of 2 to 4, and comes back as an automatic exposure would."""
    plan = _walked(room_rng, images)
    light, stops, gamma = np.ones((images, 2)), 0.0, 1.0
    for index in range(images):
        if index % 20 == 10:
            factor = rng.uniform(2, 4)
            stops = np.log2(factor) * (1 if (index // 20) % 2 else -1)
            gamma = rng.uniform(0.8, 1.25)
        elif index % 20 > 16:
            stops *= 0.5  # from one image to the next half of the way back
            gamma = gamma**0.5
        light[index] = 2.0**stops, gamma
    return replace(plan, light=light)


def _white_corridor(room_rng: np.random.Generator, rng: np.random.Generator, images: int) -> Plan:
    """From a furnished end into a white corridor, a long look at its wall, and on."""
    room = hall(int(room_rng.integers(2**31)), middle='white')
    share = np.linspace(0, 1, images * STEPS)
    yaw = np.interp(share, (0, 0.4, 0.52, 0.64, 0.76, 1), np.deg2rad((0, 0, 80, 80, 0, 0)))
    return _in_hall(room, np.interp(share, (0, 1), (-3.6, -0.4)), yaw, images)


def _in_hall(room: Room, x: NDArray, yaw: NDArray, images: int) -> Plan:
    """A smooth walk along a hall: x [M] and headings [M] at every step, M = images * STEPS."""
    width = 0.2 * FPS * STEPS  # nobody starts or stops within less than about 0.4 s
    kernel = np.hanning(2 * round(width) + 1)
    x, yaw = (np.convolve(np.pad(line, round(width), 'edge'), kernel / kernel.sum(), 'valid')
              for line in (x, yaw))
    seconds = np.arange(len(x)) / (FPS * STEPS)
    sway = np.sin(2 * np.pi * 0.9 * seconds)
    position = np.stack([x, 0.02 * sway, HEIGHT_M + 0.015 * np.abs(sway)], -1)
    R = look(yaw, np.deg2rad(-6 + 1.0 * np.sin(2 * np.pi * 0.4 * seconds)), np.deg2rad(sway))
    return Plan(room, make_transform(R, position), np.full(images, 0.2), np.ones((images, 2)))


def _moving_boxes(room_rng: np.random.Generator, rng: np.random.Generator, images: int) -> Plan:
    """Two textured boxes that come into view and cross it again and again, near the camera."""
    plan = _walked(room_rng, images)
    seconds, turn = np.arange(images) / FPS, rng.choice([-1, 1], 2)
    # Beside the view at first; the second is a quarter of a swing late, so that they alternate.
    swing = [side * np.cos(2 * np.pi / SWING_S * np.maximum(seconds - late, 0))
             for side, late in zip(turn, (0, SWING_S / 4), strict=True)]

    def intruders(index: int) -> list[Box]:
        T_world_cam = plan.poses[index * STEPS]
        offsets = [(1.3 * swing[0][index], 0.15, 1.0), (1.5 * swing[1][index], 0.15, 1.2)]
        return [Box('object', T_world_cam[:3, :3] @ offset + T_world_cam[:3, 3],
                    np.array([0.34, 0.2, 0.55]), 0.3 * index / FPS) for offset in offsets]

    return replace(plan, intruders=intruders)


def _pure_rotation_start(room_rng: np.random.Generator, rng: np.random.Generator, images: int
                         ) -> Plan:
    """A quarter of the walk turns in one place before the camera leaves it."""
    plan = _walked(room_rng, images)
    still = len(plan.poses) // 4
    T_world_cam = np.repeat(plan.poses[:1], still, 0)
    yaw = np.deg2rad(35) * np.sin(2 * np.pi * np.linspace(0, 1, still))  # there and back
    poses = np.concatenate([_turned(T_world_cam, yaw), plan.poses[:-still]])
    return replace(plan, poses=poses)


def _forward_start(room_rng: np.random.Generator, rng: np.random.Generator, images: int) -> Plan:
    """Straight ahead along a hall: near the middle of the image nothing moves."""
    room = hall(int(room_rng.integers(2**31)), middle='papered')
    x = np.linspace(-3.6, 0.4, images * STEPS)
    return _in_hall(room, x, np.zeros_like(x), images)


Case = Callable[[np.random.Generator, np.random.Generator, int], Plan]
CASES: dict[str, Case] = {
    'plain': _plain, 'fast_turns': _fast_turns, 'blur': _blur, 'exposure': _exposure,
    'white_corridor': _white_corridor, 'moving_boxes': _moving_boxes,
    'pure_rotation_start': _pure_rotation_start, 'forward_start': _forward_start}
