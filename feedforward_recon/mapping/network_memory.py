"""A map remembered by the network itself: one joint write, a similarity, and honest queries.

    keyframes that span the walk -> predict, writing -> memory of bounded size
           their cameras against those of the map -> similarity from the network's world
           other images of the walk, as queries -> how far answers are off: the covariance

The network stays behind the ``Predictor`` protocol and its memory stays a value, so nothing here
depends on which network it is.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from feedforward_recon.errors import DegenerateError, MapError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    pose_error,
    rotation_angle_rad,
    transform_points,
)
from feedforward_recon.mapping.localizer import Localizer
from feedforward_recon.model import Predictor
from feedforward_recon.types import Estimate, FloatArray, Frame, Prediction, Status

log = logging.getLogger(__name__)
KEYFRAMES = 64  # written together at most
CHECKED = 16  # other images that are asked for afterwards
MIN_KEYFRAMES = 3
MIN_LANDMARKS = 20  # in view, to judge an answer by
SAME_DEPTH = 0.2  # a landmark is confirmed by a depth that differs by less than this share
SURE_SHARE = 0.5  # of the agreement that images of the walk itself reach
ITERATIONS = 20
MAD_TO_STD = 1.4826
STILL = ('expected cameras that move alike in the map and in the world of the network, found '
         'none; use a walk that moves, or other weights')


@dataclass(frozen=True)
class NetworkLink:
    """How the world of a network's memory lies in a map: x_map = T_map_net (scale * x_net).

    T_map_net: rows of the 4x4 matrix. keyframes: images written. fit_position, fit_angle: rms of
    what the cameras of the keyframes differ by after the fit (map units, radians).
    checked: images asked for afterwards; position, angle: rms error of their answers;
    agreement: median share of the landmarks in their view that their depth confirmed.
    extent: rms distance of the keyframes from their centre, map units.
    """

    T_map_net: tuple[tuple[float, ...], ...]
    scale: float
    keyframes: int
    fit_position: float
    fit_angle: float
    checked: int
    position: float
    angle: float
    agreement: float
    extent: float

    def pose(self, T_net_cam: FloatArray) -> FloatArray:
        """Poses [..., 4, 4] of the network's world in the map."""
        moved = np.array(T_net_cam, float)
        moved[..., :3, 3] *= self.scale
        return np.array(self.T_map_net) @ moved

    @property
    def covariance(self) -> FloatArray:
        """Of an answer [6, 6], as images of the walk were answered."""
        return np.diag(np.repeat((self.position**2 / 3, self.angle**2 / 3), 3))

    @property
    def recognised(self) -> bool:
        """False when the answers say no more than `somewhere in the map`."""
        return self.position < self.extent and self.angle < 1.0


@dataclass(frozen=True)
class NetworkMemory:
    """What a network remembers of a map, with all that is needed to ask it again.

    model, attention, weights, sha256: the network; weights is a name, '' for a file.
    tensors: the memory, on the CPU.
    """

    model: str
    attention: str
    weights: str
    sha256: str
    link: NetworkLink
    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def save(self, path: Path) -> None:
        """Write one file; the tensors are those of the network, the rest is its metadata."""
        names = ('model', 'attention', 'weights', 'sha256')
        metadata = {name: str(getattr(self, name)) for name in names}
        save_file(self.tensors, path, {**metadata, 'link': json.dumps(asdict(self.link))})

    @staticmethod
    def load(path: Path) -> NetworkMemory:
        """The memory that ``save`` wrote.

        Raises MapError for a file that holds something else.
        """
        try:
            with safe_open(str(path), 'pt') as file:
                metadata = dict(file.metadata() or {})
                link = json.loads(metadata.pop('link'))
                link['T_map_net'] = tuple(map(tuple, link['T_map_net']))
                known = {field.name for field in fields(NetworkLink)}
                return NetworkMemory(
                    **metadata, link=NetworkLink(**{k: link[k] for k in known}),
                    tensors={key: file.get_tensor(key) for key in file.keys()})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise MapError(f'{path}: expected the memory of a network, found another file '
                           f'({type(error).__name__}: {error}); map again') from error


# -- writing -------------------------------------------------------------------------------


def spanning(T_map_cam: FloatArray, count: int, unit: float) -> np.ndarray:
    """At most ``count`` of N poses, each in turn the one farthest from those before it.

    unit: distance (map units) that counts like one radian; the typical depth. The first pose is
    always the first, and the choice of fewer is the beginning of the choice of more.
    """
    centres, axes = T_map_cam[:, :3, 3], T_map_cam[:, :3, :3]
    chosen, nearest = [0], np.full(len(T_map_cam), np.inf)
    while len(chosen) < min(count, len(T_map_cam)):
        last = chosen[-1]
        turned = rotation_angle_rad(np.swapaxes(axes[last], -1, -2) @ axes)
        moved = np.linalg.norm(centres - centres[last], axis=1) / unit
        nearest = np.minimum(nearest, np.hypot(moved, turned))
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return np.array(chosen)


