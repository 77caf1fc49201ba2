"""The networks as a whole: reference outputs, names and sizes, memory, what they refuse."""

import functools
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import golden
from feedforward_recon.errors import ConfigError, InputError
from feedforward_recon.model import layers
from feedforward_recon.model.attention.registry import ATTENTION, attention_factory
from feedforward_recon.model.backbone import BackboneConfig
from feedforward_recon.model.configs import CONFIGS, build
from feedforward_recon.model.da3 import Da3, Da3Config
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.network_state import NetworkState
from feedforward_recon.model.pi3 import Pi3, Pi3Config
from feedforward_recon.model.vggt import Vggt, VggtConfig
from feedforward_recon.model.vit import VitConfig
from feedforward_recon.model.weights.checkpoints import expected_tensors

TOLERANCE = 1e-5
VIT = VitConfig(32, 2, 2, grid=3)
DPT = DptConfig(64, 16, (8, 8, 8, 8))


@functools.cache
def vggt(attention='softmax'):
    config = VggtConfig(BackboneConfig(VIT, 4, (0, 1, 2, 3)), DPT)
    return filled(Vggt(config, attention_factory(attention)))


@functools.cache
def pi3():
    return filled(Pi3(Pi3Config(VIT, 4), attention_factory('softmax')))


@functools.cache
def da3():
    vit = VitConfig(32, 2, 8, grid=3, registers=0)
    config = Da3Config(vit, 4, (4, 5, 6, 7), DptConfig(64, 16, (8, 8, 8, 8), rectify_skip=False))
    return filled(Da3(config, attention_factory('softmax', special=1)))


def filled(network):
    """Weights of the golden rule: initial ones nearly switch the blocks off."""
    golden.fill(network)
    return network.eval()


def images(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, count, 3, 28, 42, generator=generator)


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize('name', ['vggt-small', 'da3-small', 'pi3-small'])
def test_reference_outputs_are_reproduced(golden_dir, name):
    found, skipped = golden.compare(golden_dir / f'{name.replace("-", "_")}.npz', name)
    assert skipped == []
    assert len(found) >= 10
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize(('name', 'without'), [
    ('vggt-small', {'aggregator.patch_embed.mask_token'}), ('da3-small', set()),
    ('pi3-small', set()), ('pi3', set())])
def test_names_and_shapes_are_the_published_ones(golden_dir, name, without):
    file = {'pi3': 'pi3_full'}.get(name, name.replace('-', '_'))
    published = json.loads((golden_dir / f'{file}_keys.json').read_text(encoding='utf-8'))
    expected = {key: tuple(shape) for key, shape in published.items() if key not in without}
    assert expected_tensors(build(name, device='meta')) == expected


# VGGT-1B without the 394 tensors of the track head and the unused mask token.
@pytest.mark.parametrize(('name', 'tensors', 'numbers'), [
    ('vggt-1b', 1797 - 394 - 1, 1_256_537_516 - 65_941_396 - 1024),
    ('vgg-t3', 1450, 1_210_865_304),
    ('da3-large', 643, 410_941_767 + 6 * 32)])
def test_sizes_are_the_published_ones(name, tensors, numbers):
    shapes = expected_tensors(build(name, device='meta'))
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == numbers


@pytest.mark.parametrize(('pattern', 'shape'), [
    ('aggregator.camera_token', (1, 2, 1, 1024)),
    ('aggregator.register_token', (1, 2, 4, 1024)),
    ('aggregator.patch_embed.pos_embed', (1, 1370, 1024)),
    ('aggregator.frame_blocks.23.attn.k_norm.bias', (64,)),
    ('aggregator.global_blocks.0.attn.qkv.weight', (3072, 1024)),
    ('camera_head.poseLN_modulation.1.weight', (6144, 2048)),
    ('camera_head.trunk.3.mlp.fc1.weight', (8192, 2048)),
    ('camera_head.pose_branch.fc2.weight', (9, 1024)),
    ('depth_head.resize_layers.0.weight', (256, 256, 4, 4)),
    ('depth_head.scratch.refinenet4.resConfUnit2.conv1.weight', (256, 256, 3, 3)),
    ('point_head.scratch.output_conv2.2.weight', (4, 32, 1, 1))])
def test_full_size_of_vggt(pattern, shape):
    assert expected_tensors(build('vggt-1b', device='meta'))[pattern] == shape


def numberless(names):
    """Names in which all blocks of a stack are one."""
    return {re.sub(r'(blocks|trunk)\.\d+\.', r'\1.N.', name) for name in names}


def test_vggt_of_full_size_has_the_names_of_the_small_one(golden_dir):
    published = json.loads((golden_dir / 'vggt_small_keys.json').read_text(encoding='utf-8'))
    names = expected_tensors(build('vggt-1b', device='meta')).keys()
    assert numberless(names) == numberless(published) - {'aggregator.patch_embed.mask_token'}
    for stack, depth in (('aggregator.patch_embed.blocks', 24), ('aggregator.frame_blocks', 24),
                         ('aggregator.global_blocks', 24), ('camera_head.trunk', 4)):
        own = [{name.partition(f'{stack}.{n}.')[2] for name in names if f'{stack}.{n}.' in name}
               for n in range(depth + 1)]
        assert own[0] and own[:-1] == [own[0]] * depth and not own[-1]


