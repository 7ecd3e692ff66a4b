"""What timm asks of a model, asked of every model of the zoo.

After timm's own tests/test_models.py. Small variants are run; of the large ones, whatever depends on shapes and names
alone is checked without computing (the meta device), and one forward and backward pass of the smallest of them is run.
"""

import copy
import fnmatch
import math

import pytest
import timm
import torch
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from zoo.backbones._features import PyramidMixin

import zoo

ALL = zoo.list_models()
# Less is asked of networks that differ from another only in their widths or their size of image.
ALIKE = ['mobilemamba_t4', 'mobilemamba_s6', 'mobilemamba_b2', 'mobilemamba_b4', 'ravlt_small', 'ravlt_large']
DISTINCT = [n for n in ALL if n not in ALIKE]
SMALL = [n for n in ALL if n.startswith('test_')]
RUN = SMALL + ['mobilemamba_t2', 'vig_tiny_patch16_224', 'vig_hier_tiny_224']
TOKEN_MODELS = ['vig_tiny*', 'vig_small*', 'vig_base*', 'test_vig']


def is_token_model(name):
    return any(fnmatch.fnmatch(name, p) for p in TOKEN_MODELS)


def meta(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs).eval()


def images(*size, batch=1, chans=3):
    return torch.randn(batch, chans, *(size or (64, 64)))


def channels_of(x):
    return x.shape[-1] if x.ndim == 3 else x.shape[1]


def test_small_variants_are_small():
    assert len(SMALL) >= 2
    for name in SMALL:
        assert sum(p.numel() for p in meta(name).parameters()) < 1_000_000


@pytest.mark.parametrize('name', RUN)
def test_forward(name):
    model = timm.create_model(name).eval()
    size = model.default_cfg['input_size'][1:]
    with torch.no_grad():
        out = model(images(*size))
    assert out.shape == (1, model.num_classes)
    assert out.isfinite().all()


@pytest.mark.parametrize('name', ALL)
def test_forward_shapes(name):
    model = meta(name)
    out = model(torch.zeros(2, *model.default_cfg['input_size'], device='meta'))
    assert out.shape == (2, model.num_classes)


@pytest.mark.parametrize('size', [(96, 96), (64, 128), (101, 77), (200, 65), (32, 32)])
@pytest.mark.parametrize('name', SMALL)
def test_forward_at_any_size(name, size):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        both = model(images(*size, batch=2))
        torch.manual_seed(0)
        x = images(*size, batch=2)
        alone = torch.cat([model(x[:1]), model(x[1:])])
        assert both.shape == (2, 1000) and both.isfinite().all()
        assert model(x[:0]).shape == (0, 1000)
        torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', RUN)
def test_backward_reaches_every_parameter(name):
    model = timm.create_model(name, num_classes=42).train()
    out = model(images(batch=2))
    assert out.shape == (2, 42) and out.isfinite().all()
    out.mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without, f'no gradient for {without}'
    bad = [n for n, p in model.named_parameters() if not p.grad.isfinite().all()]
    assert not bad, f'gradients that are not finite: {bad}'


@pytest.mark.parametrize('name', SMALL)
def test_training_and_evaluation_compute_the_same(name):
    """Up to batch norms, which use the batch's statistics in training."""
    model = timm.create_model(name)
    x = images(batch=2)
    model.train()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.eval()
    torch.testing.assert_close(model(x), model.eval()(x))


@pytest.mark.parametrize('name', ALL)
def test_default_cfg(name):
    model = meta(name)
    cfg, state = model.default_cfg, model.state_dict()
    x = torch.zeros(1, *cfg['input_size'], device='meta')
    assert cfg['architecture'] == name and cfg['num_classes'] == model.num_classes > 0
    assert cfg['mean'] and cfg['std'] and 0 < cfg['crop_pct'] <= 1 and cfg['interpolation']
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert channels_of(features) == model.num_features
    assert pooled.shape == (1, model.head_hidden_size)
    if features.ndim == 4:
        assert tuple(features.shape[2:]) == tuple(cfg['pool_size'])
    for key in ('classifier', 'first_conv'):
        assert cfg[key] + '.weight' in state
    first = model.get_submodule(cfg['first_conv'])
    assert first.weight.shape[1] == cfg['input_size'][0]
    assert model.get_classifier() is model.get_submodule(cfg['classifier'])


@pytest.mark.parametrize('name', DISTINCT)
def test_reset_classifier(name):
    model = meta(name)
    x = torch.zeros(1, 3, 64, 64, device='meta')
    unpooled = model.forward_features(x)
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == (1, model.num_features)
    model.reset_classifier(0, '')
    assert model(x).shape == unpooled.shape
    model.reset_classifier(7, 'avg')
    assert model.num_classes == 7 and model(x).shape == (1, 7)
    assert meta(name, num_classes=0)(x).shape == (1, model.num_features)
    assert meta(name, num_classes=0, global_pool='')(x).shape == unpooled.shape
    with pytest.raises(ValueError, match='global_pool'):
        model.reset_classifier(5, 'no such pooling')
    assert model.num_classes == 7 and model(x).shape == (1, 7), 'what is refused changes nothing'


