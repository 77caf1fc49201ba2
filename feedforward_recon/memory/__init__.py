"""The scene memory of fixed size: written while mapping, only read while localising."""

from feedforward_recon.memory.scene_memory import SceneMemory
from feedforward_recon.memory.writer import MemoryWriter

__all__ = ['MemoryWriter', 'SceneMemory']
