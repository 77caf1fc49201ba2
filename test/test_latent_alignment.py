"""Latent global alignment: the published formulas, what it costs, and what trains it."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from small_network import SMALL
from torch.nn import functional as F

from feedforward_recon.errors import CheckpointError, ConfigError
from feedforward_recon.model import configs, latent_alignment, layers
from feedforward_recon.model.configs import build, load, network_of
from feedforward_recon.model.latent_alignment import PUBLISHED_BLOCKS, LatentAlignment
from feedforward_recon.model.layers import BlockConfig
from feedforward_recon.model.ray_transformer import RayConfig
from feedforward_recon.model.weights.files import check_weights

CONFIG = BlockConfig(24, 3, layer_scale=None)


def module(depth=PUBLISHED_BLOCKS, random=True):
    torch.manual_seed(0)
    made = LatentAlignment(CONFIG, depth).double()
    if random:
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def tokens(images=5, count=7, seed=1):
    return torch.randn(images, count, CONFIG.dim, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed))


def test_a_fresh_module_is_the_identity():
    x = tokens()
    assert torch.equal(module(random=False)(x), x)
    assert not torch.allclose(module()(x), x)


def softmax_attention(q, k, v):
    """[T, C] queries against [N, C] keys and values, head by head."""
    dim = CONFIG.head_dim
    return torch.cat([(q[:, h:h + dim] @ k[:, h:h + dim].T / dim**0.5).softmax(1)
                      @ v[:, h:h + dim] for h in range(0, CONFIG.dim, dim)], 1)


def norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (x.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt() \
        * layer.weight + layer.bias


def mlp(x, part):
    return part.fc2(F.gelu(part.fc1(x)))


def published(made, x):
    """The formulas of the paper, image by image: F_i = F_i^0 + (what the blocks added)."""
    images, latents = list(x), x.mean(1)
    for block in made.blocks:
        inside, across = block.among, block.across
        q, k, v = inside.attn.qkv(norm(latents, inside.norm1)).chunk(3, 1)
        latents = latents + inside.attn.proj(softmax_attention(q, k, v))
        latents = latents + mlp(norm(latents, inside.norm2), inside.mlp)
        k, v = across.kv(norm(latents, across.norm_latents)).chunk(2, 1)
        for i, image in enumerate(images):
            q = across.q(norm(image, across.norm1))
            image = image + across.proj(softmax_attention(q, k, v))
            images[i] = image + mlp(norm(image, across.norm2), across.mlp)
    increment = torch.stack(images) - x
    return x + increment


@pytest.mark.parametrize('depth', [2, 4])
@pytest.mark.parametrize('images', [1, 5])
def test_the_published_formulas(depth, images):
    made, x = module(depth), tokens(images)
    torch.testing.assert_close(made(x), published(made, x), rtol=1e-10, atol=1e-10)


def test_the_order_of_the_images_does_not_matter():
    made, x = module(), tokens()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(made(x[order]), made(x)[order], rtol=1e-12, atol=1e-12)


def test_images_know_of_each_other_once_weights_are_not_zero():
    x, other = tokens(), tokens()
    other[4] = tokens(seed=2)[4]
    before, after = (module()(given)[:4] for given in (x, other))
    assert ((before - after).abs().amax((1, 2)) > 1e-6).all()


def test_chunks_of_images_say_what_all_say_at_once(monkeypatch):
    made, x = module(), tokens()
    with torch.no_grad():
        whole = made(x)
        monkeypatch.setattr(layers, 'CPU_CHUNK_TOKENS', 2 * x.shape[1])
        torch.testing.assert_close(made(x), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(('images', 'count'), [(4, 6), (8, 6), (4, 12)])
def test_the_cost_is_that_of_the_paper(images, count, monkeypatch):
    """N^2 + N (N T) pairs of queries and keys per block, not (N T)^2."""
    pairs = []

    def counted(attention):
        def counting(q, k, v):
            pairs.append(q.shape[-2] * k.shape[-2])
            return attention(q, k, v)
        return counting
    for place, name in ((latent_alignment.F, 'scaled_dot_product_attention'),
                        (layers, 'attended')):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    module(1)(tokens(images, count))
    assert sum(pairs) == images**2 + images * (images * count)


def test_gradients():
    made = module(2)
    x = tokens(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(made, (x,))
    fresh = module(2, random=False)
    fresh(x).square().sum().backward()
    for block in fresh.blocks:  # what is zero at first is what moves first
        assert block.across.proj.weight.grad.any() and block.across.mlp.fc2.weight.grad.any()


def small(alignment=2):
    torch.manual_seed(0)
    backbone = dataclasses.replace(SMALL.backbone, alignment=alignment)
    return network_of(dataclasses.replace(SMALL, backbone=backbone))


def disturbed(network):
    """Weights of the alignment that do something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.aggregator.latent_alignment.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network


def images(count=4, seed=0):
    return torch.rand(1, count, 3, 28, 42, generator=torch.Generator().manual_seed(seed))


def test_networks_have_none_unless_asked():
    assert not build('vggt-tiny').aligns and small().aligns
    plain = set(build('vggt-tiny').state_dict())
    more = set(build('vggt-tiny', alignment=4).state_dict()) - plain
    assert plain and all(name.startswith('aggregator.latent_alignment.') for name in more)
    assert configs.alignment_blocks(more) == 4


