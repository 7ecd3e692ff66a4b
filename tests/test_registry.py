"""Names, capabilities and what importing costs."""

import subprocess
import sys

import pytest
import timm
import torch

import zoo
from zoo.errors import ZooError
from zoo.registry import CAPABILITIES, PUBLISHED_TOP1, capabilities, check_name, family

VIG = [
    'vig_tiny_patch16_224',
    'vig_small_patch16_224',
    'vig_base_patch16_224',
    'vig_hier_tiny_224',
    'vig_hier_small_224',
    'vig_hier_base_224',
]


def test_names():
    names = zoo.list_models()
    assert set(VIG) | {'test_vig', 'test_vig_hier'} <= set(names)
    assert len(names) == len(set(names))
    assert set(names) <= set(timm.list_models())
    assert not {'resnet50', 'deit_tiny_patch16_224'} & set(names)


def test_filters():
    assert zoo.list_models('vig_hier*') == [n for n in zoo.list_models() if n.startswith('vig_hier')]
    assert zoo.list_models('hier') == [n for n in zoo.list_models() if 'hier' in n]
    assert set(zoo.list_models(['*tiny*', '*small*'])) == {n for n in zoo.list_models() if 'tiny' in n or 'small' in n}
    assert zoo.list_models('no_such_*') == []


def test_create_model_is_timms():
    assert zoo.create_model is timm.create_model
    torch.manual_seed(0)
    ours = zoo.create_model('test_vig').state_dict()
    torch.manual_seed(0)
    theirs = timm.create_model('test_vig').state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_unknown_capability_names_the_known_ones():
    with pytest.raises(ValueError, match='features_only, export, dense, pretrained'):
        zoo.list_models(capability='segmentation')


def test_unknown_name_says_what_to_type():
    with pytest.raises(ZooError, match='vig_tiny_patch16_224.*zoo list'):
        check_name('vig_tiny_patch16')
    with pytest.raises(ZooError, match='deit_tiny'):
        check_name('deit_tiny_patch16_2244')
    assert check_name('vig_tiny_patch16_224.in1k') == 'vig_tiny_patch16_224.in1k'
    with pytest.raises(ZooError, match="timm's models"):
        capabilities('resnet18')
    assert family('resnet18') is None and family('test_vig') == 'vig'


@pytest.mark.parametrize('name', zoo.list_models(capability='features_only'))
def test_features_only_is_true(name):
    with torch.device('meta'):
        model = timm.create_model(name, features_only=True).eval()
        maps = model(torch.zeros(1, 3, 64, 64))
    for channels, stride, x in zip(model.feature_info.channels(), model.feature_info.reduction(), maps):
        assert x.shape == (1, channels, 64 // stride, 64 // stride)


@pytest.mark.parametrize('size', [(64, 64), (97, 65), (131, 200), (33, 224)])
@pytest.mark.parametrize('name', zoo.list_models(capability='dense'))
def test_dense_is_true(name, size):
    with torch.device('meta'):
        model = timm.create_model(name, features_only=True).eval()
        maps = model(torch.zeros(1, 3, *size))
    for stride, x in zip(model.feature_info.reduction(), maps):
        for pixels, cells in zip(size, x.shape[2:]):
            # A strided stem may round up or down where the stride does not divide the size.
            assert pixels // stride <= cells <= -(-pixels // stride), f'{pixels} px at stride {stride}: {cells} cells'


@pytest.mark.parametrize('name', zoo.list_models())
def test_pretrained_is_true(name):
    cfg = timm.models.get_pretrained_cfg(name)
    published = bool(cfg.hf_hub_id and cfg.hf_hub_filename)
    assert ('pretrained' in capabilities(name)) == published
    assert (name in PUBLISHED_TOP1) == published
    if published:
        assert cfg.license and cfg.origin_url
        assert f'{PUBLISHED_TOP1[name]:.1f} %' in cfg.description
        if family(name) == 'vig':  # the authors put the accuracy into the file name: vig_t_77p2acc.pth
            assert f'_{PUBLISHED_TOP1[name]:.1f}acc'.replace('.', 'p') in cfg.hf_hub_filename


def test_every_model_has_a_row():
    for name in zoo.list_models():
        assert capabilities(name) <= set(CAPABILITIES)


def test_import_is_light():
    heavy = ('transformers', 'diffusers', 'open_clip', 'lightning', 'pytorch_lightning', 'onnx', 'matplotlib')
    code = f'import sys, zoo; print([m for m in {heavy} if m in sys.modules])'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.stdout.strip() == '[]', run.stdout + run.stderr


def test_import_without_warnings():
    run = subprocess.run([sys.executable, '-W', 'error', '-c', 'import zoo'], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
