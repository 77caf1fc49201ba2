"""Fast weights of a network: written from a finished map, saved, and loaded again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.errors import DegenerateError, MapError
from feedforward_recon.geometry.transforms import spanning_poses
from feedforward_recon.localization.network_localizer import (
    KEYFRAMES,
    SavedFastWeights,
    write_keyframes,
)
from feedforward_recon.mapping.scene_map import SceneMap
from feedforward_recon.model.attention.registry import ATTENTION
from feedforward_recon.model.configs import ALIASES, Network
from feedforward_recon.model.predictor import NetworkPredictor, load_predictor
from feedforward_recon.model.vggt import NetworkState, Vggt
from feedforward_recon.model.weights.checkpoints import file_sha256
from feedforward_recon.model.weights.registry import find_weights, is_path
from feedforward_recon.types import FloatArray, Frame, Keyframe, Prediction

log = logging.getLogger(__name__)
# Kept of all keyframes, so that the state has a fixed size: with so many, answers move by at most
# 6 cm and 2 degrees (docs/experiments.md, Which camera tokens to keep).
CAMERA_TOKENS = 32


class VggtSceneNetwork:
    """A network of VGGT's kind as a ``SceneNetwork``."""

    def __init__(self, predictor: NetworkPredictor) -> None:
        """Raises MapError for a network without camera tokens."""
        if not isinstance(predictor.network, Vggt):
            raise MapError(unsupported_reason(predictor.network))
        self.predictor, self.network = predictor, predictor.network

    def write(self, images: Sequence[NDArray[np.uint8]]) -> tuple[Prediction, NetworkState]:
        """One joint pass over all images; few camera tokens are kept."""
        prediction, state = self.predictor.predict(images)
        return prediction, state.with_few_camera_tokens(CAMERA_TOKENS)

    def query(self, image: NDArray[np.uint8], state: NetworkState
              ) -> tuple[Prediction, float]:
        """The pass without writing. Novelty: cosine distance to the nearest camera token kept."""
        tokens = []
        hook = self.network.camera_head.register_forward_pre_hook(
            lambda _, given: tokens.append(given[0][0]))
        try:
            prediction, _ = self.predictor.predict([image], state, write=False)
        finally:
            hook.remove()
        *stored, query = tokens[0]
        similarity = torch.cosine_similarity(torch.stack(stored), query, dim=-1)
        return prediction, float(1 - similarity.max())

    def state_from(self, tensors: Mapping[str, torch.Tensor]) -> NetworkState:
        """The state of these tensors on the device of the network."""
        device = self.predictor.device
        return self.network.state_from({key: t.to(device) for key, t in tensors.items()})


def unsupported_reason(network: Network) -> str:
    """Why a network cannot write a state of a fixed size, in a sentence; '' when it can."""
    if not isinstance(network, Vggt):
        return (f'{type(network).__name__} has no cameras in its state: only the landmarks of '
                'this map can be localised against')
    if not ATTENTION[network.config.attention].fixed_size:
        return (f'the state of {network.config.attention} attention grows with every image and '
                'is not kept: use --attention ttt or hybrid to localise with the network')
    return ''


def write_fast_weights(predictor: NetworkPredictor, model: str, weights: str,
                       frames: Iterable[Frame], scene: SceneMap, points: FloatArray,
                       ) -> SavedFastWeights | None:
    """One joint write over keyframes of a finished map; None, and a warning, when it fails.

    model, weights: as `load_predictor` was given them. frames: those of the walk, once more.
    points: landmarks of the map [V, 3].
    """
    network = predictor.network
    if unsupported_reason(network) or not scene.keyframes:
        return None
    name = weights or ALIASES.get(model, model)
    unit = _typical_depth(scene.keyframes)
    keyframes, others = _frames_of(scene, frames, unit)
    try:
        state, link = write_keyframes(VggtSceneNetwork(predictor), keyframes, others, points, unit)
    except (DegenerateError, MemoryError) as problem:
        log.warning('the map goes without fast weights of the network: %s', problem)
        return None
    if not link.recognised:
        log.warning('the network does not find images of this walk again (%.2f units and %.0f '
                    'degrees off, its depth confirms %.0f %% of the landmarks): it will refuse '
                    'queries', link.position, np.rad2deg(link.angle), 100 * link.agreement)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.tensors().items()}
    return SavedFastWeights(ALIASES.get(model, model), network.config.attention,
                            '' if is_path(name) else name, file_sha256(find_weights(name)), link,
                            tensors)


def load_scene_network(saved: SavedFastWeights, model: str, device: str = 'cpu', weights: str = ''
                       ) -> tuple[VggtSceneNetwork, NetworkState]:
    """The network that wrote fast weights, and these as it reads them.

    weights: file or name; '' takes the name that wrote it.
    Raises MapError for another network, CheckpointError and ConfigError as `load_predictor`.
    """
    name = ALIASES.get(model, model)
    if name != saved.model:
        raise MapError(f'expected --model {saved.model}, whose fast weights this map holds, found '
                       f'{model}; use that, or map again')
    file = find_weights(weights or saved.weights or name)
    sha256 = file_sha256(file)
    if sha256 != saved.sha256:
        raise MapError(f'expected weights of {saved.model} with SHA-256 {saved.sha256[:12]}, '
                       f'which wrote those of this map, found {sha256[:12]} in {file}; give '
                       'those with --weights, or map again')
    network = VggtSceneNetwork(load_predictor(saved.model, saved.attention, device, file))
    return network, network.state_from(saved.tensors)


def _frames_of(scene: SceneMap, frames: Iterable[Frame], unit: float
               ) -> tuple[list[Frame], list[Frame]]:
    """Keyframes to write, and other images with a pose, with the poses that the map gave them."""
    poses = np.stack([keyframe.T_map_cam for keyframe in scene.keyframes])
    chosen = np.sort(spanning_poses(poses, KEYFRAMES, unit))
    wanted = {scene.keyframes[i].stamp_ns: poses[i] for i in chosen}
    others = {e.stamp_ns: e.T_map_cam for e in scene.estimates
              if e.T_map_cam is not None and e.stamp_ns not in wanted}
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
