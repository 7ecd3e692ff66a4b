"""Pyramids of backbones by name: levels as announced, freezing by dependence, simple pyramids of plain models."""

from functools import partial

import pytest
import torch
from zoo.heads._pyramid import Pyramid

# a plain model, one with channels-last maps, maps below stride 4, a fixed size, and the zoo's families
BACKBONES = {
    'test_vig_hier': {},
    'test_ravlt': {},
    'test_mobilemamba': {},
    'test_vig': {},
    'test_vit': {'dynamic_img_size': True},
    'swin_tiny_patch4_window7_224': {'img_size': 64, 'window_size': 2, 'depths': (1, 1, 1, 1), 'embed_dim': 24},
    'test_efficientnet': {},
}


@pytest.mark.parametrize('name', BACKBONES)
def test_levels(name):
    """Maps have the channels and strides announced, and every parameter matters to one of them."""
    pyramid = Pyramid(name, kwargs=BACKBONES[name], norms=True)
    maps = pyramid(torch.rand(2, 3, 64, 64))
    assert pyramid.strides[0] >= 4 and pyramid.strides == sorted(set(pyramid.strides))
    for x, channels, stride in zip(maps, pyramid.channels, pyramid.strides, strict=True):
        assert x.shape == (2, channels, 64 // stride, 64 // stride)
    sum(x.square().sum() for x in maps).backward()
    unused = [n for n, p in pyramid.named_parameters() if p.grad is None]
    assert not unused, unused


@pytest.mark.parametrize('name', ['test_ravlt', 'test_efficientnet'])
def test_frozen(name):
    """What the first map depends on does not train, statistics included; everything behind it does."""
    pyramid = Pyramid(name, frozen=1)
    before = {k: v.clone() for k, v in pyramid.state_dict().items()}
    maps = pyramid(torch.rand(2, 3, 64, 64))
    assert not maps[0].requires_grad and all(x.requires_grad for x in maps[1:])
    after = pyramid.state_dict()
    frozen = {n for n, p in pyramid.named_parameters() if not p.requires_grad}
    stem = next(k for k in before if k.endswith('running_mean') and k.replace('running_mean', 'weight') in frozen)
    torch.testing.assert_close(after[stem], before[stem])
    moved = [k for k in before if k.endswith('running_mean') and not torch.equal(before[k], after[k])]
    assert moved
    still = Pyramid(name, freeze_norms=True)
    still(torch.rand(2, 3, 64, 64))
    assert all(not m.training for m in still.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_norms_without_weights_train():
    norm = partial(torch.nn.BatchNorm2d, affine=False)
    for freeze, moves in ((False, True), (True, False)):
        pyramid = Pyramid('resnet10t', kwargs={'norm_layer': norm}, freeze_norms=freeze).train()
        pyramid(torch.rand(2, 3, 64, 64))
        means = [v for k, v in pyramid.state_dict().items() if k.endswith('running_mean')]
        assert means and all(bool(mean.any()) == moves for mean in means)


def test_finer_levels():
    pyramid = Pyramid('test_mobilemamba', finer=2).eval()
    assert pyramid.strides == [4, 8, 16, 32, 64] and pyramid.channels == [48, 48, 48, 64, 80]
    assert [x.shape[-1] for x in pyramid(torch.rand(1, 3, 64, 64))] == [16, 8, 4, 2, 1]


def test_chosen_maps():
    assert Pyramid('test_ravlt', out_indices=[1, 2, 3]).strides == [8, 16, 32]
    assert Pyramid('test_efficientnet', out_indices=[0, 1]).strides == [2, 4]


@pytest.mark.parametrize(
    'arguments, words',
    [
        (dict(name='vig_giant'), "no model named 'vig_giant'"),
        (dict(name='test_ravlt', out_indices=[7]), 'gives no feature maps'),
        (dict(name='test_ravlt', frozen=5), 'frozen=5: test_ravlt gives 4 maps'),
        (dict(name='test_ravlt', finer=3), 'finer=3'),
    ],
    ids=lambda v: v if isinstance(v, str) else v['name'],
)
def test_mistakes(arguments, words):
    with pytest.raises(ValueError, match=words):
        Pyramid(**arguments)