@torch.no_grad()
def test_a_fresh_alignment_leaves_the_network_as_it_was():
    plain, aligning = small(0), small()
    aligning.load_state_dict(plain.state_dict(), strict=False)
    for a, b in zip(vars(plain(images())[0]).values(), vars(aligning(images())[0]).values(),
                    strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_encoding_aligning_and_decoding_are_the_network():
    network = disturbed(small())
    whole, _ = network(images())
    encoded = network.encode(images())
    parts, _ = network.decode(network.aligned(encoded), (2, 3))
    without, _ = network.decode(encoded, (2, 3))
    assert encoded.shape == (1, 4, 6, 48)
    assert torch.equal(whole.depth, parts.depth)
    assert torch.equal(whole.pose_encodings, parts.pose_encodings)
    assert not torch.allclose(whole.depth, without.depth)


@torch.no_grad()
def test_a_pair_knows_of_images_that_are_not_decoded_with_it():
    network = disturbed(small())
    other = images()
    other[:, 3] = 1 - other[:, 3]
    said = [network.decode(network.aligned(network.encode(given))[:, :2], (2, 3))[0].depth
            for given in (images(), other)]
    assert not torch.allclose(*said)


@torch.no_grad()
def test_a_batch_of_windows_is_each_by_itself():
    network = disturbed(small())
    tokens_ = network.aligned(network.encode(images()))[0]
    pairs = torch.tensor([[0, 1], [2, 3], [1, 3]])
    before = tokens_.clone()
    together, _ = network.decode(tokens_[pairs], (2, 3))
    assert torch.equal(tokens_, before)
    for row, pair in enumerate(pairs):
        alone, _ = network.decode(tokens_[pair][None], (2, 3))
        torch.testing.assert_close(alone.depth[0], together.depth[row], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.T_cam_world[0], together.T_cam_world[row], rtol=1e-5,
                                   atol=1e-6)


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """Weights of a small network with alignment, of the name `vggt-tiny`."""
    monkeypatch.setitem(configs.CONFIGS, 'vggt-tiny', SMALL)
    network, file = disturbed(small()), tmp_path / 'aligned.safetensors'
    save_file(network.state_dict(), file)
    return network, file


@torch.no_grad()
def test_weights_say_whether_there_is_an_alignment(weights, tmp_path):
    network, file = weights
    loaded = load('vggt-tiny', file)
    assert loaded.aligns
    assert torch.equal(loaded(images())[0].depth, network(images())[0].depth)
    assert check_weights(file, 'vggt-tiny').keys.fits
    plain = tmp_path / 'plain.safetensors'
    save_file(small(0).state_dict(), plain)
    assert not load('vggt-tiny', plain).aligns


RAYS = RayConfig(dim=32, heads=4, depth=2, alignment=2)
SEEN_HW, RAYS_K = (32, 48), torch.tensor([[40.0, 0, 23.5], [0, 40, 15.5], [0, 0, 1]])


def of_rays(alignment=2):
    """A small network that is told intrinsics."""
    torch.manual_seed(0)
    return network_of(dataclasses.replace(RAYS, alignment=alignment))


def views(count=4, seed=0):
    """Images [1, N, 3, H, W] and their K."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, count, 3, *SEEN_HW, generator=generator), RAYS_K.expand(1, count, 3, 3)


@torch.no_grad()
def test_a_fresh_alignment_leaves_a_network_of_rays_as_it_was():
    plain, aligning = of_rays(0), of_rays()
    assert aligning.aligns and not plain.aligns
    aligning.load_state_dict(plain.state_dict(), strict=False)
    for a, b in zip(vars(plain(*views())[0]).values(), vars(aligning(*views())[0]).values(),
                    strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_a_pair_of_rays_knows_of_images_that_are_not_decoded_with_it():
    network = of_rays()
    for parameter in network.latent_alignment.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    (given, K), pair, grid_hw = views(), torch.tensor([2, 0]), (2, 3)
    other = given.clone()
    other[:, 3] = 1 - other[:, 3]
    said = []
    for collection in (given, other):
        seen = network.encode(collection)
        patches = network.aligned(network.tokens.along_rays(seen.patches[None], K, grid_hw))
        said.append(network.decode(patches[:, pair], seen.of(pair), grid_hw)[0].points)
    assert not torch.allclose(*said)
    # Without the others, the same steps are the network.
    seen = network.encode(given[:, pair])
    patches = network.aligned(network.tokens.along_rays(seen.patches[None], K[:, pair], grid_hw))
    whole, _ = network(given[:, pair], K[:, pair])
    assert torch.equal(network.decode(patches, seen, grid_hw)[0].points, whole.points)


@torch.no_grad()
def test_weights_of_rays_say_whether_there_is_an_alignment(monkeypatch, tmp_path):
    monkeypatch.setitem(configs.CONFIGS, 'micro', dataclasses.replace(RAYS, alignment=0))
    network, file = of_rays(), tmp_path / 'aligned.safetensors'
    save_file(network.state_dict(), file)
    loaded = load('micro', file)
    assert loaded.config.alignment == 2
    assert torch.equal(loaded(*views())[0].points, network(*views())[0].points)


def test_networks_that_decode_nothing_apart_have_no_alignment():
    with pytest.raises(ConfigError, match='found Pi3; choose vggt, vgg-t3 or tiny'):
        build('pi3', device='meta', alignment=4)


def test_half_an_alignment_is_refused(weights, tmp_path):
    network, _ = weights
    torn = {name: tensor for name, tensor in network.state_dict().items()
            if 'latent_alignment.blocks.0.across' not in name}
    save_file(torn, tmp_path / 'torn.safetensors')
    with pytest.raises(CheckpointError, match='missing'):
        load('vggt-tiny', tmp_path / 'torn.safetensors')


def test_attentions_within_images_are_exchanged_and_those_of_the_alignment_are_not():
    names = [name for name, _ in build('tiny-sla', alignment=2).named_parameters()]
    assert any('frame_blocks' in name and 'proj_lin' in name for name in names)
    assert not any('latent_alignment' in name and 'proj_lin' in name for name in names)
