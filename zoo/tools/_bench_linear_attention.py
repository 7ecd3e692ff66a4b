"""Normalised and rank-augmented linear attention at the shapes of LinFusion and RAVLT, for `zoo bench kernels`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.linear_attention import linear_attention, naive_rank_augmented, rank_augmented
from zoo.kernels.rope import apply_rope, axial_rope_tables
from zoo.tools._bench_case import Case

# (B, T, H, D) of normalised linear attention: a ViT at 224 px, Stable Diffusion 2.1 and 1.5 at 512 px, and long rows.
LINEAR = {
    'vit_small_224': (128, 196, 6, 64),
    'sd21_512': (16, 4096, 5, 64),
    'sd15_512': (16, 4096, 8, 40),
    'sdxl_4096': (2, 65536, 10, 64),
    'long_16k': (8, 16384, 16, 64),
}
# (B, height, width, H, D) of the stages of RAVLT with linear attention at the stated image size.
RANK = {
    'ravlt_small_224_stage1': (256, 56, 56, 1, 64),
    'ravlt_small_224_stage2': (256, 28, 28, 2, 64),
    'ravlt_base_224_stage1': (256, 56, 56, 1, 96),
    'ravlt_base_224_stage2': (256, 28, 28, 2, 96),
    'ravlt_small_1024_stage1': (8, 256, 256, 1, 64),
    'ravlt_small_1024_stage2': (8, 128, 128, 2, 64),
}


def _make_linear(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Positive q and k, and v."""
    rng = torch.Generator(device).manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=rng, device=device) for _ in range(3))
    return (F.elu(q) + 1).to(dtype), (F.elu(k) + 1).to(dtype), v.to(dtype)


def _make_rank(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """q, k, v, gate as slices of one projection, and lepe."""
    batch, height, width, heads, dim = shape
    rng = torch.Generator(device).manual_seed(seed)
    draw = lambda *more: torch.randn(batch, height * width, *more, generator=rng, device=device).to(dtype)  # noqa: E731
    q, k, v, gate = draw(4, heads, dim).unbind(2)
    return q, k, v, draw(heads, dim), gate


def _linear_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Eager form with both operands of the sum scaled, as half precision needs it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    share = q.shape[2] ** -0.5
    out = q @ ((k * share).mT @ (v * share)) / (q @ k.mean(2, keepdim=True).mT + 1e-4)
    return out.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class _RankFormula:
    """A formula of rank-augmented attention with its rotary tables, made once as a model makes them."""

    def __init__(self, formula, height: int, width: int, dim: int):
        self.formula, self.sizes, self.tables = formula, (height, width, dim), {}

    def rotation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = like.device, like.dtype
        if key not in self.tables:
            self.tables[key] = tuple(x.to(like.dtype) for x in axial_rope_tables(*self.sizes, device=like.device))
        return self.tables[key]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lepe: Tensor, gate: Tensor) -> Tensor:
        return self.formula(q, k, v, lepe, gate, *self.rotation(q))


def _rank_formula(q, k, v, lepe, gate, cos, sin) -> Tensor:
    """Eager form, in the published order of operations."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tokens, dim = q.shape[2:]
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = torch.softmax(dim**-0.5 * q.mean(2, keepdim=True) @ k.mT, -1)
    k = k * weights.mT * tokens
    z = 1 / (q @ k.mean(2, keepdim=True).mT + 1e-6)
    state = (apply_rope(k, cos, sin) * tokens**-0.5).mT @ (v * tokens**-0.5)
    r = ((apply_rope(q, cos, sin) @ state) * z).transpose(1, 2)
    return (r + lepe) * gate


def _flash_bla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_bla.ops.linear_attn.fused import linear_attention as fused

    return fused(*(x.transpose(1, 2) for x in (q, k, v)), eps=1e-4).transpose(1, 2)


def cases() -> list[Case]:
    """Every op at every shape. Least bytes: every argument and result once, at two bytes per number."""
    found = []
    for label, shape in LINEAR.items():
        size = 2 * shape[0] * shape[1] * shape[2] * shape[3]
        peers = {
            'eager': _linear_formula,
            'torch.compile': torch.compile(_linear_formula),
            'SDPA, full': _sdpa,
            'flash-bidirectional-linear-attention': _flash_bla,
        }
        dims = dict(zip('BTHD', shape))
        make = partial(_make_linear, shape)
        found.append(Case('linear_attention', label, make, linear_attention, peers, 4 * size, 7 * size, dims))
    for label, shape in RANK.items():
        batch, height, width, heads, dim = shape
        size = 2 * batch * height * width * heads * dim
        grid = {'height': height, 'width': width}
        forms = {'eager': _rank_formula, 'torch.compile': torch.compile(_rank_formula)}
        peers = {name: _RankFormula(form, height, width, dim) for name, form in forms.items()}
        found.append(
            Case(
                'rank_augmented',
                label,
                partial(_make_rank, shape),
                partial(_rank_op, rank_augmented, grid),
                peers,
                6 * size,
                11 * size,
                dict(B=batch, T=height * width, H=heads, D=dim),
                reference=partial(_rank_op, naive_rank_augmented, grid),
            )
        )
    return found


def _rank_op(op, grid: dict[str, int], q, k, v, lepe, gate) -> Tensor:
    return op(q, k, v, lepe=lepe, gate=gate, **grid)
