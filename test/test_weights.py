"""Checkpoints: the registry tells the truth, downloads are whole or absent, licences are asked."""

import dataclasses
import hashlib
import json
import math
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from feedforward_recon.cli import main
from feedforward_recon.errors import CheckpointError
from feedforward_recon.model import configs
from feedforward_recon.model.backbone import BackboneConfig
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.vggt import VggtConfig
from feedforward_recon.model.vit import VitConfig
from feedforward_recon.model.weights import registry
from feedforward_recon.model.weights.checkpoints import expected_tensors, load_weights
from feedforward_recon.model.weights.files import check_weights, fetch_weights
from feedforward_recon.model.weights.registry import CHECKPOINTS, Checkpoint, Licence, find_weights

LICENCE = Licence('Some Licence', 'https://example.org/licence', False)
HUB_MODULES = ('huggingface_hub', 'huggingface_hub.file_download', 'huggingface_hub.utils')
MICRO = Checkpoint('micro', 'micro', LICENCE, 0, 'someone/Micro')


class Hub(ModuleType):
    """A stand-in for huggingface_hub: one repository with one file, and a cache."""

    def __init__(self, content, cache):
        super().__init__('huggingface_hub')
        self.content, self.cache = content, cache
        self.etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.host = 'https://huggingface.co'
        self.starts, self.headers, self.cut = [], [], None

    def hf_hub_url(self, repo_id, filename, *, revision):
        return f'https://huggingface.co/{repo_id}/resolve/{revision}/{filename}'

    def get_hf_file_metadata(self, url):
        assert url in {f'https://huggingface.co/someone/Micro/resolve/{r}/model.safetensors'
                       for r in ('main', '7' * 40)}
        return SimpleNamespace(etag=self.etag, size=len(self.content), location=self.host + '/x')

    def http_get(self, url, temp_file, *, resume_size, headers, expected_size,
                 displayed_filename):
        assert url.startswith(self.host) and expected_size == len(self.content)
        self.starts.append(resume_size)
        self.headers.append(headers)
        temp_file.write(self.content[resume_size:self.cut])
        if self.cut is not None:
            raise ConnectionError('the line was cut\nand more')

    def build_hf_headers(self):
        return {'authorization': 'secret'}

    def try_to_load_from_cache(self, repo_id, filename, *, revision=None):
        file = self.cache / 'snapshots' / (revision or 'main') / filename
        return str(file) if file.is_file() else None


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """A hub with the weights of a network of few parameters, named micro in the registry."""
    config = VggtConfig(BackboneConfig(VitConfig(16, 2, 1, grid=2), 4, (0, 1, 2, 3)),
                        DptConfig(32, 8, (4, 4, 4, 4)))
    monkeypatch.setitem(configs.CONFIGS, 'micro', config)
    file = tmp_path / 'published' / 'model.safetensors'
    file.parent.mkdir()
    save_file(micro_weights(), file)
    hub = Hub(file.read_bytes(), tmp_path / 'cache')
    for module in HUB_MODULES:
        monkeypatch.setitem(sys.modules, module, hub)
    monkeypatch.delenv(registry.OFFLINE_VARIABLE, raising=False)
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(tmp_path / 'ours'))
    register(monkeypatch, MICRO)
    return hub


@pytest.fixture(scope='session')
def library():
    """The modules of the library itself, imported while no stand-in is in their place."""
    pytest.importorskip('huggingface_hub')
    return {name: import_module(name) for name in HUB_MODULES}


@pytest.fixture
def hub_constants(library, hub, monkeypatch):
    """The library itself in place of the stand-in, and its constants to change."""
    for name, module in library.items():
        monkeypatch.setitem(sys.modules, name, module)
    return import_module('huggingface_hub.constants')


@pytest.fixture
def ours(tmp_path):
    """The folder that downloads go to."""
    return tmp_path / 'ours'


def register(monkeypatch, checkpoint):
    monkeypatch.setitem(CHECKPOINTS, checkpoint.name, checkpoint)


