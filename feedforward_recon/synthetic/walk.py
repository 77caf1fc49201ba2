"""Camera walks through a room: smooth loops with the sway of a hand, and views beside them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, minimum_filter1d

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import make_transform, so3_exp
from feedforward_recon.synthetic.layout import Box
from feedforward_recon.synthetic.lighting import first_hit

SPEED_M_S = 0.4
TURN_RAD_S = np.deg2rad(20)
MARGIN_M = 0.3
HELD_OUT_MARGIN_M = 0.12
HEIGHTS_M = (1.15, 1.65)


class FreeSpace(Protocol):
    """What a walk needs to know of a room: its seed, its size [3] in metres and what is in it."""

    @property
    def seed(self) -> int:
        """Seed of the room."""
        ...

    @property
    def size(self) -> NDArray[np.float64]:
        """Sides [3] in metres."""
        ...

    @property
    def boxes(self) -> list[Box]:
        """What stands in it."""
        ...

    def clearance(self, points_world: NDArray) -> NDArray[np.float64]:
        """Distance [N] in metres of points [N, 3] to the nearest surface; negative inside one."""
        ...


def look(yaw: NDArray, pitch: NDArray, roll: NDArray) -> NDArray[np.float64]:
    """Rotations world <- camera [N, 3, 3]; yaw from world x, pitch up, roll clockwise (rad)."""
    zero = np.zeros_like(yaw)
    forward = np.stack([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch),
                        np.sin(pitch)], -1)
    right = np.stack([np.sin(yaw), -np.cos(yaw), zero], -1)
    R = np.stack([right, np.cross(forward, right), forward], -1)
    return R @ so3_exp(np.stack([zero, zero, roll], -1))


def walk(room: FreeSpace, n_frames: int, seed: int, fps: float = 15.0
         ) -> list[NDArray[np.float64]]:
    """Poses T_world_cam of a walk at about 0.4 m/s that looks around and closes its loop.

    Raises InputError unless n_frames >= 1 and fps > 0.
    """
    if n_frames < 1 or not fps > 0:
        raise InputError(f'expected n_frames >= 1 and fps > 0, found {n_frames} and {fps}')
    rng = np.random.default_rng((room.seed, seed))
    duration_s = n_frames / fps
    phase = np.arange(n_frames) / n_frames  # one period is the whole walk
    heights = _waves(rng, phase, duration_s, 0.15, 0.25)
    heights = np.mean(HEIGHTS_M) + np.ptp(HEIGHTS_M) / 2 * np.clip(heights, -1, 1)
    positions = np.column_stack([_loop(room, rng, phase, duration_s), heights])
    laps_turned = round(duration_s * TURN_RAD_S / (2 * np.pi) * 0.8)
    yaw = _yaw(room, rng, positions, phase, laps_turned, duration_s)
    pitch = np.deg2rad(-11 + 12 * _waves(rng, phase, duration_s, 0.1, 0.3))
    roll = np.deg2rad(2.0 * _waves(rng, phase, duration_s, 0.1, 0.5))
    shake = np.stack([_waves(rng, phase, duration_s, 0.8, 2.5) for _ in range(6)], -1)
    R = look(yaw, pitch, roll) @ so3_exp(np.deg2rad(0.25) * shake[:, 3:])
    return list(make_transform(R, positions + 0.003 * shake[:, :3]))


def _waves(rng: np.random.Generator, phase: NDArray, duration_s: float, low_hz: float,
           high_hz: float) -> NDArray[np.float64]:
    """A smooth periodic signal [N] of about -1..1 with frequencies in low_hz..high_hz.

    Its period is the whole walk, so it ends as it began.
    """
    cycles = np.unique(np.round(np.linspace(low_hz, high_hz, 5) * duration_s).clip(1))
    amplitudes = rng.uniform(0.3, 1, len(cycles)) * np.minimum(1, high_hz * duration_s / cycles)
    angles = 2 * np.pi * cycles[:, None] * phase + rng.uniform(0, 2 * np.pi, (len(cycles), 1))
    return np.einsum('k,kn->n', amplitudes / amplitudes.sum(), np.sin(angles)) * \
        min(1.0, high_hz * duration_s)


def _loop(room: FreeSpace, rng: np.random.Generator, phase: NDArray, duration_s: float) -> NDArray:
    """Floor positions [N, 2] on laps around a free place, at about ``SPEED_M_S``."""
    centre, outline = _free_star(room, rng)
    # Laps differ: each drifts between a smaller and a wider circle.
    swell = 0.85 + 0.15 * _waves(rng, phase, duration_s, 0.02, 0.06)
    lap_m = _length(outline) * 0.85
    wanted_m = SPEED_M_S * duration_s
    laps = max(1, round(wanted_m / lap_m))
    scale = min(1.0, wanted_m / (laps * lap_m))
    turn = rng.choice([-1, 1]) * 2 * np.pi * (laps * phase + rng.uniform())
    angles = np.linspace(0, 2 * np.pi, len(outline), endpoint=False)
    radii = np.interp(turn, angles, np.linalg.norm(outline, axis=1), period=2 * np.pi)
    offsets = (radii * swell)[:, None] * np.stack([np.cos(turn), np.sin(turn)], -1)
    return centre + scale * _even_speed(offsets)


def _even_speed(points: NDArray) -> NDArray:
    """The closed path [N, 2] again, at constant speed along it."""
    closed = np.concatenate([points, points[:1]])
    travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    even = np.linspace(0, travelled[-1], len(points), endpoint=False)
    return np.stack([np.interp(even, travelled, closed[:, i]) for i in range(2)], -1)


def _length(closed: NDArray) -> float:
    return float(np.linalg.norm(np.diff(closed, axis=0, append=closed[:1]), axis=1).sum())


def _free_star(room: FreeSpace, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """A place [2] and, around it, a smooth outline [180, 2] (offsets) of the free space."""
    places = rng.uniform(-0.3, 0.3, (64, 2)) * room.size[:2]
    centre = places[np.argmax(_free(room, places))]
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)], -1)
    steps = np.arange(0.04, 3.0, 0.04)
    points = centre + steps[:, None, None] * directions
    free = _free(room, points.reshape(-1, 2)).reshape(len(steps), -1) > MARGIN_M
    reach = steps[np.argmin(np.concatenate([free, np.zeros((1, 180), bool)]), 0).clip(1) - 1]
    wish = rng.uniform(1.0, 1.8) * (1 + 0.3 * np.sin(2 * angles + rng.uniform(0, 2 * np.pi)))
    reach = np.minimum(reach, wish)
    # The smallest of the neighbourhood first, so that smoothing never leaves the free space.
    radius = gaussian_filter1d(minimum_filter1d(reach, 41, mode='wrap'), 8, mode='wrap',
                               truncate=2.5)
    return centre, radius[:, None] * directions


def _free(room: FreeSpace, places: NDArray) -> NDArray:
    """Distance [N] to the nearest surface from floor places [N, 2], over all camera heights."""
    heights = np.linspace(*HEIGHTS_M, 5)
    points = [np.column_stack([places, np.full(len(places), z)]) for z in heights]
    return np.min([room.clearance(p) for p in points], axis=0)


def _yaw(room: FreeSpace, rng: np.random.Generator, positions: NDArray, phase: NDArray,
         laps_turned: int, duration_s: float) -> NDArray[np.float64]:
    """Headings [N] that turn slowly; of several tries, the one that looks farthest."""
    best, best_score = np.zeros(len(phase)), -np.inf
    for _ in range(12):
        sweep = np.deg2rad(30) * _waves(rng, phase, duration_s, 0.04, 0.12)
        turns = rng.choice([-1, 1]) * laps_turned * 2 * np.pi * phase
        yaw = rng.uniform(0, 2 * np.pi) + turns + sweep
        sample = slice(None, None, max(1, len(phase) // 40))
        ahead = np.stack([np.cos(yaw), np.sin(yaw), 0 * yaw], -1)[sample]
        score = float(np.percentile(_distance(room, positions[sample], ahead), 15))
        if score > best_score:
            best, best_score = yaw, score
    return best


def _distance(room: FreeSpace, origins: NDArray, directions: NDArray) -> NDArray[np.float64]:
    """Distance [N] along unit directions [N, 3] to a box or wall."""
    half = np.array([room.size[0] / 2, room.size[1] / 2])
    flat = np.where(np.abs(directions[:, :2]) < 1e-9, 1e-9, directions[:, :2])
    walls = ((np.sign(flat) * half - origins[:, :2]) / flat).min(1)
    return np.minimum(walls, first_hit(origins, directions, room.boxes))


def held_out_views(room: FreeSpace, trajectory: list[NDArray[np.float64]], n: int, seed: int
                   ) -> list[NDArray[np.float64]]:
    """``n`` poses 5-20 cm and 3-10 degrees off random poses of a walk, in free space.

    Raises InputError when the walk is not inside this room's free space.
    """
    rng = np.random.default_rng((room.seed, seed, 1))
    found: list[NDArray[np.float64]] = []
    for _ in range(100 * n):
        if len(found) == n:
            break
        base = trajectory[int(rng.integers(len(trajectory)))]
        place = base[:3, 3] + rng.uniform(0.05, 0.2) * _direction(rng)
        if room.clearance(place[None])[0] > HELD_OUT_MARGIN_M:
            turn = so3_exp(np.deg2rad(rng.uniform(3, 10)) * _direction(rng))
            found.append(make_transform(base[:3, :3] @ turn, place))
    if len(found) < n:
        raise InputError(
            f'expected a walk through the free space of room {room.seed}, found no place beside '
            'it that is free; pass poses of Room.walk of the same room')
    return found


def _direction(rng: np.random.Generator) -> NDArray[np.float64]:
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)
