"""Weights: from the hub's cache without a network, from files in every wrapper, adapted, and refused when wrong."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from parity.weights import image_batch, state_dict

import zoo
from zoo.errors import ZooError
from zoo.tools._load import build

KINDS = ['test_vig', 'test_vig_hier', 'test_ravlt', 'test_mobilemamba']
REVISION = 'af36a61ec24f7a35dd043cae3d1ec6216cc72c7b'  # of hustvl/ViG, whose files the models name
PARITY = Path(__file__).parent / 'parity'


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def source(kind):
    """A model with random weights that other models are to end up with."""
    torch.manual_seed(1)
    return timm.create_model(kind).eval()


def x(size=64, chans=3):
    return torch.randn(2, chans, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def same(a, b, size=64):
    return torch.equal(a.eval()(x(size)), b.eval()(x(size)))


def from_file(kind, path, **kwargs):
    return timm.create_model(kind, pretrained=True, pretrained_cfg_overlay={'file': str(path)}, **kwargs)


def lay_out_cache(home, name, weights):
    """The folder that a download of a model's published file leaves behind."""
    cfg = timm.models.get_pretrained_cfg(name)
    repo, _, revision = cfg.hf_hub_id.partition('@')
    revision = revision or REVISION
    repo_folder = home / 'hub' / f'models--{repo.replace("/", "--")}'
    snapshot = repo_folder / 'snapshots' / revision
    snapshot.mkdir(parents=True)
    (repo_folder / 'refs').mkdir()
    (repo_folder / 'refs' / 'main').write_text(revision)
    file = snapshot / cfg.hf_hub_filename
    file.parent.mkdir(exist_ok=True)
    torch.save(weights, file)


def run_offline(code, home):
    env = dict(os.environ, HF_HOME=str(home), HF_HUB_OFFLINE='1')
    env.pop('HF_HUB_CACHE', None)
    return subprocess.run([sys.executable, '-c', textwrap.dedent(code)], env=env, capture_output=True, text=True)


@pytest.mark.parametrize('name', ['vig_tiny_patch16_224', 'vig_hier_tiny_224', 'ravlt_tiny', 'mobilemamba_t2'])
def test_from_the_hub_cache_offline(name, tmp_path):
    """`pretrained=True` reads the authors' file, wrapped as they published it, and gives the recorded logits."""
    manifest = json.loads((PARITY / f'{name}.json').read_text())
    arrays = np.load(PARITY / f'{name}.npz')
    weights, wrapper = state_dict(manifest, arrays), manifest['wrapper']
    lay_out_cache(tmp_path, name, {wrapper: weights} if wrapper else weights)
    torch.save(image_batch(manifest['inputs']['x']), tmp_path / 'x.pt')
    logits = torch.from_numpy(arrays['out/logits'])
    torch.save(logits, tmp_path / 'logits.pt')
    limit = manifest.get('suggested_atol', 1e-4 * float(logits.std()))
    run = run_offline(
        f"""
        import timm, torch, zoo
        for name in ('{name}', '{name}.in1k'):
            model = timm.create_model(name, pretrained=True).eval()
            with torch.no_grad():
                logits = model(torch.load(r'{tmp_path}/x.pt'))
            error = (logits - torch.load(r'{tmp_path}/logits.pt')).abs().max().item()
            assert error < {limit}, error
        features = timm.create_model('{name}', pretrained=True, features_only=True)
        small = timm.create_model('{name}', pretrained=True, num_classes=7, in_chans=1).eval()
        print('loaded', tuple(small(torch.zeros(1, 1, 64, 64)).shape))
        """,
        tmp_path,
    )
    assert 'loaded (1, 7)' in run.stdout, run.stdout + run.stderr


def test_from_a_hub_repository_offline(kind, source, tmp_path):
    """A `hf-hub:` repository of our own, as timm's push_to_hf_hub writes it."""
    save_folder(source, kind, tmp_path / 'folder')
    repo = tmp_path / 'hub' / 'models--someone--mine'
    (repo / 'snapshots').mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text(REVISION)
    (tmp_path / 'folder').rename(repo / 'snapshots' / REVISION)
    torch.save(source(x()).detach(), tmp_path / 'expected.pt')
    run = run_offline(
        f"""
        import timm, torch, zoo
        model = timm.create_model('hf-hub:someone/mine', pretrained=True).eval()
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model(x), torch.load(r'{tmp_path}/expected.pt'))
        print('loaded', type(model).__name__)
        """,
        tmp_path,
    )
    assert f'loaded {type(source).__name__}' in run.stdout, run.stdout + run.stderr


