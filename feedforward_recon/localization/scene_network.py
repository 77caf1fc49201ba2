"""``NetworkMemory``: fast weights of a network, written from a finished map and asked later.

memory = NetworkMemory(load_predictor('vgg-t3'), 'vgg-t3')
saved = memory.write(scene, frames, points)
localizer = memory.localizer(saved, points)
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.errors import DegenerateError, InputError, MapError
from feedforward_recon.geometry.transforms import spanning_poses
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.localization.network_localizer import (
    KEYFRAMES,
    NetworkLocalizer,
    SavedFastWeights,
    write_keyframes,
)
from feedforward_recon.mapping.scene_map import SceneMap
from feedforward_recon.model.attention.registry import ATTENTION
from feedforward_recon.model.configs import ALIASES, Network
from feedforward_recon.model.fp8 import precision_of
from feedforward_recon.model.network_state import NetworkState
from feedforward_recon.model.predictor import NetworkPredictor, load_predictor
from feedforward_recon.model.ray_transformer import RayTransformer
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.model.weights.checkpoints import file_sha256
from feedforward_recon.model.weights.registry import find_weights, is_path
from feedforward_recon.types import FloatArray, Frame, Keyframe, Prediction

log = logging.getLogger(__name__)
# Kept of all keyframes, so that the state has a fixed size: with so many, answers move by at most
# 6 cm and 2 degrees (docs/experiments.md, Which camera tokens to keep).
CAMERA_TOKENS = 32


class VggtSceneNetwork:
    """A network of VGGT's kind as a ``SceneNetwork``; turn: held while it is at work."""

    def __init__(self, predictor: NetworkPredictor,
                 turn: AbstractContextManager[Any] | None = None) -> None:
        """Raises MapError for a network without camera tokens."""
        if not isinstance(predictor.network, Vggt):
            raise MapError(unsupported_reason(predictor.network))
        self.predictor, self.network = predictor, predictor.network
        self._turn = nullcontext() if turn is None else turn

    def write(self, images: Sequence[NDArray[np.uint8]], K: NDArray[np.float64] | None = None
              ) -> tuple[Prediction, NetworkState]:
        """One joint pass over all images; few camera tokens are kept. K is not used."""
        del K
        with self._turn:
            prediction, state = self.predictor.predict(images)
        return prediction, state.with_few_camera_tokens(CAMERA_TOKENS)

    def query(self, image: NDArray[np.uint8], state: NetworkState,
              K: NDArray[np.float64] | None = None) -> tuple[Prediction, float]:
        """The pass without writing. Novelty: cosine distance to the nearest camera token kept."""
        del K
        tokens = []
        with self._turn:
            hook = self.network.camera_head.register_forward_pre_hook(
                lambda _, given: tokens.append(given[0][0]))
            try:
                prediction, _ = self.predictor.predict([image], state, write=False)
            finally:
                hook.remove()
        *stored, query = tokens[0]
        return prediction, novelty(torch.stack(stored), query)

    def state_from(self, tensors: Mapping[str, torch.Tensor]) -> NetworkState:
        """The state of these tensors on the device of the network."""
        device = self.predictor.device
        return self.network.state_from({key: t.to(device) for key, t in tensors.items()})


