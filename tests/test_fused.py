"""Fused token ops: every path against its formula in fp64, with every gradient, and how models use them.

The Triton kernels run on the GPU where there is one, else in Triton's CPU interpreter, which proves formulas and masks;
tests/gpu/check_fused.py proves the compiled code at the sizes of models.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch.utils.flop_counter import FlopCounterMode
from zoo.backbones._layers import LayerNorm, Pending, RMSNorm, add_pending, add_then_norm, draw_drop_path
from zoo.kernels import mix, norm, swiglu
from zoo.kernels._op import Op

import zoo

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BACKENDS = ('torch', 'triton')
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}


def relative_rms(x: torch.Tensor, reference: torch.Tensor) -> float:
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return ((x - reference).norm() / reference.norm().clamp_min(1e-6)).item()


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def results(function, tensors, backend, dtype=None):
    """Outputs, then the gradients of every tensor."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    with zoo.kernel_backend(backend):
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        down = [torch.randn(y.shape).to(DEVICE, tensors[0].dtype).to(y.dtype) for y in out]
        return [*out, *torch.autograd.grad(out, leaves, down)]


def compare(function, tensors, backend, limit=1e-5):
    pairs = zip(results(function, tensors, backend), results(function, tensors, 'naive', torch.float64), strict=True)
    errors = [relative_rms(x, y) for x, y in pairs]
    assert max(errors) < limit, errors


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('width', [64, 100])
@pytest.mark.parametrize('shape', [(2, 9), (1, 1), (3, 2, 5)], ids=str)
def test_norms(shape, width, backend):
    x, residual = draw(*shape, width), draw(*shape, width)
    w, b, gamma = draw(width), draw(width), draw(width)
    scale = torch.rand(shape[0], *[1] * len(shape)).to(DEVICE)
    compare(lambda x, w: norm.rms_norm(x, w), [x, w], backend)
    compare(lambda x, w, r: norm.rms_norm(x, w, 1e-6, r, sample_scale=scale), [x, w, residual], backend)
    compare(lambda x, w, b: norm.layer_norm(x, w, b, 1e-5), [x, w, b], backend)
    everything = lambda x, w, b, r, g: norm.layer_norm(x, w, b, 1e-5, r, gamma=g, sample_scale=scale)  # noqa: E731
    compare(everything, [x, w, b, residual, gamma], backend)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_beside_a_wide_stream(dtype, backend):
    x, residual, w = draw(2, 7, 48, dtype=dtype), draw(2, 7, 48), draw(48)
    compare(lambda x, w, r: norm.rms_norm(x, w, 1e-6, r, dtype=x.dtype), [x, w, residual], backend, LIMITS[dtype])
    y, stream = norm.rms_norm(x, w, 1e-6, residual, dtype=dtype)
    assert y.dtype == dtype and stream.dtype == torch.float32
    compare(swiglu.swiglu, [draw(3, 40, dtype=dtype)], backend, LIMITS[dtype])
    o, local, gate = (draw(1, 9, 2, 32, dtype=dtype) for _ in range(3))
    compare(mixed, [o, local, gate, draw(32), draw(32), draw(64)], backend, LIMITS[dtype])
    compare(mix.log_gates, [draw(2, 30, 16, dtype=dtype), draw(48, 16).to(dtype).float(), draw(48)], backend, 1e-2)


def mixed(o, local, gate, w_global, w_local, bias):
    names = dict(gate_logits=True, gate_bias=bias, activation='silu')
    return mix.gated_local_mix(o, local, gate, w_global, w_local, **names)


@pytest.mark.parametrize('backend', BACKENDS)
def test_swiglu(backend):
    for shape in ((3, 5, 40), (1, 2), (2, 514)):
        compare(swiglu.swiglu, [draw(*shape) * 3], backend)
        compare(swiglu.geglu, [draw(*shape) * 3], backend)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_linear(dtype, backend):
    """The product with the activation in it, of strided rows; with gradients the ops that it is made of."""
    for rows, channels, hidden in ((37, 96, 40), (1, 32, 17), (5, 64, 16)):
        x, w = draw(2, rows, channels + 16, dtype=dtype)[..., :channels], draw(2 * hidden, channels) * 0.2
        w = w.to(dtype).float()
        expected = swiglu.naive_swiglu(x.double() @ w.double().T)
        with zoo.kernel_backend(backend):
            with torch.no_grad():
                assert swiglu.fits_swiglu_linear(x) == (backend == 'triton')
                y = swiglu.swiglu_linear(x, w)
            again = swiglu.swiglu_linear(x, w.clone().requires_grad_())
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        assert y.dtype == again.dtype == dtype and again.requires_grad
        assert relative_rms(y, expected) < limit and relative_rms(again, expected) < limit


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('heads, dim', [(3, 64), (2, 24), (1, 16)])
def test_gated_local_mix(heads, dim, backend):
    """Slices of a wider projection are read in place; eps counts where the scan's output is small."""
    wide = draw(2, 9, 3 * heads * dim + 16)
    gate = wide[..., heads * dim : 2 * heads * dim].unflatten(-1, (heads, dim))
    o, local = draw(2, 9, heads, dim) * 1e-3, draw(2, 9, heads, dim)
    w_global, w_local = draw(dim), draw(dim)
    compare(mix.gated_local_mix, [o, local, gate.sigmoid(), w_global, w_local], backend)
    compare(mixed, [o, local, gate * 4, w_global, w_local, draw(heads * dim)], backend)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('strength', [1.0, 40.0], ids=['mild', 'strong'])
