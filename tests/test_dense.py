"""Maps for dense heads: strides, channels, places and gradients on odd sizes, for the small variant of every family."""

import math

import pytest
import timm
import torch

import zoo

NAMES = [n for n in zoo.list_models(capability='features_only') if n.startswith('test_')]
ODD = (101, 77)


def dense(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, features_only=True, **kwargs).eval()


def images(*size, batch=1, dtype=torch.float32):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def is_pyramid(model):
    return len(set(model.feature_info.reduction())) > 1


def test_every_family_is_here():
    families = {zoo.registry.family(n) for n in zoo.list_models(capability='features_only')}
    assert families == {zoo.registry.family(n) for n in NAMES} and len(NAMES) >= 2


@pytest.mark.parametrize('size', [ODD, (64, 96), (33, 130), (225, 31)])
@pytest.mark.parametrize('name', NAMES)
def test_strides_and_channels(name, size):
    model = dense(name)
    strides, channels = model.feature_info.reduction(), model.feature_info.channels()
    with torch.no_grad():
        maps = model(images(*size, batch=2))
    for stride, width, found in zip(strides, channels, maps, strict=True):
        cells = tuple(math.ceil(s / stride) for s in size)
        if is_pyramid(model):
            assert found.shape == (2, width, *cells)
        else:  # the patch embedding's convolutions decide about an incomplete patch
            assert found.shape[:2] == (2, width) and all(0 <= c - n <= 1 for c, n in zip(cells, found.shape[2:]))
        assert found.isfinite().all()
    if is_pyramid(model):
        assert all(b == 2 * a for a, b in zip(strides, strides[1:]))


@pytest.mark.parametrize('place', [(20, 60), (80, 16), (52, 40)])
@pytest.mark.parametrize('name', NAMES)
def test_a_cell_sees_its_own_place(name, place):
    """What changes in the image changes the maps most where it is: nothing is transposed, flipped or shifted."""
    model = dense(name)
    x = images(*ODD)
    changed = x.clone()
    changed[:, :, place[0] - 3 : place[0] + 4, place[1] - 3 : place[1] + 4] += 5
    with torch.no_grad():
        before, after = model(x), model(changed)
    for stride, a, b in zip(model.feature_info.reduction(), before, after):
        effect = (a - b).square().sum(1)[0]
        row, column = divmod(int(effect.argmax()), effect.shape[1])
        for cell, centre in ((row, place[0]), (column, place[1])):
            assert abs((cell + 0.5) * stride - centre) <= 1.5 * stride, f'stride {stride}: {row}, {column} for {place}'


@pytest.mark.parametrize('name', NAMES)
def test_gradients_are_derivatives(name):
    """Along random directions, in fp64 and at an odd size: of every map with respect to image and parameters."""
    model = dense(name).double()
    x = images(45, 37, dtype=torch.float64)
    rng = torch.Generator().manual_seed(2)
    for p in model.parameters():  # fresh ones sit on kinks: a ReLU of a norm with weight and bias 0
        p.data.add_(torch.randn(p.shape, generator=rng, dtype=p.dtype), alpha=0.05)
    leaves = [x.requires_grad_(), *model.parameters()]
    steps = [torch.randn(p.shape, generator=rng, dtype=p.dtype) * (p.detach().abs().mean() + 1e-3) for p in leaves]
    weights = [torch.randn(m.shape, generator=rng, dtype=m.dtype) for m in model(x)]

    def values():
        return torch.stack([(m * w).sum() for m, w in zip(model(x), weights)])

    def moved(amount):
        with torch.no_grad():
            for leaf, step in zip(leaves, steps):
                leaf.add_(step, alpha=amount)
            return values()

    slopes = []
    for value in values():
        grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        slopes.append(sum((g * s).sum() for g, s in zip(grads, steps) if g is not None))
    small = 1e-6
    up, down = moved(small), moved(-2 * small)
    torch.testing.assert_close(torch.stack(slopes), (up - down) / (2 * small), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_gradients_reach_everything(name):
    """All maps together use every parameter (what distributed training needs), each alone those before it."""
    model = dense(name).train()
    x = images(*ODD, batch=2).requires_grad_()
    maps = model(x)
    parameters = dict(model.named_parameters())
    reached = []
    for stride, found in zip(model.feature_info.reduction(), maps):
        grads = torch.autograd.grad(
            found.square().mean(), [x, *parameters.values()], retain_graph=True, allow_unused=True
        )
        assert all(g.isfinite().all() for g in grads if g is not None)
        influence = grads[0].abs().sum((0, 1)).gt(0).float().mean()
        least = 0.98 if is_pyramid(model) else 0.85  # a patch embedding may drop an incomplete patch at the border
        assert influence >= least, f'stride {stride}: {1 - influence:.0%} of the image has no influence'
        reached.append({n for n, g in zip(parameters, grads[1:]) if g is not None})
    assert all(a < b for a, b in zip(reached, reached[1:])), 'a later map must use more parameters'
    unused = parameters.keys() - reached[-1]
    assert not unused, f'no map uses {sorted(unused)}'


@pytest.mark.parametrize('name', NAMES)
def test_chosen_maps(name):
    """Any choice of maps gives the same maps, and what comes after the last is not built."""
    model = dense(name)
    count = len(model.feature_info.channels())
    x = images(*ODD)
    full = timm.create_model(name).eval()
    weights = full.state_dict()
    with torch.no_grad():
        everything = full.forward_intermediates(x, indices=count, intermediates_only=True)
        for indices in ([0], [0, count - 1], [-1]):
            chosen = dense(name, out_indices=indices)
            own = chosen.model if hasattr(chosen, 'model') else chosen
            own.load_state_dict({k: weights[k] for k in own.state_dict()})
            for i, found in zip(indices, chosen(x), strict=True):
                torch.testing.assert_close(found, everything[i])
    fewer, more = (sum(p.numel() for p in dense(name, out_indices=i).parameters()) for i in ([0], [-1]))
    assert fewer < more


@pytest.mark.parametrize('name', NAMES)
def test_intermediates_at_odd_sizes(name):
    """Every intermediate in both layouts, alone and beside the final features, gradients included."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = images(*ODD, batch=2).requires_grad_()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    flat = 'NLC' if final.ndim == 3 else 'NHWC'
    other = model.forward_intermediates(x, output_fmt=flat, intermediates_only=True)
    assert len(maps) == len(model.feature_info)
    for info, a, b in zip(model.feature_info, maps, other, strict=True):
        assert a.shape[1] == info['num_chs']
        b = b.unflatten(1, a.shape[2:]) if flat == 'NLC' else b
        torch.testing.assert_close(b.permute(0, 3, 1, 2), a)
        ga, gb = (torch.autograd.grad(m.square().sum(), x, retain_graph=True)[0] for m in (a, b))
        torch.testing.assert_close(ga, gb, rtol=1e-3, atol=1e-4)
    (first,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first, maps[0])
    with torch.no_grad():
        alone = torch.cat([model.forward_intermediates(x[i : i + 1], intermediates_only=True)[-1] for i in (0, 1)])
    torch.testing.assert_close(alone, maps[-1], rtol=1e-3, atol=1e-4)