def test_vgg_t3_differs_from_vggt_in_its_global_attention_alone():
    vggt, t3 = (expected_tensors(build(name, device='meta')) for name in ('vggt-1b', 'vgg-t3'))
    assert all(vggt[key] == t3[key] for key in vggt.keys() & t3.keys())
    gone, new = vggt.keys() - t3.keys(), t3.keys() - vggt.keys()
    prefix = r'aggregator\.global_blocks\.\d+\.attn\.'
    assert len(gone) == 24 * 4 and len(new) == 24 * 6
    assert all(re.fullmatch(prefix + r'[qk]_norm\.(weight|bias)', key) for key in gone)
    assert all(re.fullmatch(prefix + r'(w[012]|lr_fc\.(weight|bias)|short_conv_qkv\.2\..*)', key)
               for key in new)


def test_full_size_of_vgg_t3():
    shapes = expected_tensors(build('vgg-t3', device='meta'))
    prefix = 'aggregator.global_blocks.23.attn.'
    assert {key.removeprefix(prefix): shape for key, shape in shapes.items()
            if key.startswith(prefix)} == {
        'qkv.weight': (3072, 1024), 'qkv.bias': (3072,), 'proj.weight': (1024, 1024),
        'proj.bias': (1024,), 'lr_fc.weight': (48, 1024), 'lr_fc.bias': (48,),
        'w0': (16, 64, 256), 'w1': (16, 256, 64), 'w2': (16, 64, 256),
        'short_conv_qkv.2.conv.weight': (1024, 1, 3, 3)}


@pytest.mark.parametrize('attention', ['softmax', 'ttt'])
@torch.inference_mode()
def test_localising_neither_changes_the_memory_nor_depends_on_other_queries(attention):
    network = vggt(attention)
    _, memory = network(images(3))
    kept = [tensor.clone() for state in memory.states for tensor in state.tensors().values()]
    queries = images(2, seed=1)
    answer, after = network(queries, memory, write=False)
    assert after is memory
    assert all(torch.equal(a, b) for a, b in zip(
        kept, [t for s in memory.states for t in s.tensors().values()], strict=True))
    alone, _ = network(queries[:, :1], memory, write=False)
    assert difference(alone.depth, answer.depth[:, :1]) < TOLERANCE
    elsewhere, _ = network(queries[:, :1], network(images(3, seed=2))[1], write=False)
    assert not torch.equal(elsewhere.depth, alone.depth)


@torch.inference_mode()
def test_a_mapped_image_is_found_as_it_was():
    network = vggt()
    mapped, memory = network(images(4))
    again, _ = network(images(4)[:, 2:3], memory, write=False)
    assert difference(again.depth, mapped.depth[:, 2:3]) < TOLERANCE
    assert difference(again.points, mapped.points[:, 2:3]) < TOLERANCE
    # Its camera token is one of those remembered, and equal tokens get equal cameras.
    tokens = torch.cat((memory.camera_tokens, memory.camera_tokens[:, 2:3]), 1)
    expected = network.camera_head(tokens)[:, :, 2:3]
    assert difference(again.pose_encodings, expected) < TOLERANCE


@pytest.mark.parametrize('attention', ATTENTION)
@torch.inference_mode()
def test_a_saved_memory_answers_as_before(attention, tmp_path):
    network = vggt(attention)
    _, memory = network(images(3))
    tensors = {name: tensor.contiguous() for name, tensor in memory.tensors().items()}
    save_file(tensors, tmp_path / 'memory.safetensors')
    loaded = network.state_from(load_file(tmp_path / 'memory.safetensors'))
    assert loaded.nbytes == memory.nbytes
    query = images(1, seed=1)
    before, _ = network(query, memory, write=False)
    after, _ = network(query, loaded, write=False)
    assert torch.equal(before.depth, after.depth)
    assert torch.equal(before.pose_encodings, after.pose_encodings)


@torch.inference_mode()
def test_the_memory_of_another_network_is_refused():
    _, memory = vggt('ttt')(images(2))
    with pytest.raises(InputError, match='state of softmax attention'):
        vggt().state_from(memory.tensors())


def test_few_camera_tokens_span_the_scene():
    line = torch.tensor([0., 1, 2, 3, 9, 10]).view(1, 6, 1)
    memory = NetworkState((), line)
    assert memory.with_few_camera_tokens(3).camera_tokens.flatten().tolist() == [0, 3, 10]
    assert memory.with_few_camera_tokens(6) is memory
    fewer = memory.with_few_camera_tokens(4).with_few_camera_tokens(2)
    assert fewer.camera_tokens.flatten().tolist() == [0, 10]