def test_log_gates(strength, backend):
    for rows, width, rank in ((70, 48, 16), (1, 32, 16), (5, 20, 3)):
        r = draw(2, rows, rank + 8)[..., 8:]
        compare(mix.log_gates, [r, draw(2 * width, rank) * strength, draw(2 * width)], backend)


@pytest.mark.parametrize('backend', BACKENDS)
def test_nothing_in_nothing_out(backend):
    with zoo.kernel_backend(backend):
        w = draw(32).requires_grad_()
        y, stream = norm.rms_norm(draw(0, 4, 32), w, 1e-6, draw(0, 4, 32))
        assert y.shape == stream.shape == (0, 4, 32)
        y.sum().backward()
        assert not w.grad.any()
        assert swiglu.swiglu(draw(0, 32)).shape == (0, 16)


def test_the_stream_alone_gives_gradients_too():
    """A branch whose normalised result is not used, and a stream that is not used."""
    for which in (0, 1):
        grads = []
        for backend in BACKENDS:
            x, r, w = torch.ones(1, 3, 16), torch.arange(48.0).view(1, 3, 16), torch.ones(16)
            x, r = x.requires_grad_(), r.requires_grad_()
            with zoo.kernel_backend(backend):
                out = norm.rms_norm(x.to(DEVICE), w.to(DEVICE), 1e-6, r.to(DEVICE))[which]
                out.square().sum().backward()
            grads.append((x.grad, r.grad))
        torch.testing.assert_close(*grads)


