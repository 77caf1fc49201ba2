"""Localisation with a feed-forward network: one joint write, a similarity, then queries.

    keyframes that span the walk -> predict, writing -> fast weights of bounded size
           their cameras against those of the map -> similarity from the network's world
           other images of the walk, as queries -> how far answers are off: the covariance

The network stays behind the protocol ``SceneNetwork`` and its state is a value, so nothing
here depends on which network it is.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from feedforward_recon.errors import DegenerateError, MapError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import spanning_poses
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.localization.network_link import (
    MIN_CAMERAS,
    STILL,
    NetworkLink,
    align_cameras,
    depth_agreement,
    depth_scale,
    known_pose,
    rms_error,
)
from feedforward_recon.types import Estimate, FloatArray, Frame, Prediction, Status

log = logging.getLogger(__name__)
# Written together at most, farthest first (docs/decisions.md, The network's own memory); chosen by
# hand.
KEYFRAMES = 64
CHECKED = 16  # other images queried for the covariance; each costs a pass; chosen by hand
MIN_LANDMARKS = 20  # in view, to judge an answer by: as tracking.min_inliers
# Share of the agreement that images of the walk itself reach; chosen by hand.
MIN_DEPTH_AGREEMENT = 0.5
MAX_NOVELTY = 2.0  # cosine distance of opposite vectors: nothing is newer
# Times the largest novelty of images of the walk: more is another place (docs/experiments.md,
# Localising with the network's own memory).
NOVELTY_FACTOR = 2.0


class SceneNetwork(Protocol):
    """A network that writes a scene into a state, and answers queries without changing it."""

    def write(self, images: Sequence[NDArray[np.uint8]], K: NDArray[np.float64] | None = None
              ) -> tuple[Prediction, Any]:
        """What images show together, and the state after writing them, of bounded size.

        K: [3, 3] of their camera, None where it is not known. Cameras and depth are those that
        queries of the same images would get, or better known ones in the same world and unit.
        Raises InputError for images that cannot be used, MemoryError when they are too many
        for the device.
        """
        ...

    def query(self, image: NDArray[np.uint8], state: Any, K: NDArray[np.float64] | None = None
              ) -> tuple[Prediction, float]:
        """What one image, of a camera K, shows in the world of a state, and how novel it is there.

        Novelty is about 0 for an image that was written, at most 2; only ratios mean something.
        Raises InputError for an image that cannot be used.
        """
        ...


@dataclass(frozen=True)
class SavedFastWeights:
    """Fast weights that a network wrote for a map, with all that is needed to query them.

    model, attention, weights, sha256: the network; weights is a name, '' for a file.
    tensors: its state, on the CPU. precision: how the network kept its weights, full or fp8.
    """

    model: str
    attention: str
    weights: str
    sha256: str
    link: NetworkLink
    tensors: dict[str, torch.Tensor]
    precision: str = 'full'

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def save(self, path: Path) -> None:
        """Write one file; the tensors are those of the network, the rest is its metadata."""
        names = ('model', 'attention', 'weights', 'sha256', 'precision')
        metadata = {name: str(getattr(self, name)) for name in names}
        save_file(self.tensors, path, {**metadata, 'link': json.dumps(asdict(self.link))})

    @staticmethod
    def load(path: Path) -> SavedFastWeights:
        """What ``save`` wrote.

        Raises MapError for a file that holds something else.
        """
        try:
            with safe_open(str(path), 'pt') as file:
                metadata = dict(file.metadata() or {})
                link = json.loads(metadata.pop('link'))
                link['T_map_net'] = tuple(map(tuple, link['T_map_net']))
                known = {field.name for field in fields(NetworkLink)}
                return SavedFastWeights(
                    **metadata, link=NetworkLink(**{k: link[k] for k in known}),
                    tensors={key: file.get_tensor(key) for key in file.keys()})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise MapError(f'{path}: expected the fast weights of a network, found another file '
                           f'({type(error).__name__}: {error}); map again') from error


# -- writing -------------------------------------------------------------------------------


def write_keyframes(network: SceneNetwork, walk: Sequence[Frame], others: Sequence[Frame],
                    points: FloatArray, unit: float) -> tuple[Any, NetworkLink]:
    """Write keyframes together into one state, and find out where its world lies in the map.

    walk, others: frames whose T_map_cam is known; ``others`` are only queried. points: the
    landmarks of the map [V, 3]. unit: its typical depth.

    Raises DegenerateError when the cameras of the walk do not determine a similarity,
    MemoryError when the device has no room for ``MIN_CAMERAS`` images.
    """
    poses = np.stack([known_pose(frame) for frame in walk])
    written, prediction, state = _written(network, walk, spanning_poses(poses, KEYFRAMES, unit))
    seen = [walk[index] for index in written]
    queried = _evenly(others or seen, CHECKED)
    answers = [network.query(frame.image, state, intrinsics_of(frame)) for frame in queried]
    links = [_checked(link, answers, queried, points)
             for link in _links(prediction, seen, points, unit)]
    best = min(links, key=lambda link: (not link.recognised, link.position))
    if not others:  # what was written is never novel, so any image may be of this place
        best = replace(best, novelty=MAX_NOVELTY)
    log.info('the network holds %d keyframes; scale from %s; %d other images %.3f units and '
             '%.1f degrees off', best.keyframes, best.scale_source, best.checked, best.position,
             np.rad2deg(best.angle))
    return state, best


def _links(prediction: Prediction, walk: Sequence[Frame], points: FloatArray, unit: float
           ) -> list[NetworkLink]:
    """The similarity with the scale that fits the cameras, and with the one of the depth.

    The former is exact for a network that knows how it moves and undetermined for a camera that
    stays in place; the latter is always there, and no better than the depth.
    Raises DegenerateError when neither is determined.
    """
    poses, links = np.stack([known_pose(frame) for frame in walk]), []
    scales = {'cameras': None, 'depth': depth_scale(prediction, walk, points)}
    for source, scale in scales.items():
        try:
            T, scale = align_cameras(prediction.T_world_cam, poses, scale)
        except DegenerateError as problem:
            log.info('no scale of the network from %s: %s', source, problem)
            continue
        link = NetworkLink(tuple(map(tuple, T.tolist())), scale, source, len(walk), unit)
        position, angle = rms_error(link.pose(prediction.T_world_cam), poses)
        links.append(replace(link, fit_position=position, fit_angle=angle))
    if not links:
        raise DegenerateError(STILL)
    return links


def _written(network: SceneNetwork, walk: Sequence[Frame], order: np.ndarray
             ) -> tuple[np.ndarray, Prediction, Any]:
    """Predict as many frames together as the device has room for, in the order of the walk."""
    while True:
        chosen = np.sort(order)
        try:
            prediction, state = network.write([walk[i].image for i in chosen],
                                              intrinsics_of(walk[chosen[0]]))
            return chosen, prediction, state
        except MemoryError:
            if len(order) // 2 < MIN_CAMERAS:
                raise
        log.warning('out of memory: the network holds %d keyframes instead of %d',
                    len(order) // 2, len(order))
        order = order[:len(order) // 2]


def _checked(link: NetworkLink, answers: Sequence[tuple[Prediction, float]],
             frames: Sequence[Frame], points: FloatArray) -> NetworkLink:
    """The link with the errors of answers to images whose poses are known."""
    found = link.pose(np.concatenate([answer.T_world_cam for answer, _ in answers]))
    position, angle = rms_error(found, np.stack([known_pose(frame) for frame in frames]))
    shares = [depth_agreement(answer, link, frame.camera, points)[0]
              for (answer, _), frame in zip(answers, frames, strict=True)]
    return replace(link, checked=len(frames), position=position, angle=angle,
                   agreement=float(np.median(shares)),
                   novelty=max(novelty for _, novelty in answers))


def intrinsics_of(frame: Frame) -> NDArray[np.float64] | None:
    """K [3, 3] of the camera of a frame, None where it is not known."""
    return None if frame.camera is None else frame.camera.K


def _evenly(frames: Sequence[Frame], count: int) -> list[Frame]:
    index = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    return [frames[i] for i in index]


# -- reading -------------------------------------------------------------------------------


class NetworkLocalizer:
    """Finds images with a network and its fast weights. Keeps nothing between calls.

    refiner: decides: it finds the pose among the map's landmarks, with an accepted answer of the
    network as a hint.
    """

    def __init__(self, network: SceneNetwork, state: Any, link: NetworkLink, points: FloatArray,
                 refiner: Localizer | None = None) -> None:
        self.network, self.state, self.link = network, state, link
        self.points, self.refiner = points, refiner

    def localize(self, frame: Frame) -> Estimate:
        """Pose of a frame in the map, or NOT_LOCALISED with the reason.

        Without a refiner a pose is UNCERTAIN at best. Raises InputError for an image that
        cannot be used.
        """
        started = time.perf_counter()
        prediction, novelty = self.network.query(frame.image, self.state,
                                                 intrinsics_of(frame))
        answer = self._judged(prediction, novelty, frame)
        if self.refiner is not None:
            camera = self._camera(frame, prediction)
            answer = self.refiner.localize(replace(frame, camera=camera), answer.T_map_cam)
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

    def _judged(self, prediction: Prediction, novelty: float, frame: Frame) -> Estimate:
        """The pose of the network, UNCERTAIN, or NOT_LOCALISED with the reason."""
        share, seen = depth_agreement(prediction, self.link, frame.camera, self.points)
        answer = Estimate(0, Status.NOT_LOCALISED, score=share)
        if not self.link.recognised:
            return replace(answer, reason='MAP_NOT_RECOGNISED')
        if novelty > NOVELTY_FACTOR * self.link.novelty:
            return replace(answer, reason='UNKNOWN_PLACE')
        if seen < MIN_LANDMARKS:
            return replace(answer, reason='NO_LANDMARKS_IN_VIEW')
        if share < MIN_DEPTH_AGREEMENT * self.link.agreement:
            return replace(answer, reason='DEPTH_DISAGREES')
        return replace(answer, status=Status.UNCERTAIN, covariance=self.link.covariance,
                       T_map_cam=self.link.pose(prediction.T_world_cam[0]))
