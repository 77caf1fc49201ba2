"""Map a walk, save the map, load it again and find an image in it.

    python examples/map_and_localize.py WALK [MAP]

WALK is what `ffrecon map` takes: a folder of images, a video or a ROS 2 bag.
"""

import sys

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.io import open_source
from feedforward_recon.mapping.mapper import OnlineReconstructor
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.session.map_folder import load_map, save_map


def main(walk: str, folder: str = 'out/example') -> None:
    """Every second image makes the map; an image between them is found in it."""
    config, encoder, source = MapperConfig(), CompactEncoder.load(), open_source(walk)

    memory = MemoryWriter(config.memory, encoder.dim)
    mapper = OnlineReconstructor(config, encoder, memory)
    for frame in source.frames(step=2):
        estimate = mapper.process(frame)
        print(frame.source, estimate.status.value)
    scene = mapper.finish()
    memory.polish(steps=50)
    save_map(folder, scene, memory, encoder, config)

    localizer = load_map(folder).localizer()
    query = next(source.frames(start=len(source) // 2 | 1))
    answer = localizer.localize(query)
    print(f'{query.source}: {answer.status.value}, {answer.inliers} inliers')
    print(answer.T_map_cam)


if __name__ == '__main__':
    main(*sys.argv[1:])