def remember(predictor: Predictor, walk: Sequence[Frame], others: Sequence[Frame],
             points: FloatArray, unit: float,
             bounded: Callable[[Any], Any]) -> tuple[Any, NetworkLink]:
    """Write keyframes into one memory together, and find out where its world lies.

    walk, others: frames whose T_map_cam is known; ``others`` are asked for only. points: the
    landmarks of the map [V, 3]. unit: its typical depth. bounded: makes a memory small.

    Raises DegenerateError when the cameras of the walk do not determine a similarity,
    MemoryError when the device has no room for ``MIN_KEYFRAMES`` images.
    """
    poses = np.stack([_pose(frame) for frame in walk])
    order = spanning(poses, KEYFRAMES, unit)
    written, prediction, memory = _written(predictor, walk, order)
    memory = bounded(memory)
    T_map_net, scale = align_cameras(prediction.T_world_cam, poses[written])
    centres = poses[written, :3, 3]
    link = NetworkLink(tuple(map(tuple, T_map_net.tolist())), scale, len(written), 0, 0, 0, 0, 0,
                       1, float(np.sqrt(np.mean((centres - centres.mean(0))**2) * 3)))
    fit = _rms(link.pose(prediction.T_world_cam), poses[written])
    link = replace(link, fit_position=fit[0], fit_angle=fit[1])
    asked = others or [walk[index] for index in written]
    return memory, _checked(predictor, memory, link, _evenly(asked, CHECKED), points)