def save_folder(model, kind, folder):
    from safetensors.torch import save_file

    folder.mkdir()
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in ('hf_hub_id', 'hf_hub_filename', 'architecture')}
    (folder / 'config.json').write_text(json.dumps({'architecture': kind, 'pretrained_cfg': cfg}))
    save_file(model.state_dict(), str(folder / 'model.safetensors'))


def test_from_a_local_folder(kind, source, tmp_path):
    save_folder(source, kind, tmp_path / 'mine')
    assert same(timm.create_model(f'local-dir:{tmp_path}/mine', pretrained=True), source)


@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict', 'model_ema', 'net_E', 'module.'])
def test_wrappers(kind, source, wrapper, tmp_path):
    weights = source.state_dict()
    other = {k: torch.zeros_like(v) for k, v in weights.items()}
    if wrapper is None:
        saved = weights
    elif wrapper == 'module.':
        saved = {'model': {f'module.{k}': v for k, v in weights.items()}}
    elif wrapper == 'model_ema':
        saved = {'model': other, 'model_ema': weights, 'epoch': 3, 'max_accuracy': 1.0}
    elif wrapper == 'net_E':
        saved = {'net': other, 'net_E': {f'module.{k}': v for k, v in weights.items()}, 'epoch': 3, 'total_time': 1.0}
    else:
        saved = {wrapper: weights}
    file = tmp_path / 'w.pth'
    torch.save(saved, file)
    assert same(from_file(kind, file), source)
    assert same(timm.create_model(kind, checkpoint_path=str(file)), source)
    assert same(build(kind, checkpoint=file), source)


def test_safetensors_file(kind, source, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / 'w.safetensors'
    save_file(source.state_dict(), str(file))
    assert same(from_file(kind, file), source)
    assert same(timm.create_model(kind, checkpoint_path=str(file)), source)


def test_code_in_a_checkpoint_is_not_run(kind, tmp_path):
    marker = tmp_path / 'ran'

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    file = tmp_path / 'evil.pth'
    torch.save({'model': Evil()}, file)
    for load in (
        lambda: from_file(kind, file),
        lambda: timm.create_model(kind, checkpoint_path=str(file)),
        lambda: build(kind, checkpoint=file),
    ):
        with pytest.raises((RuntimeError, ZooError), match='weights_only|UnpicklingError|RuntimeError'):
            load()
    assert not marker.exists()


def test_other_classes_and_channels(kind, source, tmp_path):
    file = tmp_path / 'w.pth'
    torch.save({'model': source.state_dict()}, file)
    model = from_file(kind, file, num_classes=5, in_chans=1).eval()
    assert model(x(chans=1)).shape == (2, 5)
    mine, theirs = model.state_dict(), source.state_dict()
    first, head = (source.default_cfg[k] + '.weight' for k in ('first_conv', 'classifier'))
    torch.testing.assert_close(mine[first], theirs[first].sum(1, keepdim=True))
    adapted = {first, head, head.replace('weight', 'bias')}
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs.keys() - adapted)
    headless = from_file(kind, file, num_classes=0).eval()
    with torch.no_grad():
        pooled = source.forward_head(source.forward_features(x()), pre_logits=True)
        assert torch.equal(headless(x()), pooled)


def test_other_image_size(kind, source, tmp_path):
    """A checkpoint loads at another img_size and gives what the original computes at that size, or nearly."""
    file = tmp_path / 'w.pth'
    torch.save({'model': source.state_dict()}, file)
    bigger = from_file(kind, file, img_size=160).eval()
    with torch.no_grad():
        # Resampled once at loading or at every call: the same bicubic rule.
        torch.testing.assert_close(bigger(x(160)), source(x(160)), rtol=1e-4, atol=1e-5)
        assert bigger(x(96)).shape == (2, 1000)


@pytest.mark.parametrize('route', ['file', 'checkpoint_path', 'tools'])
def test_wrong_file_gives_a_short_list(kind, route, tmp_path):
    other = timm.create_model('vig_hier_tiny_224' if kind == 'test_vig' else 'vig_tiny_patch16_224')
    file = tmp_path / 'other.pth'
    torch.save({'model': other.state_dict()}, file)
    routes = {
        'file': lambda: from_file(kind, file),
        'checkpoint_path': lambda: timm.create_model(kind, checkpoint_path=str(file)),
        'tools': lambda: build(kind, checkpoint=file),
    }
    with pytest.raises((RuntimeError, ZooError)) as error:
        routes[route]()
    text = str(error.value)
    assert len(text.splitlines()) <= 15 and len(text) < 2000, text
    assert 'missing' in text and 'unexpected' in text