class RaySceneNetwork:
    """A network of the kind of `tiny` as a ``SceneNetwork``; turn: held while it is at work.

    What a query shows follows from its world points. So do the cameras of what is written, since
    those from matches may be in another unit: with a state, even an empty one, nothing is matched.
    """

    def __init__(self, predictor: NetworkPredictor, network: RayTransformer,
                 turn: AbstractContextManager[Any] | None = None) -> None:
        self.predictor, self.network = predictor, network
        self._turn = nullcontext() if turn is None else turn

    def write(self, images: Sequence[NDArray[np.uint8]], K: NDArray[np.float64] | None = None
              ) -> tuple[Prediction, NetworkState]:
        """One joint pass over all images; few tokens of views are kept."""
        with self._turn:
            prediction, state = self.predictor.predict(images, self.network.empty_state(), K=K)
        return prediction, state.with_few_camera_tokens(CAMERA_TOKENS)

    def query(self, image: NDArray[np.uint8], state: NetworkState,
              K: NDArray[np.float64] | None = None) -> tuple[Prediction, float]:
        """The pass without writing. Novelty: cosine distance to the nearest view token kept."""
        tokens = []
        with self._turn:
            hook = self.network.global_blocks[-1].register_forward_hook(
                lambda _, given, said: tokens.append(said[0][0, 0].float()))
            try:
                prediction, _ = self.predictor.predict([image], state, write=False, K=K)
            finally:
                hook.remove()
        return prediction, novelty(state.camera_tokens[0], tokens[0])

    def state_from(self, tensors: Mapping[str, torch.Tensor]) -> NetworkState:
        """The state of these tensors on the device of the network."""
        device = self.predictor.device
        return self.network.state_from({key: t.to(device) for key, t in tensors.items()})


def novelty(kept: torch.Tensor, token: torch.Tensor) -> float:
    """Cosine distance of a token [C] to the nearest of those kept [S, C]."""
    return float(1 - torch.cosine_similarity(kept, token, dim=-1).max())


def unsupported_reason(network: Network) -> str:
    """Why a network cannot write a state of a fixed size, in a sentence; '' when it can."""
    if not isinstance(network, (Vggt, RayTransformer)):
        return (f'{type(network).__name__} has no cameras in its state: only the landmarks of '
                'this map can be localised against')
    if not ATTENTION[network.config.attention].fixed_size:
        return (f'the state of {network.config.attention} attention grows with every image and '
                'is not kept: use --attention ttt or hybrid to localise with the network')
    return ''


class NetworkMemory:
    """The own memory of one network.

    model, weights: as `load_predictor` was given them. turn: held while the network is at work,
    where others use it too.
    """

    def __init__(self, predictor: NetworkPredictor, model: str, weights: str = '',
                 turn: AbstractContextManager[Any] | None = None) -> None:
        self._predictor, self._turn = predictor, turn
        self._model = ALIASES.get(model, model)
        self._name = weights or self._model

    @property
    def unsupported(self) -> str:
        """Why the network cannot write a state of a fixed size, in a sentence; '' if it can."""
        return unsupported_reason(self._predictor.network)

    def write(self, scene: SceneMap, frames: Iterable[Frame], points: FloatArray,
              kept: Collection[int] | None = None) -> SavedFastWeights | None:
        """One joint write over keyframes of a finished map; None, and a warning, when it fails.

        frames: those of the walk, once more. points: landmarks of the map [V, 3]. kept: stamps of
        the frames, where there are not all of the walk any more.
        """
        if self.unsupported or not scene.keyframes:
            return None
        unit = _typical_depth(scene.keyframes)
        try:
            keyframes, others = _frames_of(scene, frames, unit, kept)
            state, link = write_keyframes(self._scene_network(), keyframes, others, points, unit)
        except (DegenerateError, InputError, MemoryError) as problem:
            log.warning('the map goes without fast weights of the network: %s', problem)
            return None
        if not link.recognised:
            log.warning('the network does not find images of this walk again (%.2f units and '
                        '%.0f degrees off, its depth confirms %.0f %% of the landmarks): it will '
                        'refuse queries', link.position, np.rad2deg(link.angle),
                        100 * link.agreement)
        name = '' if is_path(self._name) else self._name
        tensors = {key: t.detach().cpu().contiguous() for key, t in state.tensors().items()}
        return SavedFastWeights(self._model, self._attention, name, self._sha256, link, tensors,
                                self._precision)

    def localizer(self, saved: SavedFastWeights, points: FloatArray,
                  refiner: Localizer | None = None) -> NetworkLocalizer:
        """What asks this network about images; see ``NetworkLocalizer``.

        Raises MapError for fast weights that another network wrote.
        """
        _check_model(saved, self._model)
        if self._sha256 != saved.sha256:
            raise MapError(f'expected weights of {saved.model} with SHA-256 {saved.sha256[:12]}, '
                           f'which wrote those of this map, found {self._sha256[:12]} in '
                           f'{find_weights(self._name)}; give those as weights, or map again')
        if self._attention != saved.attention:
            raise MapError(f'expected {saved.attention} attention, which wrote the fast weights '
                           f'of this map, found {self._attention}; choose that, or map again')
        if self._precision != saved.precision:
            raise MapError(f'expected the network in precision {saved.precision}, which wrote the '
                           f'fast weights of this map, found {self._precision}; choose that, or '
                           'map again')
        network = self._scene_network()
        return NetworkLocalizer(network, network.state_from(saved.tensors), saved.link, points,
                                refiner)

    @cached_property
    def _sha256(self) -> str:
        """Of the weights; reading gigabytes once is enough."""
        return file_sha256(find_weights(self._name))

    @property
    def _attention(self) -> str:
        return self._predictor.network.config.attention

    @property
    def _precision(self) -> str:
        return precision_of(self._predictor.network)

    def _scene_network(self) -> VggtSceneNetwork | RaySceneNetwork:
        if isinstance(self._predictor.network, RayTransformer):
            return RaySceneNetwork(self._predictor, self._predictor.network, self._turn)
        return VggtSceneNetwork(self._predictor, self._turn)