def known(content):
    """The checkpoint micro with its size and hash published."""
    return dataclasses.replace(MICRO, size=len(content), revision='7' * 40,
                               sha256=hashlib.sha256(content).hexdigest())


def micro_weights():
    shapes = expected_tensors(configs.build('micro', device='meta'))
    generator = torch.Generator().manual_seed(0)
    return {key: 0.05 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def files_in(folder):
    return sorted(path.name for path in folder.rglob('*') if not path.is_dir())


def sentence(caught):
    text = str(caught.value)
    assert 'expected' in text and 'found' in text and '\n' not in text
    return text


def refused(capsys, *arguments):
    """The one line that the command says when it refuses; notes come before it."""
    code = main(['weights', *map(str, arguments)])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith('note:')]
    assert (code, out, len(lines)) == (2, '', 1), err
    assert lines[0].startswith('error: expected')
    return lines[0]


# The registry


def test_every_entry_is_complete():
    for name, entry in CHECKPOINTS.items():
        assert entry.name == name
        assert entry.model == 'compact' or entry.model in configs.CONFIGS
        assert entry.licence.url.startswith('https://')
        if entry.sha256:
            assert len(entry.sha256) == 64 and set(entry.sha256) <= set('0123456789abcdef')
            assert entry.is_pinned or 'lite3r' in name  # whose authors tell the hash alone
        if entry.repo:
            assert entry.repo.count('/') == 1 and entry.licence.name
    assert {'vggt-1b', 'vggt-1b-commercial', 'vgg-t3', 'pi3', 'speed3r', 'da3-large', 'da3-base',
            'da3-small', 'compact', 'tiny'} <= CHECKPOINTS.keys()


def test_every_architecture_that_can_be_asked_for_by_name_has_weights():
    published = {entry.model for entry in CHECKPOINTS.values()}
    sizes_of_tests_and_benchmarks = {'vggt-small', 'pi3-small', 'vggt-tiny'}
    assert set(configs.CONFIGS) - sizes_of_tests_and_benchmarks <= published


def test_non_commercial_licences_are_not_called_commercial():
    for entry in CHECKPOINTS.values():
        restricted = 'NC' in entry.licence.name or 'Noncommercial' in entry.licence.name
        assert entry.licence.commercial is not (restricted or entry is CHECKPOINTS['micro'])
    assert 'not military' in CHECKPOINTS['vggt-1b-commercial'].licence.use


@pytest.mark.parametrize('name', ['pi3', 'da3-large', 'da3-large-1.1', 'da3-base', 'da3-small'])
def test_published_sizes_leave_room_for_our_parameters_and_the_header_alone(name):
    """Bytes beyond the float32 parameters are names and shapes: some 100 per tensor."""
    model = configs.build(CHECKPOINTS[name].model, device='meta')
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    header = CHECKPOINTS[name].size - 4 * sum(t.numel() for t in tensors)
    assert 80 * len(tensors) < header < 160 * len(tensors)


def test_published_vggt_is_larger_by_its_track_head():
    shapes = expected_tensors(configs.build('vggt-1b', device='meta')).values()
    parameters = sum(math.prod(shape) for shape in shapes)
    assert 0.25e9 < CHECKPOINTS['vggt-1b'].size - 4 * parameters < 0.27e9
    assert CHECKPOINTS['vggt-1b'].size == CHECKPOINTS['vggt-1b-commercial'].size


def test_shipped_weights_are_the_registered_ones():
    report = check_weights('compact')
    assert (report.checked_against, report.keys.fits) == ('published', True)
    assert report.sha256 == CompactEncoder.load().sha256 == CHECKPOINTS['compact'].sha256
    assert fetch_weights('compact', offline=True) == report.file


# Finding


def test_the_order_of_places(hub, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, 'package_folder', lambda: tmp_path / 'package')
    cached = hub.cache / 'snapshots' / 'main' / 'model.safetensors'
    for file in (tmp_path / 'package' / 'micro.safetensors', cached, ours / 'micro.safetensors'):
        file.parent.mkdir(parents=True)
        file.write_bytes(hub.content)
        assert find_weights('micro') == file
    assert find_weights(cached) == find_weights(str(cached)) == cached
    assert hub.starts == []


