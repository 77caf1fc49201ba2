"""The pose of a live camera (or a video) in a saved map, image by image.

    python examples/follow_camera.py MAP [VIDEO or camera number]

Each image is looked up in the map by itself; the last pose is only tried first. Where an image is
not found, as with a covered lens, its status is NOT_LOCALISED, and the reason is printed.
"""

import sys
import time

import cv2

from feedforward_recon import Frame, load_map


def main(folder: str, camera: str = '0') -> None:
    """Print one line per image until the camera ends or Ctrl-C."""
    localizer = load_map(folder).localizer()
    capture = cv2.VideoCapture(int(camera) if camera.isdigit() else camera)
    T_map_cam = None
    while True:
        good, image_bgr = capture.read()
        if not good:
            return
        image = cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB)
        answer = localizer.localize(Frame(time.time_ns(), image), T_map_cam)
        T_map_cam = answer.T_map_cam
        place = answer.reason if T_map_cam is None else T_map_cam[:3, 3].round(3)
        print(f'{answer.status.value} {place} {answer.latency_ms:.0f} ms')


if __name__ == '__main__':
    main(*sys.argv[1:])