def test_backbone_of_a_detector(kind, source, tmp_path):
    """A detector's file has the backbone's keys under `backbone.`, norms of its maps, a neck, and no classifier."""
    detector = {f'backbone.{k}': v for k, v in source.state_dict().items() if not k.startswith(('head', 'classifier'))}
    detector |= {'neck.weight': torch.zeros(3), 'backbone.outnorm0.weight': torch.zeros(3)}
    torch.save({'meta': {'epoch': 1}, 'state_dict': detector}, tmp_path / 'w.pth')
    maps = from_file(kind, tmp_path / 'w.pth', features_only=True).eval()
    with torch.no_grad():
        wanted = source.forward_intermediates(x(), indices=maps.feature_info.out_indices, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps(x()), wanted, strict=True))


@pytest.mark.parametrize('kwargs', [{'num_classes': 7}, {'features_only': True}], ids=str)
def test_file_without_a_single_known_key_is_refused(kind, kwargs, tmp_path):
    """Where a new head allows for missing keys, a file of another network must not leave random weights behind."""
    torch.save({'encoder.weight': torch.zeros(3), 'encoder.bias': torch.zeros(3)}, tmp_path / 'w.pth')
    with pytest.raises(RuntimeError, match=r'unexpected \(2\): encoder.weight, encoder.bias'):
        from_file(kind, tmp_path / 'w.pth', **kwargs)


def test_wrong_shapes_are_named(kind, source, tmp_path):
    weights = source.state_dict()
    key = next(k for k in weights if k.endswith(('qkv_proj.weight', 'qkvo.weight', 'pw1.c.weight')))
    weights[key] = weights[key][:-2]
    torch.save(weights, tmp_path / 'w.pth')
    with pytest.raises(RuntimeError, match=key) as error:
        from_file(kind, tmp_path / 'w.pth')
    assert len(str(error.value)) < 1000


def test_truncated_and_missing_files(kind, source, tmp_path):
    file = tmp_path / 'w.pth'
    torch.save(source.state_dict(), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ZooError, match='cannot read'):
        build(kind, checkpoint=file)
    with pytest.raises(ZooError, match='no such'):
        build(kind, checkpoint=tmp_path / 'absent.pth')
    (tmp_path / 'text.pth').write_text('hello')
    with pytest.raises(ZooError, match='cannot read'):
        build(kind, checkpoint=tmp_path / 'text.pth')


def test_missing_weights_offline_say_what_to_do(tmp_path):
    run = run_offline(
        """
        from zoo.errors import ZooError
        from zoo.tools._load import build
        try:
            build('vig_tiny_patch16_224', pretrained=True)
        except ZooError as error:
            print(error)
        """,
        tmp_path,
    )
    for word in ('hf download', 'HF_HOME', '--checkpoint', 'vig_t_77p2acc.pth'):
        assert word in run.stdout, run.stdout + run.stderr
    with pytest.raises(ZooError, match='no weights are published'):
        build('test_vig', pretrained=True)


def test_older_hier_names_and_convolution_shapes(tmp_path):
    """Files from before the authors renamed modules, with linears stored as 1 x 1 convolutions."""
    source = timm.create_model('test_vig_hier').eval()
    renames = {'classifier.norm.': 'norm.', 'classifier.head.': 'head.', '.norm.': '.ln_1.', '.op.': '.self_attention.'}
    renames |= {'patch_embed.0.': 'patch_embed.proj.', 'patch_embed.2.': 'patch_embed.norm.'}
    old = {}
    for key, value in source.state_dict().items():
        for new_name, old_name in renames.items():
            in_block = new_name in ('.norm.', '.op.') and '.blocks.' in key
            if key.startswith(new_name) or in_block:
                key = key.replace(new_name, old_name, 1)
        if value.ndim == 2 and not key.startswith('head.'):
            value = value[:, :, None, None]
        old[key] = value
    torch.save({'model': old}, tmp_path / 'old.pth')
    assert same(from_file('test_vig_hier', tmp_path / 'old.pth'), source)


@pytest.mark.net
@pytest.mark.parametrize('name', zoo.list_models(capability='pretrained'))
def test_published_file_loads(name):
    assert timm.create_model(name, pretrained=True).num_classes == 1000