def load_network_memory(saved: SavedFastWeights, model: str, device: str = 'cpu',
                        weights: str = '', precision: str = '') -> NetworkMemory:
    """The network that wrote fast weights.

    weights: file or name; precision: full or fp8; '' takes what wrote them.
    Raises MapError for another model, CheckpointError and ConfigError as `load_predictor`.
    """
    _check_model(saved, model)
    file = str(find_weights(weights or saved.weights or saved.model))
    predictor = load_predictor(saved.model, saved.attention, device, file,
                               precision or saved.precision)
    return NetworkMemory(predictor, model, file)


def _check_model(saved: SavedFastWeights, model: str) -> None:
    if ALIASES.get(model, model) != saved.model:
        raise MapError(f'expected model {saved.model}, whose fast weights this map holds, found '
                       f'{model}; use that, or map again')


def _frames_of(scene: SceneMap, frames: Iterable[Frame], unit: float,
               kept: Collection[int] | None) -> tuple[list[Frame], list[Frame]]:
    """Keyframes to write, and other images with a pose, with the poses that the map gave them.

    Of few images a quarter is not written, so that there are others to ask for.
    """
    posed = {e.stamp_ns: e.T_map_cam for e in scene.estimates
             if e.T_map_cam is not None and (kept is None or e.stamp_ns in kept)}
    keyframes = [k for k in scene.keyframes if kept is None or k.stamp_ns in kept]
    if not keyframes:
        raise DegenerateError('no image of a keyframe is left')
    poses = np.stack([keyframe.T_map_cam for keyframe in keyframes])
    count = min(KEYFRAMES, max(1, len(posed) - len(posed) // 4))
    wanted = {keyframes[i].stamp_ns: poses[i] for i in spanning_poses(poses, count, unit)}
    others = {stamp_ns: T for stamp_ns, T in posed.items() if stamp_ns not in wanted}
    step = max(1, len(others) // KEYFRAMES)
    known = {**wanted, **dict(list(others.items())[::step])}
    read = [replace(frame, T_map_cam=known[frame.stamp_ns], depth=None) for frame in frames
            if frame.stamp_ns in known]
    return ([frame for frame in read if frame.stamp_ns in wanted],
            [frame for frame in read if frame.stamp_ns not in wanted])


def _typical_depth(keyframes: Iterable[Keyframe]) -> float:
    """Median depth of all points that keyframes carry (1 without any)."""
    depths = np.concatenate([k.points_cam[k.has_point, 2] for k in keyframes])
    return float(np.median(depths)) if len(depths) else 1.0