@pytest.mark.parametrize('name', SMALL)
def test_forward_is_its_parts(name):
    model = timm.create_model(name).eval()
    x = images()
    with torch.no_grad():
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model.get_classifier()(pooled), model(x))


@pytest.mark.parametrize('name', ALL)
def test_features_only(name):
    model = meta(name, features_only=True)
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3
    size = (96, 160)
    maps = model(torch.zeros(1, 3, *size, device='meta'))
    assert [m.shape[1] for m in maps] == channels
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(math.ceil(s / r) for s in size) for r in strides]
    if not is_token_model(name):
        assert strides == ([16, 32, 64] if 'mobilemamba' in name else [4, 8, 16, 32])


@pytest.mark.parametrize('name', SMALL)
def test_wrappers_that_would_give_other_maps_are_refused(name):
    assert timm.create_model(name, features_only=True, feature_cls='getter').feature_info.channels()
    for wrapper in ('fx', 'hook', 'list', 'dict'):
        with pytest.raises(ValueError, match='leave it out'):
            timm.create_model(name, features_only=True, feature_cls=wrapper)


@pytest.mark.parametrize('name', SMALL)
def test_features_only_values(name):
    """The wrapper returns what forward_intermediates does, for default and chosen indices, without a head's weights."""
    x = images(96, 64)
    full = timm.create_model(name).eval()
    for kwargs in ({}, {'out_indices': (0, 2)}, {'out_indices': (-1,)}):
        wrapped = timm.create_model(name, features_only=True, **kwargs).eval()
        missing = wrapped.load_state_dict(full.state_dict(), strict=False).missing_keys
        missing += wrapped.model.load_state_dict(full.state_dict(), strict=False).missing_keys if missing else []
        with torch.no_grad():
            wanted = full.forward_intermediates(x, indices=wrapped.feature_info.out_indices, intermediates_only=True)
            for a, b in zip(wrapped(x), wanted, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize('name', DISTINCT)
def test_forward_intermediates_shapes(name):
    model = meta(name)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    size = (96, 70)
    x = torch.zeros(1, 3, *size, device='meta')
    final, maps = model.forward_intermediates(x, output_fmt='NCHW')
    assert final.shape == model.forward_features(x).shape
    assert [m.shape[1] for m in maps] == info.channels()
    for stride, m in zip(info.reduction(), maps):
        assert all(s // stride <= n <= math.ceil(s / stride) for s, n in zip(size, m.shape[2:]))
    flat = 'NLC' if is_token_model(name) else 'NHWC'
    for a, b in zip(maps, model.forward_intermediates(x, output_fmt=flat, intermediates_only=True), strict=True):
        assert b.shape[-1] == a.shape[1] and b[0].numel() == a[0].numel()
    with pytest.raises(ValueError, match='output_fmt'):
        model.forward_intermediates(x, output_fmt='NTC')


@pytest.mark.parametrize('name', SMALL)
def test_forward_intermediates_values(name):
    model = timm.create_model(name).eval()
    x = images(80, 96, batch=2)
    flat = 'NLC' if is_token_model(name) else 'NHWC'
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        last2 = model.forward_intermediates(x, indices=2, intermediates_only=True)
        for a, b in zip(last2, maps[-2:], strict=True):
            torch.testing.assert_close(a, b)
        first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(first[0], maps[0])
        for a, b in zip(model.forward_intermediates(x, output_fmt=flat, intermediates_only=True), maps, strict=True):
            b = b.flatten(2).transpose(1, 2) if flat == 'NLC' else b.permute(0, 2, 3, 1)
            torch.testing.assert_close(a, b)
        if getattr(type(model), 'intermediate_norm', None) is PyramidMixin.intermediate_norm:
            with pytest.raises(ValueError, match='norm must be False'):
                model.forward_intermediates(x, norm=True)
        else:
            normed = model.forward_intermediates(x, norm=True, intermediates_only=True)[-1]
            normed = normed.flatten(2).transpose(1, 2) if final.ndim == 3 else normed
            torch.testing.assert_close(normed, final)
    model.train()
    plain = model.forward_intermediates(x)[0]
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
def test_prune_intermediate_layers(name):
    model = timm.create_model(name).eval()
    pruned = copy.deepcopy(model)
    x = images()
    with torch.no_grad():
        wanted = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        take = pruned.prune_intermediate_layers([0, 1], prune_norm=True, prune_head=True)
        assert take == [0, 1]
        assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
        got = pruned.forward_intermediates(x, indices=take, intermediates_only=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert pruned.num_classes == 0 and pruned(x).ndim == 2


@pytest.mark.parametrize('name', SMALL)
def test_grad_checkpointing_changes_nothing(name):
    model = timm.create_model(name, num_classes=5).train()
    x = images(batch=2)

    def run():
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    plain, plain_grads = run()
    model.set_grad_checkpointing()
    out, grads = run()
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    for n, g in grads.items():
        torch.testing.assert_close(g, plain_grads[n], rtol=1e-3, atol=1e-5, msg=lambda m, n=n: f'{n}: {m}')
    model.set_grad_checkpointing(False)
    torch.testing.assert_close(run()[0], plain)


@pytest.mark.parametrize('name', ALL)
def test_layer_decay_groups(name):
    """Every parameter gets a scale, the head's is 1, and scales never fall from the stem to the head."""
    model = meta(name)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): g['lr_scale'] for g in groups for p in g['params']}
    named = dict(model.named_parameters())
    assert scale.keys() == {id(p) for p in named.values()}
    assert all(scale[id(p)] == 1.0 for p in model.get_classifier().parameters())
    stem = scale[id(named[model.default_cfg['first_conv'] + '.weight'])]
    assert stem == min(scale.values()) < 0.5
    assert len(set(scale.values())) >= 4
    blocks = [scale[id(p)] for n, p in named.items() if n.startswith(('blocks', 'layers.'))]
    assert blocks == sorted(blocks)


@pytest.mark.parametrize('name', SMALL)
def test_weight_decay_filter(name):
    model = timm.create_model(name)
    names = dict(model.named_parameters())
    assert set(model.no_weight_decay()) <= set(names)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05)
    undecayed = {id(p) for g in optimizer.param_groups if not g['weight_decay'] for p in g['params']}
    for n, p in names.items():
        assert (id(p) in undecayed) == (p.ndim <= 1 or n in model.no_weight_decay()), n


