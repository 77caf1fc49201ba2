"""Compare a network with reference outputs of the official code: same weights, same images.

The reference files hold no weights. Every parameter is filled by a rule from its official
name, so whoever reads the official names can be filled alike: `python benchmarks/golden.py
FILE.npz --model vggt-1b`. One line says the largest error, max |a - b| / max |b| over each
array; the exit status is 0 when all are within the tolerance.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from feedforward_recon.errors import InputError, ReconError
from feedforward_recon.model.configs import CONFIGS, build, config_of
from feedforward_recon.model.da3 import Da3, Da3Reconstruction
from feedforward_recon.model.pi3 import Pi3, nearest_rotation
from feedforward_recon.model.reference_view import balance_scores, choose
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.model.weights.checkpoints import expected_tensors, put_tensor

Arrays = dict[str, torch.Tensor]
INPUTS = {'image_seed', 'image_shape', 'config', 'svd_in', 'cond_in_extrinsics',
          'cond_in_intrinsics', 'x', 'q', 'k', 'v', 'w0', 'w1', 'w2', 'lr0', 'lr1', 'lr2', 'a_pos',
          'b_pos', 'a_window_order', 'b_window_order', 'a_min_topk_gap'}
FULL_SIZE = {'vggt', 'vggt-1b', 'vgg-t3', 'pi3', 'speed3r', 'da3', 'da3-large'}


def rule(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values of the parameter with that official name and shape."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    x = generator.standard_normal(shape, dtype=np.float32)
    last = key.rsplit('.', 1)[-1]
    if last == 'gamma':
        return np.float32(0.2) + np.float32(0.05) * x
    if len(shape) == 1:
        return (1 + np.float32(0.1) * x) if last == 'weight' else np.float32(0.05) * x
    if 'token' in last or 'pos_embed' in key:
        return np.float32(0.05) * x
    return np.asarray(x / np.float32(np.sqrt(np.size(x) / shape[0]) if shape else 1))


def fill(model: nn.Module) -> None:
    """Give every parameter of a network its values, one at a time: there is no second copy."""
    for key, shape in expected_tensors(model).items():
        if not key.endswith(('image_mean', 'image_std')):
            put_tensor(model, key, torch.from_numpy(rule(key, shape)))


@contextmanager
def recorded(model: nn.Module, names: dict[str, str]) -> Iterator[Arrays]:
    """Outputs of submodules by the names wanted: {wanted name: submodule}."""
    found: Arrays = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output
        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(name))
               for name, path in names.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def vggt_arrays(model: Vggt, images: torch.Tensor, file: dict[str, np.ndarray]) -> Arrays:
    """What VGGT says, under the names of the reference files."""
    with recorded(model, {'tokens': 'aggregator'}) as seen:
        answer, _ = model(images)
    tokens: Any = seen['tokens']
    levels = zip(model.config.backbone.levels, tokens.levels, strict=True)
    return {
        **{f'tokens_layer{index}': level for index, level in levels},
        'patch_start_idx': torch.tensor(
            tokens.levels[0].shape[2] - tokens.grid_hw[0] * tokens.grid_hw[1]),
        'pose_enc_iters': answer.pose_encodings, 'pose_enc': answer.pose_encodings[-1],
        'extrinsics': answer.T_cam_world[..., :3, :], 'intrinsics': answer.K,
        'depth': answer.depth, 'depth_conf': answer.depth_confidence,
        'points': answer.points, 'points_conf': answer.points_confidence,
        'world_points': answer.points, 'world_points_conf': answer.points_confidence}


def pi3_arrays(model: Pi3, images: torch.Tensor, file: dict[str, np.ndarray]) -> Arrays:
    """What pi3 says, under the names of the reference files."""
    last = model.config.depth - 1
    names = {'encoder_patch_tokens': 'encoder', 'tokens_block_first': 'decoder.0',
             'tokens_block_second': 'decoder.1', 'tokens_block_last': f'decoder.{last}',
             'tokens_block_penultimate': f'decoder.{last - 1}',
             'point_decoder_out': 'point_decoder', 'camera_decoder_out': 'camera_decoder',
             'fc_t': 'camera_head.fc_t', 'fc_rot': 'camera_head.fc_rot'}
    with recorded(model, names) as seen:
        answer, _ = model(images)
    if 'svd_in' in file:
        matrices = torch.from_numpy(file['svd_in']).unflatten(-1, (3, 3))
        seen['svd_out'] = nearest_rotation(matrices)
    return {**seen, 'points': answer.points, 'local_points': answer.points_cam,
            'conf': answer.confidence_logit, 'camera_poses': answer.T_world_cam}


def da3_arrays(model: Da3, images: torch.Tensor, file: dict[str, np.ndarray]) -> Arrays:
    """What DA3 says in each of the settings of the reference file."""
    blocks, start = 'backbone.pretrained.blocks', model.config.alt_start
    names = {f'tokens_block{index}': f'{blocks}.{index}'
             for index in range(model.config.vit.depth)}
    with recorded(model, {**names, 'vit': 'backbone.pretrained'}) as seen:
        answer, _ = model(images)
    tokens: Any = seen.pop('vit')
    levels = tokens.levels
    inputs = model.head_inputs(levels)
    before = seen[f'tokens_block{start - 2}'].unflatten(0, images.shape[:2])[:, :, 0]
    found = {**seen, **_da3_answer(answer), 'cls_at_selection': before,
             'head_input_level0': inputs[0], 'head_input_level3': inputs[3],
             'camera_token_last': levels[-1][:, :, 0],
             'ref_view_index': choose(before, 'saddle_balanced')[0],
             'balance_score': balance_scores(before)[0],
             'ref_view_index_images_120': choose(before[:, [1, 2, 0]], 'saddle_balanced')[0]}
    if 'middle_depth' in file:
        found |= _da3_answer(model(images, reference='middle')[0], 'middle_')
    if 'two_depth' in file:
        found |= _da3_answer(model(images[:, :2])[0], 'two_')
    if 'cond_depth' in file:
        cameras = [torch.from_numpy(file[f'cond_in_{name}'])
                   for name in ('extrinsics', 'intrinsics')]
        with recorded(model, {'cond_cam_enc_tokens': 'cam_enc'}) as seen:
            answer, _ = model(images, cameras=tuple(cameras))
        found |= {**seen, **_da3_answer(answer, 'cond_')}
    return found


def _da3_answer(answer: Da3Reconstruction, prefix: str = '') -> Arrays:
    arrays = {'depth': answer.depth, 'depth_conf': answer.depth_confidence,
              'extrinsics': answer.T_cam_world[..., :3, :], 'intrinsics': answer.K,
              'ray': answer.rays, 'ray_conf': answer.ray_confidence,
              'pose_enc': answer.pose_encodings}
    return {prefix + name: array for name, array in arrays.items()}


ARRAYS: dict[type, Callable[..., Arrays]] = {Vggt: vggt_arrays, Pi3: pi3_arrays,
                                             Da3: da3_arrays}


def errors(found: Arrays, file: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest |a - b| over largest |b| of each array of the file that was found."""
    result = {}
    for name in sorted(found.keys() & file.keys()):
        a, b = found[name].double().numpy(), np.asarray(file[name], np.float64)
        if a.size != b.size:
            raise InputError(f'expected {name} of shape {b.shape}, found {a.shape}; is it the '
                             'right --model?')
        a, finite = a.reshape(b.shape), np.isfinite(b)
        # A field of view of exactly 0 has an infinite focal length: equal infinities agree.
        gap = np.abs(np.subtract(a, b, out=np.zeros_like(b), where=a != b))
        largest = max(np.abs(b[finite]).max(initial=0), np.finfo(np.float32).tiny)
        result[name] = float(gap.max() / largest)
    return result


