"""Checks the fused ops on a GPU: norms with residual, GroupNorm, SwiGLU's product, log gates, the 2D gated mix.

    python tests/gpu/check_fused.py [--out FILE] [--shard I/N] [--dtypes float32,bfloat16]

Every op at the widths of the models and at odd ones, with strided inputs, on poisoned memory, twice for determinism,
all gradients, against its formula in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from harness import DEVICE, LIMITS, main, verdict
from torch import Tensor
from zoo.kernels import mix, norm, swiglu
from zoo.kernels.group_norm import group_norm

import zoo

Case = tuple[str, Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Widths of ViG, ViG-H and RAVLT and odd ones; the stream is fp32 or has the branch's dtype."""
    for rows, width in ((4096, 192), (2048, 384), (1024, 768), (3000, 96), (1, 64), (777, 100), (64, 1500), (3, 8000)):
        for stream in {torch.float32, dtype}:
            w, b, g = (draw(width) for _ in range(3))
            x, r = draw(3, rows, width + 16, dtype=dtype)[..., :width], draw(3, rows, width, dtype=stream)
            scale = torch.tensor([0.0, 1.25, 1.25], device=DEVICE).view(3, 1, 1)
            label = f'{rows} x {width}, stream {stream}'
            yield f'rms_norm {label}', lambda x, w: norm.rms_norm(x, w), [x, w]
            yield f'rms_norm residual {label}', lambda x, w, r: norm.rms_norm(x, w, 1e-6, r, dtype=x.dtype), [x, w, r]
            yield (
                f'layer_norm all {label}',
                lambda x, w, b, r, g, s=scale: norm.layer_norm(
                    x, w, b, 1e-5, r, gamma=g, sample_scale=s, dtype=x.dtype
                ),
                [x, w, b, r, g],
            )


def swiglu_cases(dtype: torch.dtype) -> Iterator[Case]:
    for rows, hidden in ((4096, 512), (2048, 2048), (999, 704), (1, 17), (50, 300)):
        yield f'swiglu {rows} x {hidden}', swiglu.swiglu, [draw(2, rows, 2 * hidden, dtype=dtype) * 3]
        yield f'geglu {rows} x {hidden}', swiglu.geglu, [draw(2, rows, 2 * hidden, dtype=dtype) * 3]


