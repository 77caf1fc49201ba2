"""Every setting of ``ffrecon reconstruct``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace

from feedforward_recon.config.schema import EncoderConfig, MapperConfig, option

# Photos have more pixels than the images of a robot, and are compared once: docs/experiments.md,
# Photos.
PHOTO_ENCODER = EncoderConfig(max_pixels=800_000, max_keypoints=3000, spacing_px=8)


@dataclass(frozen=True)
class ReconstructionConfig:
    """How poses are found for unordered images."""

    neighbours: int = option(12, 'most similar images that each image is compared with', low=1,
                             high=1000)
    bridges: int = option(30, 'most similar pairs that are tried between parts that fall apart',
                          low=0, high=1000)
    tree: str = option('shortest', 'tree of pairs along which poses are put together',
                       choices=('shortest', 'spanning'))
    cost: str = option('linear', 'cost of a pair by the similarity S of its images: 1 - S, '
                       '(1 - S)^2, or the angle', choices=('linear', 'square', 'angle'))
    accumulation: str = option('depth', 'how a pair is put to those before it: by a ratio of '
                               'depths, or all its points by a similarity or, where a network '
                               'says metres, by a rigid motion',
                               choices=('depth', 'similarity', 'rigid'))
    decoder: str = option('compact', 'what says the motion and the points of two images: their '
                          'matches alone or, at these, a network that sees both, or that sees all '
                          'images in one pass (--model)',
                          choices=('compact', 'transformer', 'joint'))
    latent_alignment: bool = option(False, 'the network of decoder transformer sees all images '
                                    'together before it decodes pairs; needs weights with it')
    batch: int = option(16, 'pairs that the network decodes at once', low=1, high=1000)
    refine: bool = option(True, 'bundle adjustment of all tracks, and alignment of patches')
    map_keypoints: int = option(1000, 'features that each image keeps in the map, and that images '
                                'are looked for with in it', low=50, high=4000)
    seed: int = option(0, 'seed of the robust estimators', low=0)


@dataclass(frozen=True)
class PhotoConfig(MapperConfig):
    """All settings of a reconstruction: those of the map, and how poses are found."""

    encoder: EncoderConfig = PHOTO_ENCODER
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    @property
    def mapper(self) -> MapperConfig:
        """What the map is saved with."""
        shared = {spec.name: getattr(self, spec.name)
                  for spec in dataclasses.fields(MapperConfig)}
        keypoints = min(self.encoder.max_keypoints, self.reconstruction.map_keypoints)
        shared['encoder'] = replace(self.encoder, max_keypoints=keypoints)
        return MapperConfig(**shared)