def _written(predictor: Predictor, walk: Sequence[Frame], order: np.ndarray
             ) -> tuple[np.ndarray, Prediction, Any]:
    """Predict as many frames together as the device has room for, in the order of the walk."""
    while True:
        chosen = np.sort(order)
        try:
            prediction, memory = predictor.predict([walk[i].image for i in chosen])
            return chosen, prediction, memory
        except MemoryError:
            if len(order) // 2 < MIN_KEYFRAMES:
                raise
        log.warning('out of memory: the network remembers %d keyframes instead of %d',
                    len(order) // 2, len(order))
        order = order[:len(order) // 2]


def _checked(predictor: Predictor, memory: Any, link: NetworkLink, frames: Sequence[Frame],
             points: FloatArray) -> NetworkLink:
    """The link with the errors of answers to images whose poses are known."""
    found, shares = [], []
    for frame in frames:
        prediction, _ = predictor.predict([frame.image], memory, write=False)
        found.append(link.pose(prediction.T_world_cam[0]))
        shares.append(depth_agreement(prediction, link, frame.camera, points)[0])
    rms = _rms(np.stack(found), np.stack([_pose(frame) for frame in frames]))
    return replace(link, checked=len(frames), position=rms[0], angle=rms[1],
                   agreement=float(np.median(shares)))


def align_cameras(T_net_cam: FloatArray, T_map_cam: FloatArray) -> tuple[FloatArray, float]:
    """The similarity (T_map_net, scale) between N cameras in two worlds, whatever a few say.

    The rotation comes from the orientations, so a straight walk determines it too; scale and
    origin from the centres. Cauchy weights on both (see ``geometry.align``).
    Raises DegenerateError for fewer than ``MIN_KEYFRAMES`` cameras, or when they stay in place.
    """
    if len(T_net_cam) < MIN_KEYFRAMES:
        raise DegenerateError(f'expected at least {MIN_KEYFRAMES} cameras, found '
                              f'{len(T_net_cam)}; map a longer walk')
    T, scale = _start(T_net_cam, T_map_cam)
    for _ in range(ITERATIONS):
        moved = T_net_cam.copy()
        moved[:, :3, 3] *= scale
        apart, turned = pose_error(T @ moved, T_map_cam)
        weight = 1 / (1 + _squared(apart) + _squared(turned))
        T, scale = _fit(T_net_cam, T_map_cam, weight / weight.sum())
    return T, scale


def _start(T_net_cam: FloatArray, T_map_cam: FloatArray) -> tuple[FloatArray, float]:
    """Medians: of the ratios of the longer distances between cameras, and of their offsets."""
    i, j = np.triu_indices(len(T_net_cam), 1)
    net, target = (np.linalg.norm(T[i, :3, 3] - T[j, :3, 3], axis=1)
                   for T in (T_net_cam, T_map_cam))
    far = (target >= np.median(target)) & (net > 0)
    if not far.any() or not target[far].all():
        raise DegenerateError(STILL)
    scale = float(np.median(target[far] / net[far]))
    R = _rotation(T_net_cam, T_map_cam, np.ones(len(T_net_cam)))
    offsets = T_map_cam[:, :3, 3] - scale * T_net_cam[:, :3, 3] @ R.T
    return make_transform(R, np.median(offsets, 0)), scale


def _fit(T_net_cam: FloatArray, T_map_cam: FloatArray, share: np.ndarray
         ) -> tuple[FloatArray, float]:
    R = _rotation(T_net_cam, T_map_cam, share)
    source, target = T_net_cam[:, :3, 3] @ R.T, T_map_cam[:, :3, 3]
    mean_source, mean_target = share @ source, share @ target
    source, target = source - mean_source, target - mean_target
    along = float(share @ np.sum(source * target, 1))
    if along <= 0:
        raise DegenerateError(STILL)
    scale = along / float(share @ np.sum(source**2, 1))
    return make_transform(R, mean_target - scale * mean_source), scale


def _rotation(T_net_cam: FloatArray, T_map_cam: FloatArray, share: np.ndarray) -> np.ndarray:
    """The weighted mean of the rotations between orientations (chordal)."""
    turns = T_map_cam[:, :3, :3] @ np.swapaxes(T_net_cam[:, :3, :3], -1, -2)
    U, _, Vt = np.linalg.svd(np.einsum('n,nij->ij', share, turns))
    return U @ np.diag((1, 1, np.sign(np.linalg.det(U @ Vt)))) @ Vt


def _squared(errors: np.ndarray) -> np.ndarray:
    """Squares of errors as multiples of their typical size."""
    typical = MAD_TO_STD * float(np.median(errors))
    return (errors / max(typical, 1e-6))**2


def _rms(T: FloatArray, T_true: FloatArray) -> tuple[float, float]:
    distance, degrees = pose_error(T, T_true)
    return (float(np.sqrt(np.mean(distance**2))),
            float(np.deg2rad(np.sqrt(np.mean(degrees**2)))))


def _pose(frame: Frame) -> FloatArray:
    if frame.T_map_cam is None:
        raise ValueError(f'expected a frame with a pose, found {frame.source} without')
    return frame.T_map_cam


def _evenly(frames: Sequence[Frame], count: int) -> list[Frame]:
    index = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    return [frames[i] for i in index]


# -- reading -------------------------------------------------------------------------------


def depth_agreement(prediction: Prediction, link: NetworkLink, camera: Camera | None,
                    points: FloatArray) -> tuple[float, int]:
    """Share of the map's landmarks in view whose depth the network confirms, and their number.

    The landmarks were measured without the network's camera head, and the depth head does not
    know the pose: both agree only where the pose is right.
    """
    height, width = prediction.depth.shape[1:]
    camera = camera or Camera.from_matrix(prediction.K[0], (width, height))
    T = link.pose(prediction.T_world_cam[0])
    in_cam = transform_points(inverse(T), points)
    pixels = np.rint(camera.project(in_cam))
    with np.errstate(invalid='ignore'):
        inside = (pixels >= 0).all(1) & (pixels < (width, height)).all(1) & (in_cam[:, 2] > 0)
    u, v = pixels[inside].astype(int).T
    depth = link.scale * prediction.depth[0, v, u]
    ratio = in_cam[inside, 2][depth > 0] / depth[depth > 0]
    confirmed = np.abs(ratio - 1) < SAME_DEPTH
    return float(confirmed.mean()) if len(ratio) else 0.0, len(ratio)


class NetworkLocalizer:
    """Finds images with a network that remembers the map. Keeps no state between calls.

    refiner: finds the pose exactly among the map's landmarks, with the network's as a hint.
    """

    def __init__(self, predictor: Predictor, memory: Any, link: NetworkLink, points: FloatArray,
                 refiner: Localizer | None = None) -> None:
        self.predictor, self.memory, self.link = predictor, memory, link
        self.points, self.refiner = points, refiner

    def localize(self, frame: Frame) -> Estimate:
        """Pose of a frame in the map, or NOT_LOCALISED with the reason.

        A pose that no landmarks have refined is UNCERTAIN. Raises InputError for an image that
        cannot be used.
        """
        started = time.perf_counter()
        prediction, _ = self.predictor.predict([frame.image], self.memory, write=False)
        answer = self._judged(prediction, frame)
        if self.refiner is not None:
            camera = self._camera(frame, prediction)
            refined = self.refiner.localize(replace(frame, camera=camera), answer.T_map_cam)
            answer = refined if refined.T_map_cam is not None else answer
        return replace(answer, stamp_ns=frame.stamp_ns, source=frame.source,
                       latency_ms=1e3 * (time.perf_counter() - started))

    def _camera(self, frame: Frame, prediction: Prediction) -> Camera:
        """That of the frame, of the map if it took images of that size, or as predicted."""
        size_wh = (frame.image.shape[1], frame.image.shape[0])
        if frame.camera is not None:
            return frame.camera
        known = None if self.refiner is None else self.refiner.camera
        if known is not None and known.size_wh == size_wh:
            return known
        return Camera.from_matrix(prediction.K[0], size_wh)

    def _judged(self, prediction: Prediction, frame: Frame) -> Estimate:
        """The network's answer, or why it is not to be trusted."""
        share, seen = depth_agreement(prediction, self.link, frame.camera, self.points)
        answer = Estimate(0, Status.NOT_LOCALISED, score=share)
        if not self.link.recognised:
            return replace(answer, reason='MAP_NOT_RECOGNISED')
        if seen < MIN_LANDMARKS:
            return replace(answer, reason='NO_LANDMARKS_IN_VIEW')
        if share < SURE_SHARE * self.link.agreement:
            return replace(answer, reason='DEPTH_DISAGREES')
        return replace(answer, status=Status.UNCERTAIN, covariance=self.link.covariance,
                       T_map_cam=self.link.pose(prediction.T_world_cam[0]))
