"""How a frame gets its pose: from features, from the source of frames, or from a network."""

from feedforward_recon.mapping.sources.base import PoseSource
from feedforward_recon.mapping.sources.features import FeaturePoses
from feedforward_recon.mapping.sources.given import GivenPoses

__all__ = ['FeaturePoses', 'GivenPoses', 'PoseSource']