def group_norm_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Feature maps of Stable Diffusion's UNets and VAEs, and odd ones."""
    for shape in (
        (2, 320, 64, 64),
        (1, 320, 256, 200),
        (2, 640, 32, 48),
        (1, 960, 64, 64),
        (2, 1920, 32, 32),
        (2, 2560, 8, 8),
        (1, 128, 512, 512),
        (1, 512, 256, 130),
        (3, 64, 33, 7),
        (1, 96, 1, 5),
        (4, 32, 3, 3),
    ):
        x = (draw(*shape) * 2 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = (draw(shape[1]) for _ in range(2))
        for silu in (False, True):
            function = lambda x, w, b, silu=silu: group_norm(x, 32, w, b, silu=silu)  # noqa: E731
            yield f'group_norm {shape} silu {silu}', function, [x, weight, bias]


def inference_only(dtype: torch.dtype) -> Iterator[tuple[str, Callable, Callable, list[Tensor]]]:
    """Label, op, formula and arguments of ops without a backward pass: widths of ViG, ViG-H and LinFusion, odd rows."""
    for rows, channels, hidden in (
        (50176, 384, 1024),
        (4097, 768, 2048),
        (999, 96, 256),
        (1, 192, 512),
        (300, 320, 864),
    ):
        x, w = draw(2, rows, channels, dtype=dtype), draw(2 * hidden, channels, dtype=dtype) * channels**-0.5
        formula = lambda x, w: swiglu.naive_swiglu(x @ w.T)  # noqa: E731
        yield f'swiglu_linear {rows} x {channels} x {hidden}', swiglu.swiglu_linear, formula, [x, w]
    for rows, width in ((8192, 40), (2048, 80), (8192, 320), (4097, 640), (511, 1280), (1, 24)):
        x = draw(2, rows, 2 * width + 8, dtype=dtype)[..., 8:].unflatten(-1, (2, width))
        tensors = [x, draw(2, width, dtype=dtype), draw(2, width, dtype=dtype)]
        yield f'leaky_layer_norm {rows} x {width}', norm.leaky_layer_norm, norm.naive_leaky_layer_norm, tensors


def check_inference(say) -> int:
    """The number of bad cases of ops without a backward pass."""
    bad = 0
    for dtype in (torch.bfloat16, torch.float16):
        for seed in (0, 1):
            torch.manual_seed(seed)
            for label, op, formula, tensors in inference_only(dtype):
                with torch.no_grad():
                    expected = {'o': formula(*(x.double() for x in tensors))}
                    run = lambda op=op, tensors=tensors: {'o': op(*tensors)}  # noqa: E731
                    good, errors = verdict(run, expected, {'o': LIMITS[dtype][0]}, (label, dtype))
                say(what='inference', case=label, dtype=str(dtype), good=good, **errors)
                bad += not good
    return bad


def mix_cases(dtype: torch.dtype) -> Iterator[Case]:
    for batch, length, heads, dim in (
        (8, 196, 6, 64),
        (2, 4096, 3, 64),
        (4, 784, 6, 32),
        (1, 1, 2, 16),
        (3, 77, 5, 40),
    ):
        wide = draw(batch, length, 3 * heads * dim + 16, dtype=dtype)
        gate = wide[..., heads * dim : 2 * heads * dim].unflatten(-1, (heads, dim))
        o, local = (draw(batch, length, heads, dim, dtype=dtype) for _ in range(2))
        w_global, w_local, bias = draw(dim), draw(dim), draw(heads * dim)
        label = f'{batch} x {length} x {heads} x {dim}'
        small = o * 1e-3  # where eps counts
        yield f'mix {label}', mix.gated_local_mix, [small, local, gate.sigmoid(), w_global, w_local]
        for silu in (None, 'silu'):
            yield (
                f'mix logits {silu} {label}',
                lambda o, x, g, a, b, c, act=silu: mix.gated_local_mix(
                    o, x, g, a, b, gate_logits=True, gate_bias=c, activation=act
                ),
                [o, local, gate * 4, w_global, w_local, bias],
            )


def gate_cases(dtype: torch.dtype) -> Iterator[Case]:
    for rows, width, rank in (
        (8192, 96, 16),
        (25088, 192, 16),
        (4096, 384, 16),
        (1, 32, 16),
        (333, 20, 16),
        (70, 40, 5),
    ):
        r = draw(2, rows, rank + 48, dtype=dtype)[..., 48:]
        for strength in (1.0, 30.0):
            weight, bias = draw(2 * width, rank) * strength, draw(2 * width) * strength
            weight = weight.to(dtype).float()  # the kernel's products are in the inputs' dtype
            yield f'log_gates {rows} x {width}, rank {rank}, x {strength}', mix.log_gates, [r, weight, bias]


def results(function: Callable, tensors: list[Tensor], backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Outputs and gradients by name; cotangents are the same for every path."""
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in tensors]
    with zoo.kernel_backend(backend):
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        rng = torch.Generator(DEVICE).manual_seed(1)
        down = [torch.randn(y.shape, generator=rng, device=DEVICE).to(tensors[0].dtype).to(y.dtype) for y in out]
        grads = torch.autograd.grad(out, leaves, down)
    return {f'out{i}': y.detach() for i, y in enumerate(out)} | {f'grad{i}': g for i, g in enumerate(grads)}


def check(say, shard: tuple[int, int] = (0, 1), dtypes: list[torch.dtype] = (torch.float32, torch.bfloat16)) -> int:
    """The number of bad cases."""
    bad = check_inference(say) if shard[0] == 0 else 0
    for dtype in dtypes:
        for family in (norm_cases, swiglu_cases, group_norm_cases, mix_cases, gate_cases):
            torch.manual_seed(0)
            worst, count = 0.0, 0
            for i, (label, function, tensors) in enumerate(family(dtype)):
                if i % shard[1] != shard[0]:
                    continue
                expected = results(function, tensors, 'naive', torch.float64)
                # A stream in half precision is rounded before its statistics: two roundings for one.
                loose = family is gate_cases or f'stream {dtype}' in label
                good, errors = verdict(
                    lambda f=function, t=tensors: results(f, t, 'triton', None),
                    expected,
                    LIMITS[dtype][loose],
                    (label, dtype),
                )
                bad += not good
                count += 1
                worst = max(worst, *errors.values())
            say(what=family.__name__, dtype=str(dtype), cases=count, worst=worst)
    return bad


if __name__ == '__main__':
    main(check)
