"""A network of the kind of VGGT that builds and runs in no time, with initial weights."""

from feedforward_recon.model.backbone import BackboneConfig
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.vggt import VggtConfig
from feedforward_recon.model.vit import VitConfig

SMALL = VggtConfig(BackboneConfig(VitConfig(48, 2, 3, grid=4), 4, (0, 1, 2, 3)),
                   DptConfig(96, 16, (8, 16, 24, 32)))