@torch.inference_mode()
def test_only_the_first_image_is_special_to_vggt():
    network, order, swap = vggt(), [0, 3, 1, 2], [1, 0, 2, 3]
    straight, _ = network(images(4))
    mixed, _ = network(images(4)[:, order])
    for name in ('depth', 'points', 'T_cam_world'):  # K is infinite where the view is 0 wide
        assert difference(getattr(mixed, name), getattr(straight, name)[:, order]) < TOLERANCE
    swapped, _ = network(images(4)[:, swap])
    assert difference(swapped.depth, straight.depth[:, swap]) > 100 * TOLERANCE


@torch.inference_mode()
def test_no_image_is_special_to_pi3():
    network, order = pi3(), [2, 0, 3, 1]
    straight, _ = network(images(4))
    mixed, _ = network(images(4)[:, order])
    for name in type(straight).__dataclass_fields__:
        assert difference(getattr(mixed, name), getattr(straight, name)[:, order]) < TOLERANCE
    other, _ = network(torch.cat((images(3), images(1, seed=1)), 1))
    assert difference(other.points[:, 0], straight.points[:, 0]) > 100 * TOLERANCE


@torch.inference_mode()
def test_da3_chooses_its_reference_whatever_the_order():
    network, order = da3(), [2, 0, 3, 1]
    straight, _ = network(images(4))
    mixed, _ = network(images(4)[:, order])
    assert difference(mixed.depth, straight.depth[:, order]) < TOLERANCE
    first, _ = network(images(4)[:, order], reference='first')
    assert difference(first.depth, mixed.depth) > 100 * TOLERANCE


@pytest.mark.parametrize('make', [vggt, pi3, da3])
@torch.inference_mode()
def test_scenes_of_a_batch_do_not_mix(make):
    network = make()
    pair = torch.cat((images(3), images(3, seed=1)))
    together, _ = network(pair)
    alone, _ = network(pair[1:])
    for name in type(alone).__dataclass_fields__:
        if name not in ('pose_encodings', 'K'):
            assert difference(getattr(together, name)[1:], getattr(alone, name)) < TOLERANCE


@pytest.mark.parametrize('make', [vggt, pi3, da3])
@torch.inference_mode()
def test_half_precision_leaves_answers_in_float32_and_close(make):
    network = make()
    exact, _ = network(images(2))
    with torch.autocast('cpu', torch.bfloat16):
        rounded, _ = network(images(2))
    for name in type(exact).__dataclass_fields__:
        assert getattr(rounded, name).dtype == torch.float32
    field = 'confidence_logit' if make is pi3 else 'depth'
    a, b = getattr(rounded, field), getattr(exact, field)
    assert TOLERANCE < (a - b).norm() / b.norm() < 0.1


@pytest.mark.parametrize('make', [vggt, pi3, da3])
@torch.inference_mode()
def test_work_in_small_pieces_gives_the_same(make, monkeypatch):
    network = make()
    whole, _ = network(images(5))
    monkeypatch.setattr(layers, 'CHUNK_TOKENS', 12)
    pieces, _ = network(images(5))
    for name in type(whole).__dataclass_fields__:
        if name != 'K':
            assert difference(getattr(pieces, name), getattr(whole, name)) < TOLERANCE


@pytest.mark.parametrize('attention', ATTENTION)
@torch.inference_mode()
def test_every_attention_fits_into_the_network(attention):
    answer, memory = vggt(attention)(images(2))
    assert torch.isfinite(answer.depth).all()
    assert len(memory.states) == 4
    assert memory.camera_tokens.shape == (1, 2, 64)


@pytest.mark.parametrize('make', [vggt, pi3, da3])
def test_every_parameter_learns(make):
    """All but the parts that the published network has and does not use."""
    with torch.inference_mode(False):
        network = make.__wrapped__().train()
        answer, _ = network(images(3))
        sum(getattr(answer, name).square().mean() for name in type(answer).__dataclass_fields__
            if name != 'K').backward()
    idle = {name for name, parameter in network.named_parameters()
            if parameter.grad is None or not parameter.grad.abs().sum() > 0}
    unused = r'cam_enc\..*|head\.scratch\.output_conv._aux\.[012]\..*'
    assert {name for name in idle if not re.fullmatch(unused, name)} == set()


def test_unknown_models_are_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match='did you mean vgg-t3'):
        build('vgg-t33')


def test_every_name_can_be_built_without_memory():
    assert all(next(build(name, device='meta').parameters()).is_meta for name in CONFIGS)


@pytest.mark.parametrize('bad', [torch.zeros(1, 2, 3, 13, 28), torch.zeros(2, 3, 28, 28),
                                 torch.zeros(1, 2, 3, 28, 28, dtype=torch.uint8)])
def test_wrong_images_are_refused(bad):
    with pytest.raises(InputError, match='expected'):
        vggt()(bad)