def fx_model(model):
    tracer = dict(
        leaf_modules=get_notrace_modules(),
        autowrap_functions=get_notrace_functions(),
        param_shapes_constant=True,
    )
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    return create_feature_extractor(
        model,
        train_return_nodes=[train_nodes[-1]],
        eval_return_nodes=[eval_nodes[-1]],
        tracer_kwargs=tracer,
    )


@pytest.mark.parametrize('name', RUN)
def test_fx_forward(name):
    model = timm.create_model(name).eval()
    x = images(96, 96)
    with torch.inference_mode():
        expected = model(x)
        (traced,) = fx_model(model)(x).values()
    assert torch.equal(traced, expected)


@pytest.mark.parametrize('name', SMALL)
def test_fx_backward(name):
    model = fx_model(timm.create_model(name, num_classes=42).train())
    (out,) = model(images(batch=2)).values()
    out.mean().backward()
    assert out.shape == (2, 42)
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize('name', DISTINCT)
def test_other_channels_and_classes(name):
    model = meta(name, in_chans=1, num_classes=3)
    assert model(torch.zeros(1, 1, 64, 64, device='meta')).shape == (1, 3)
    assert meta(name, in_chans=5)(torch.zeros(1, 5, 64, 64, device='meta')).shape == (1, 1000)


@pytest.mark.parametrize('name', SMALL)
def test_state_dict_round_trip(name, tmp_path):
    model = timm.create_model(name).eval()
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    other = timm.create_model(name).eval()
    x = images()
    with torch.no_grad():
        assert not torch.equal(other(x), model(x))
        other.load_state_dict(torch.load(tmp_path / 'weights.pth', weights_only=True))
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize('name', SMALL)
def test_deepcopy_and_double(name):
    model = timm.create_model(name).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        # How far fp32 is from fp64; anything near 1e-3 would be a precision leak.
        torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', SMALL)
def test_autocast_trains(name, dtype):
    model = timm.create_model(name, num_classes=5).train()
    x = images(batch=2)
    with torch.autocast('cpu', dtype):
        out = model(x)
    out.float().square().sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()  # batch statistics of two samples would blow up any difference
    with torch.autocast('cpu', dtype):
        out = model(x)
    torch.testing.assert_close(out.float(), model(x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize('name', SMALL)
def test_compile_without_graph_breaks(name):
    model = timm.create_model(name).eval()
    x = images()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ALL)
def test_token_mixers_are_named(name):
    model = meta(name)
    mixers = model.token_mixers()
    assert mixers
    for module, kind in mixers:
        model.get_submodule(module)
        assert ('linear' in kind) or ('softmax' in kind)


@pytest.mark.parametrize('name', SMALL)
def test_drop_rates(name):
    model = timm.create_model(name, drop_path_rate=0.5, drop_rate=0.5).train()
    x = images(batch=2)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