def _layers() -> dict[str, Callable[..., Arrays]]:
    """Single layers with reference outputs of their own, by the name of the attention."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.golden_layers import LAYERS
    return LAYERS


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a reference file. Raises InputError for another kind of file."""
    try:
        with np.load(path) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, EOFError, BadZipFile) as error:
        raise InputError(f'expected arrays in {path}, found another kind of file ({error}); give '
                         'an .npz file') from error


def model_of(file: dict[str, np.ndarray], name: str) -> str:
    """``name``, or the size that the file itself says where that is the same network."""
    said = str(file.get('config', ''))
    if said not in CONFIGS or name in _layers():
        return name
    ours, its = config_of(name), CONFIGS[said]
    same = type(ours) is type(its) and ours.attention == its.attention
    return said if same else name


def compare(path: Path, name: str) -> tuple[dict[str, float], list[str]]:
    """Errors by array, and the arrays of the file that nothing was compared with."""
    file, layers = read(path), _layers()
    name = model_of(file, name)
    if name in layers:
        with torch.inference_mode():
            found = layers[name](file, rule)
        return errors(found, file), sorted(file.keys() - found.keys() - INPUTS)
    missing = {'image_seed', 'image_shape'} - file.keys()
    if missing:
        raise InputError(f'expected image_seed and image_shape in {path}, found no '
                         f'{" and no ".join(sorted(missing))}; is it a file of a whole network?')
    generator = np.random.Generator(np.random.PCG64(int(file['image_seed'])))
    images = torch.from_numpy(generator.random(tuple(file['image_shape']), dtype=np.float32))
    model = build(name, device='meta')
    if type(model) not in ARRAYS:
        raise InputError(f'expected an architecture that was published elsewhere, found {name}, '
                         f'which is our own; choose another --model')
    fill(model)
    with torch.inference_mode():
        found = ARRAYS[type(model)](model, images, file)
    return errors(found, file), sorted(file.keys() - found.keys() - INPUTS)


def main() -> int:
    """Compare one file; prints one line, returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('file', type=Path)
    parser.add_argument('--model', required=True, help=f'architecture: {", ".join(CONFIGS)}; or '
                        f'attention whose layer the file describes: {", ".join(_layers())}')
    parser.add_argument('--tolerance', type=float, help='largest error that passes; by default '
                        '1e-5, and 1e-3 for networks of full size')
    parser.add_argument('--verbose', action='store_true', help='a line for every array')
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        name = model_of(read(options.file), options.model)
        found, skipped = compare(options.file, options.model)
        if not found:
            raise InputError(f'expected arrays of {options.model} in {options.file}, found '
                             f'{", ".join(skipped) or "none"}; is it the right --model?')
    except (ReconError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.verbose:
        print(*(f'{error:.2e}  {name}' for name, error in found.items()), sep='\n')
    worst = max(found, key=lambda name: (np.isnan(found[name]), found[name]))
    tolerance = options.tolerance or (1e-3 if name in FULL_SIZE else 1e-5)
    good = found[worst] <= tolerance
    print(f'{"ok" if good else "FAILED"}: {name} and {options.file.name}: '
          f'{len(found)} arrays, largest error {found[worst]:.2e} ({worst}), tolerance '
          f'{tolerance:.0e}; not compared: {", ".join(skipped) or "none"}; '
          f'{time.perf_counter() - started:.0f} s, '
          f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB peak')
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
