"""Map a walk, save the map, load it again and find an image in it.

    python examples/map_and_localize.py WALK [MAP]

WALK is what `ffrecon map` takes: a folder of images, a video or a ROS 2 bag.
"""

import sys

from feedforward_recon import load_map, map_frames, open_source


def main(walk: str, folder: str = 'out/example') -> None:
    """Every second image makes the map; an image between them is found in it."""
    source = open_source(walk)
    run = map_frames(list(source.frames(step=2)))
    for estimate in run.scene.estimates:
        print(estimate.source, estimate.status.value)
    run.save(folder)

    localizer = load_map(folder).localizer()
    query = next(source.frames(start=len(source) // 2 | 1))
    answer = localizer.localize(query)
    print(f'{query.source}: {answer.status.value}, {answer.inliers} inliers')
    print(answer.T_map_cam)


if __name__ == '__main__':
    main(*sys.argv[1:])