def test_the_folder_is_in_the_users_cache_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv(registry.FOLDER_VARIABLE)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert registry.weights_folder() == tmp_path / 'feedforward_recon' / 'weights'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert registry.weights_folder() == tmp_path / '.cache' / 'feedforward_recon' / 'weights'


def test_a_later_revision_in_the_cache_counts_when_its_contents_are_the_same(hub, monkeypatch):
    entry = dataclasses.replace(known(hub.content), revision='a' * 40)
    register(monkeypatch, entry)
    blob = hub.cache / 'blobs' / entry.sha256
    link = hub.cache / 'snapshots' / 'main' / 'model.safetensors'
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    blob.write_bytes(hub.content)
    link.symlink_to(blob)
    assert find_weights('micro') == link
    register(monkeypatch, dataclasses.replace(entry, sha256='0' * 64))
    with pytest.raises(CheckpointError):
        find_weights('micro')


def test_the_cache_of_the_real_library_is_understood(tmp_path, monkeypatch, hub_constants):
    monkeypatch.setattr(hub_constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    repo = tmp_path / 'hub' / 'models--someone--Micro'
    file = repo / 'snapshots' / ('a' * 40) / 'model.safetensors'
    for path, text in ((file, 'weights'), (repo / 'refs' / 'main', 'a' * 40)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert find_weights('micro') == file
    file.unlink()
    with pytest.raises(CheckpointError):
        find_weights('micro')


def test_missing_weights_say_where_and_what_to_run(ours, monkeypatch):
    with pytest.raises(CheckpointError) as caught:
        find_weights('micro')
    assert all(words in sentence(caught) for words in (
        'model.safetensors of someone/Micro', str(ours / 'micro.safetensors'),
        'Hugging Face cache', 'run `ffrecon weights get micro`'))
    register(monkeypatch, dataclasses.replace(MICRO, repo=''))
    with pytest.raises(CheckpointError, match='reinstall the package'):
        find_weights('micro')


@pytest.mark.parametrize('path', ['a/b', 'w.safetensors', 'w.pt', '~/w.bin'])
def test_paths_that_lead_nowhere(path):
    with pytest.raises(CheckpointError) as caught:
        find_weights(path)
    assert 'no file' in sentence(caught) and os.path.expanduser(path) in sentence(caught)


def test_folders_and_files_in_each_others_place(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match='found a folder'):
        find_weights(tmp_path)
    file = tmp_path / 'file'
    file.write_text('')
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(file))
    with pytest.raises(CheckpointError) as caught:
        find_weights('micro')
    assert 'found a file' in sentence(caught)


@pytest.mark.parametrize(('name', 'hint'), [('vgt-1b', 'did you mean vggt-1b?'),
                                            ('da3-smal', 'did you mean da3-small?'),
                                            ('zzz', 'choose one of compact, tiny')])
def test_unknown_names_get_the_nearest(name, hint):
    for call in (find_weights, fetch_weights, check_weights):
        with pytest.raises(CheckpointError) as caught:
            call(name)
        assert hint in sentence(caught)


def test_without_the_hub_library_local_files_are_still_found(ours, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(CheckpointError, match='pip install huggingface_hub'):
        fetch_weights('micro', accept_licence=True)
    (ours / 'micro.safetensors').write_bytes(b'')
    assert find_weights('micro') == ours / 'micro.safetensors'


# Getting


def test_downloads_come_once_and_load(hub, ours):
    file = fetch_weights('micro', accept_licence=True)
    assert file == ours / 'micro.safetensors' and file.read_bytes() == hub.content
    assert fetch_weights('micro') == find_weights('micro') == file
    assert hub.starts == [0]
    model = configs.build('micro', device='meta')
    assert load_weights(model, file).fits
    assert files_in(ours) == ['micro.safetensors', 'micro.safetensors.sha256']


def test_the_hash_of_the_first_download_is_kept_and_checked_afterwards(hub):
    file = fetch_weights('micro', accept_licence=True)
    sha256 = hashlib.sha256(hub.content).hexdigest()
    assert file.with_name(file.name + '.sha256').read_text() == f'{sha256}  {file.name}\n'
    assert check_weights('micro').checked_against == 'first download'
    file.write_bytes(changed(hub.content))
    for call in (check_weights, fetch_weights):
        with pytest.raises(CheckpointError, match='SHA-256') as caught:
            call('micro')
        assert sha256[:16] in sentence(caught)


def test_files_put_there_by_hand_have_nothing_to_compare_with(hub, ours):
    ours.mkdir()
    (ours / 'micro.safetensors').write_bytes(hub.content)
    report = check_weights('micro')
    assert (report.checked_against, report.keys.fits) == ('', True)


def test_a_broken_connection_leaves_no_weights_and_the_next_try_goes_on(hub, ours):
    hub.cut = 1000
    with pytest.raises(CheckpointError) as caught:
        fetch_weights('micro', accept_licence=True)
    assert 'the line was cut; try again' in sentence(caught)
    with pytest.raises(CheckpointError, match='found none'):
        find_weights('micro')
    assert all(name.startswith('.') for name in files_in(ours))
    hub.cut = None
    assert fetch_weights('micro', accept_licence=True).read_bytes() == hub.content
    assert hub.starts == [0, 1000]
    assert files_in(ours) == ['micro.safetensors', 'micro.safetensors.sha256']


def test_parts_of_an_older_file_are_not_continued(hub, ours):
    hub.cut = 1000
    with pytest.raises(CheckpointError):
        fetch_weights('micro', accept_licence=True)
    hub.cut, hub.etag = None, '"another"'
    fetch_weights('micro', accept_licence=True)
    assert hub.starts == [0, 0]
    assert files_in(ours) == ['micro.safetensors', 'micro.safetensors.sha256']


@pytest.mark.parametrize(('more', 'starts'), [(b'', []), (b'twice', [0])])
def test_parts_that_are_whole_or_too_long(hub, ours, more, starts):
    """Whole: stopped just before the end; too long: two downloads wrote at once."""
    ours.mkdir()
    part = ours / f'.micro.{hashlib.sha256(hub.content).hexdigest()[:16]}.part.safetensors'
    part.write_bytes(hub.content + more)
    assert fetch_weights('micro', accept_licence=True).read_bytes() == hub.content
    assert hub.starts == starts


def test_no_record_overrules_a_registered_hash(hub, ours, monkeypatch):
    register(monkeypatch, known(hub.content))
    hub.content = changed(hub.content)
    hub.etag = f'"{hashlib.sha256(hub.content).hexdigest()}"'
    with pytest.raises(CheckpointError, match='SHA-256'):
        fetch_weights('micro', accept_licence=True)
    for name, content in (('', hub.content), ('.sha256', hub.etag[1:-1].encode())):
        (ours / f'micro.safetensors{name}').write_bytes(content)
    with pytest.raises(CheckpointError, match='SHA-256'):
        check_weights('micro')


def test_the_users_token_goes_to_the_hub_alone(hub, ours):
    fetch_weights('micro', accept_licence=True)
    (ours / 'micro.safetensors').unlink()
    hub.host = 'https://storage.example.org'
    fetch_weights('micro', accept_licence=True)
    assert hub.headers == [{'authorization': 'secret'}, {}]


def test_gated_repositories_say_how_to_get_in(hub, monkeypatch):
    register(monkeypatch, dataclasses.replace(MICRO, gated=True))
    hub.cut = 0
    with pytest.raises(CheckpointError) as caught:
        fetch_weights('micro', accept_licence=True)
    assert 'https://huggingface.co/someone/Micro' in sentence(caught)
    assert 'hf auth login' in sentence(caught)


def changed(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(('damage', 'word'), [
    (changed, 'SHA-256'), (lambda content: content[:-8], 'bytes'),
    (lambda content: content + b'x', 'bytes')])
def test_downloads_that_are_not_the_published_file_are_removed(hub, ours, monkeypatch, damage,
                                                               word):
    register(monkeypatch, known(hub.content))
    hub.content = damage(hub.content)
    with pytest.raises(CheckpointError, match=word) as caught:
        fetch_weights('micro', accept_licence=True)
    assert 'it was removed, fetch it again' in sentence(caught)
    assert files_in(ours) == []


@pytest.mark.parametrize(('etag', 'word'), [(None, 'SHA-256'), ('"no-hash"', 'damaged')])
def test_damaged_downloads_of_unregistered_hash_are_removed(hub, ours, etag, word):
    """The hub tells the hash of large files; without that, half a file still shows."""
    hub.etag, hub.content = etag or hub.etag, hub.content[:len(hub.content) // 2]
    with pytest.raises(CheckpointError, match=word) as caught:
        fetch_weights('micro', accept_licence=True)
    sentence(caught)
    assert files_in(ours) == []


def test_a_file_of_the_user_is_never_removed(hub, ours, monkeypatch):
    register(monkeypatch, known(hub.content))
    ours.mkdir()
    file = ours / 'micro.safetensors'
    file.write_bytes(changed(hub.content))
    with pytest.raises(CheckpointError, match='remove') as caught:
        fetch_weights('micro', accept_licence=True)
    assert str(file) in sentence(caught)
    assert file.is_file() and hub.starts == []


def test_folders_that_cannot_be_written(hub, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv(registry.FOLDER_VARIABLE, str(tmp_path / 'file' / 'below'))
    with pytest.raises(CheckpointError) as caught:
        fetch_weights('micro', accept_licence=True)
    assert 'set FEEDFORWARD_RECON_WEIGHTS' in sentence(caught)
    assert hub.starts == []


@pytest.mark.parametrize('word', ['1', 'true', 'YES', 'on', None])
def test_offline_never_touches_the_network(hub, ours, monkeypatch, word):
    if word:
        monkeypatch.setenv(registry.OFFLINE_VARIABLE, word)
    monkeypatch.setattr(hub, 'get_hf_file_metadata', None)
    with pytest.raises(CheckpointError) as caught:
        fetch_weights('micro', accept_licence=True, offline=word is None)
    assert all(words in sentence(caught) for words in (
        'huggingface.co/someone/Micro', f'put it at {ours / "micro.safetensors"}'))
    ours.mkdir()
    (ours / 'micro.safetensors').write_bytes(hub.content)
    fetch_weights('micro', offline=word is None)


@pytest.fixture
def server(hub):
    """A server on this machine that answers as the hub does; it keeps the ranges asked for."""
    content, etag = hub.content, hub.etag

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            known_path = self.path == '/someone/Micro/resolve/main/model.safetensors'
            asked = self.headers.get('Range', '')
            body = content[int(asked[6:-1] or 0) if asked else 0:] if known_path else b''
            self.send_response((206 if asked else 200) if known_path else 404)
            for name, value in (('ETag', etag), ('X-Repo-Commit', 'a' * 40),
                                ('Content-Length', len(body))):
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == 'GET' and known_path:
                server.ranges.append(asked)
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Answers)
    server.ranges = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_real_library_downloads_and_goes_on(hub, server, ours, monkeypatch, hub_constants):
    address = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(hub_constants, 'ENDPOINT', address)
    monkeypatch.setattr(hub_constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                        address + '/{repo_id}/resolve/{revision}/{filename}')
    assert fetch_weights('micro', accept_licence=True).read_bytes() == hub.content
    (ours / 'micro.safetensors').unlink()
    part = ours / f'.micro.{hashlib.sha256(hub.content).hexdigest()[:16]}.part.safetensors'
    part.write_bytes(hub.content[:1000])
    assert fetch_weights('micro', accept_licence=True).read_bytes() == hub.content
    assert server.ranges == ['', 'bytes=1000-']
    assert files_in(ours) == ['micro.safetensors', 'micro.safetensors.sha256']
    register(monkeypatch, dataclasses.replace(MICRO, name='gone', repo='someone/Gone'))
    with pytest.raises(CheckpointError, match='from the network') as caught:
        fetch_weights('gone', accept_licence=True)
    sentence(caught)


# The command


def test_nothing_is_downloaded_before_the_licence_is_accepted(hub, ours, capsys, monkeypatch):
    line = refused(capsys, 'get', 'micro')
    assert 'licence' in line and LICENCE.url in line and '--accept-licence' in line
    monkeypatch.setattr('sys.stdin.isatty', lambda: True, raising=False)
    monkeypatch.setattr('typer.confirm', lambda *_, **__: False)
    assert refused(capsys, 'get', 'micro') == line
    assert hub.starts == [] and not ours.exists()


@pytest.mark.parametrize('asked', [True, False])
def test_get_shows_the_licence_and_prints_the_file(hub, capsys, monkeypatch, asked):
    monkeypatch.setattr('sys.stdin.isatty', lambda: asked, raising=False)
    monkeypatch.setattr('typer.confirm', lambda *_, **__: True)
    accept = [] if asked else ['--accept-licence']
    assert main(['weights', 'get', 'micro', *accept]) == 0
    out, err = capsys.readouterr()
    assert out == f'{find_weights("micro")}\n'
    assert all(words in err for words in ('Some Licence', LICENCE.url, 'commercial use: no'))


def test_get_refuses_in_one_line(hub, capsys):
    assert 'did you mean micro?' in refused(capsys, 'get', 'mikro', '--accept-licence')
    assert 'put it' in refused(capsys, 'get', 'micro', '--offline')
    hub.cut = 10
    assert 'the line was cut' in refused(capsys, 'get', 'micro', '--accept-licence')


def test_list(hub, capsys, tmp_path, monkeypatch):
    assert main(['weights', 'list']) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in CHECKPOINTS)
    assert main(['weights', 'list', '--json']) == 0
    entries = {entry['name']: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries['compact']['file_here'].endswith('compact.safetensors')
    assert entries['micro']['file_here'] is None
    assert entries['pi3']['licence']['commercial'] is False
    assert hub.starts == []


def test_check_reports_everything(hub, capsys, tmp_path):
    stored = micro_weights()
    gone = 'camera_head.trunk_norm.bias'
    del stored[gone]
    stored['camera_head.extra'] = torch.zeros(3)
    stored['track_head.part'] = torch.zeros(3)
    stored['aggregator.camera_token'] = torch.zeros(1, 2, 1, 8)
    path = tmp_path / 'mine.safetensors'
    save_file(stored, path)
    assert main(['weights', 'check', str(path), '--model', 'micro']) == 2
    out, err = capsys.readouterr()
    assert f'missing {gone}\n' in out and 'unexpected camera_head.extra\n' in out
    assert 'shape aggregator.camera_token [1, 2, 1, 8] instead of [1, 2, 1, 16]\n' in out
    assert hashlib.sha256(path.read_bytes()).hexdigest() in out
    assert len(err.splitlines()) == 1 and 'another model' in err
    assert main(['weights', 'check', str(path), '--model', 'micro', '--json']) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report['missing'], report['ignored']) == ([gone], ['track_head.part'])
    assert report['fits'] is False and report['checked_against'] is None


def test_check_takes_names_and_files_named_after_checkpoints(hub, capsys, tmp_path):
    path = tmp_path / 'micro.safetensors'
    path.write_bytes(hub.content)
    assert main(['weights', 'check', str(path)]) == 0
    assert 'names and shapes fit' in capsys.readouterr().out
    other = path.rename(tmp_path / 'other.safetensors')
    assert '--model' in refused(capsys, 'check', other)
    assert "'no-model'" in refused(capsys, 'check', other, '--model', 'no-model')
    other.write_bytes(hub.content[:500])
    assert 'damaged' in refused(capsys, 'check', other, '--model', 'micro')
    assert 'ffrecon weights get micro' in refused(capsys, 'check', 'micro')


@pytest.mark.parametrize('command', ['', 'list', 'get', 'check'])
def test_help_teaches(command, capsys):
    assert main(['weights', *command.split(), '--help']) == 0
    assert 'ffrecon weights ' in capsys.readouterr().out
