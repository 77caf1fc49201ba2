"""Settings of maps that are made in seconds: a small memory, hardly polished."""

from dataclasses import replace

from feedforward_recon.config.schema import MapperConfig

_BASE = MapperConfig()
SMALL = replace(_BASE, memory=replace(_BASE.memory, polish_steps=20, slots=8000,
                                      reservoir=20_000, hidden_dim=64))