def test_under_autocast_the_result_is_ready_for_the_next_product():
    x, residual, w = draw(2, 5, 32, dtype=torch.bfloat16), draw(2, 5, 32), draw(32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, stream = norm.rms_norm(x, w, 1e-6, residual)
        assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
        assert norm.layer_norm(residual, w, w).dtype == torch.bfloat16
        assert LayerNorm(32, starts_stream=True).to(DEVICE)(x).dtype == torch.float32
    assert norm.rms_norm(x, w, 1e-6, residual)[0].dtype == torch.float32
    assert norm.rms_norm(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize('backend', BACKENDS)
def test_whole_models(backend):
    """A model's output and gradients on the fused passes are those of its oracle, stochastic depth included."""
    model = zoo.create_model('test_vig', num_classes=3, embed_dim=32, depth=2, num_heads=1, drop_path_rate=0.5)
    model = model.to(DEVICE).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = draw(3, 3, 32, 32)
    found = []
    for name in (backend, 'naive'):
        torch.manual_seed(2)
        twin = copy.deepcopy(model)
        with zoo.kernel_backend(name):
            y = twin(x)
            y.square().mean().backward()
        found.append([y, *(p.grad for p in twin.parameters())])
    assert max(relative_rms(a, b) for a, b in zip(*found)) < 1e-4


def test_pending_branches_are_added_once():
    for layer in (RMSNorm(16), LayerNorm(16)):
        x, branch = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
        scale = torch.tensor([0.0, 2.0]).view(2, 1, 1)
        y, stream = add_then_norm(layer, x, Pending(branch, scale))
        torch.testing.assert_close(stream, x + branch * scale)
        torch.testing.assert_close(stream, add_pending(x, Pending(branch, scale)))
        torch.testing.assert_close(y, layer(stream))


def test_stochastic_depth_draws_as_timm_does():
    drop, x = DropPath(0.4).train(), torch.randn(6, 4, 4, 8)
    torch.manual_seed(3)
    expected = drop(x)
    torch.manual_seed(3)
    torch.testing.assert_close(add_pending(torch.zeros_like(x), draw_drop_path(drop, x)), expected)
    assert draw_drop_path(drop.eval(), x).sample_scale is None


def test_hooks_see_whole_maps():
    """A hook on a block sees the sum with its last branch, and changes what follows."""
    model = zoo.create_model('test_vig').eval()
    x, seen = torch.randn(1, 3, 96, 96), []
    with torch.inference_mode():
        plain = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
        handle = model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
        torch.testing.assert_close(model(x), plain)
        torch.testing.assert_close(seen[0].permute(0, 3, 1, 2), maps[1])
        handle.remove()
        model.blocks[1].register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        assert not torch.allclose(model(x), plain)


def test_adapters_on_projections_are_not_passed_by():
    """The three projections become one product only where each is a bare linear layer."""
    model = zoo.create_model('test_vig').eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        plain = model(x)
        mixer = model.blocks[0].attn
        for layer in (mixer.qkv_proj, mixer.g_proj, mixer.gk_proj[0], mixer.gk_proj[1]):
            handle = layer.register_forward_hook(lambda module, args, out: out + 1)
            assert not torch.equal(model(x), plain)  # a fresh scan adds little
            handle.remove()
        mixer.qkv_proj.register_forward_hook(lambda module, args, out: None)
        torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('shape', [(2, 9, 3, 24), (1, 1, 16), (0, 2, 16)], ids=str)
def test_gated_norm(shape, backend):
    """The gate as a slice of a fused projection, as mixers have it."""
    heads, width = shape[-2:]
    fused = draw(*shape[:-2], 2 * heads * width + 5)
    start = fused.shape[-1] - heads * width

    def gated(x, w, fused):
        return norm.gated_rms_norm(x, w, fused[..., start:].unflatten(-1, (heads, width)))

    compare(gated, [draw(*shape), draw(width), fused], backend)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('shape', [(2, 9, 2, 24), (1, 1, 40), (0, 2, 16)], ids=str)
def test_leaky_layer_norm(shape, backend):
    """Inference of a slice, as projections that are one product leave it, and gradients of the plain operations."""
    groups, width = shape[-2:]
    fused, weight, bias = draw(*shape[:-2], groups * width + 5), draw(groups, width), draw(groups, width)
    take = lambda x, w, b: norm.leaky_layer_norm(x[..., 5:].unflatten(-1, (groups, width)), w, b)  # noqa: E731
    compare(take, [fused, weight, bias], backend)
    with torch.no_grad(), zoo.kernel_backend(backend):
        found = take(fused, weight, bias)
    expected = norm.naive_leaky_layer_norm(
        fused[..., 5:].unflatten(-1, (groups, width)).double(), weight.double(), bias.double()
    )
    assert relative_rms(found, expected) < 1e-5


@pytest.mark.parametrize('op, args', [
    (norm._op, lambda: (draw(2, 5, 16), draw(2, 5, 16), None, None, draw(16), None, 1e-6, False, torch.float32)),
    (norm._gated_op, lambda: (draw(2, 3, 16), draw(16), draw(2, 3, 16), 1e-5)),
    (swiglu._op, lambda: (draw(2, 16),)),
    (mix._gates_op, lambda: (draw(2, 5, 16), draw(32, 16), draw(32), 16.0)),
    (mix._mix_op, lambda: (*(draw(1, 3, 1, 16) for _ in range(3)), draw(16), draw(16), draw(16), 1e-6, True, False)),
])  # fmt: skip
def test_custom_ops(op: Op, args):
    tensors = tuple(t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in args())
    torch.library.opcheck(op.custom, tensors)


def test_flops_of_the_gates_are_counted():
    for backend in BACKENDS:
        with zoo.kernel_backend(backend), FlopCounterMode(display=False) as counter:
            mix.log_gates(draw(2, 5, 16), draw(64, 16), draw(64))
        assert counter.get_total_flops() == 2 * 10 * 16 * 64


def test_a_second_derivative_is_refused():
    with zoo.kernel_backend('triton'):
        x = draw(2, 16).requires_grad_()
        (g,) = torch.autograd.grad(swiglu.swiglu(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='no autograd formula'):
            g.sum().backward()


def test_wrong_arguments_are_named():
    x, w = torch.randn(2, 5, 16), torch.ones(16)
    for match, call in {
        'weight and bias must be': lambda: norm.rms_norm(x, torch.ones(8)),
        'residual must be': lambda: norm.layer_norm(x, w, w, residual=x[:1]),
        'gamma must be': lambda: norm.rms_norm(x, w, residual=x, gamma=torch.ones(5)),
        'there is none': lambda: norm.rms_norm(x, w, gamma=w),
        'sample_scale must have': lambda: norm.rms_norm(x, w, residual=x, sample_scale=torch.ones(5)),
        'swiglu_linear: weight': lambda: swiglu.swiglu_linear(torch.randn(2, 5), torch.randn(4, 4)),
        'must be even': lambda: swiglu.swiglu(torch.randn(2, 5)),
        'weight must be': lambda: mix.log_gates(x, torch.ones(8, 3), torch.ones(8)),
        'bias must be': lambda: mix.log_gates(x, torch.ones(8, 16), torch.ones(3)),
        'w_global and w_local must be': lambda: mix.gated_local_mix(*[torch.ones(1, 2, 1, 4)] * 3, w, w),
        'gate_bias must be': lambda: mix.gated_local_mix(*[torch.ones(1, 2, 1, 16)] * 3, w, w, gate_bias=w),
        'activation must be': lambda: mix.gated_local_mix(*[torch.ones(1, 2, 1, 16)] * 3, w, w, activation='relu'),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_plain_paths_compile_and_export():
    def both(x, w, r):
        y, stream = norm.rms_norm(x, w, 1e-6, r)
        return swiglu.swiglu(F.linear(y, torch.eye(16))) + stream[..., :8]

    x, w, r = torch.randn(2, 5, 16), torch.rand(16), torch.randn(2, 5, 16)
    expected = both(x, w, r)
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend='aot_eager')(x, w, r), expected)

    class Wrapped(torch.nn.Module):
        def forward(self, x, w, r):
            return both(x, w, r)

    torch.testing.assert_close(torch.export.export(Wrapped(), (x, w, r)).module()(x, w, r), expected)
