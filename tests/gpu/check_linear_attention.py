"""Checks the kernels of normalised and rank-augmented linear attention on the GPU against plain formulas in fp64.

    python tests/gpu/check_linear_attention.py [--out FILE] [--shard I/N] [--dtypes A,B]

Every row of the tables of block sizes, with and without several parts of the token axis, poisoned outputs, several
seeds, each twice for determinism, every gradient. fp32 and fp16 take every third case of each op. Nearly all of the
time is compilation: run shards side by side.
"""

import torch
import torch.nn.functional as F
from harness import DEVICE, LIMITS, main, verdict
from zoo.kernels.linear_attention import linear_attention, naive_rank_augmented, rank_augmented

SEEDS = (0, 1)
LINEAR = [  # B, T, H, K, V; one head after the other, then cut into parts
    (128, 196, 6, 64, 64),
    (300, 77, 2, 40, 40),
    (2, 1, 3, 64, 64),
    (1, 63, 1, 16, 16),
    (2, 4096, 5, 64, 64),
    (2, 4097, 8, 40, 40),
    (1, 9000, 2, 32, 48),
    (2, 1000, 8, 80, 80),
    (300, 130, 2, 80, 80),
    (1, 5001, 2, 128, 128),
    (2, 300, 8, 160, 160),
    (1, 3000, 2, 160, 160),
    (1, 100001, 1, 64, 64),
]
RANK = [  # B, height, width, H, D, lepe, gate
    (64, 56, 56, 1, 64, True, True),
    (600, 9, 13, 1, 64, True, True),
    (16, 28, 28, 2, 64, False, True),
    (2, 111, 97, 1, 64, False, False),
    (1, 256, 256, 1, 64, True, True),
    (8, 56, 56, 1, 96, True, True),
    (600, 7, 11, 1, 96, True, False),
    (1, 200, 336, 1, 96, False, False),
    (2, 31, 33, 2, 32, True, True),
    (2, 41, 33, 2, 128, True, True),
    (2, 1, 1, 2, 64, True, True),
]


def formula(q, k, v):
    """fp64, factored: the T x T form does not fit."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = (q @ (k.mT @ v / q.shape[2])) / (q @ k.mean(2).unsqueeze(-1) + 1e-4)
    return out.transpose(1, 2)


def results(op, tensors, upstream):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = op(*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def draw(sizes, batch, tokens, heads, dtype, seed):
    """Slices of one fused projection, and the gradient of the result."""
    rng = torch.Generator(DEVICE).manual_seed(seed)
    fused = torch.randn(batch, tokens, heads * sum(sizes), generator=rng, device=DEVICE).to(dtype)
    parts = fused.split([heads * n for n in sizes], -1)
    upstream = torch.randn(batch, tokens, heads, sizes[2], generator=rng, device=DEVICE).to(dtype)
    return [x.unflatten(-1, (heads, -1)) for x in parts], upstream


def compare(op, oracle, tensors, upstream, names, label, say):
    names = ['o', *names]
    expected = dict(zip(names, results(oracle, [x.double() for x in tensors], upstream.double())))
    run = lambda: dict(zip(names, results(op, tensors, upstream)))  # noqa: E731
    o, gradient = LIMITS[tensors[0].dtype]
    limits = {n: o if n == 'o' else gradient for n in names}
    if upstream.shape[1] == 1:  # a single token: o = v, the gradients of q and k are rounding alone
        limits |= {n: float('inf') for n in ('dq', 'dk')}
    good, errors = verdict(run, expected, limits, label)
    say(what='check', case=str(label), good=good, **errors)
    return not good


def check(say, shard=(0, 1), dtypes=(torch.float32, torch.float16, torch.bfloat16)) -> int:
    bad, i = 0, -1
    for dtype in dtypes:
        every = 1 if dtype == torch.bfloat16 else 3
        for case in [*LINEAR[::every], *RANK[::every]]:
            i += 1
            if i % shard[1] != shard[0]:
                continue
            for seed in SEEDS:
                bad += one(case, dtype, seed, say)
                bad += len(case) == 5 and one_elu(case, dtype, seed, say)
    return bad


def one_elu(case, dtype, seed, say) -> bool:
    batch, tokens, heads, key_dim, value_dim = case
    tensors, upstream = draw((key_dim, key_dim, value_dim), batch, tokens, heads, dtype, seed)
    inside = lambda q, k, v: linear_attention(q, k, v, elu=True)  # noqa: E731
    outside = lambda q, k, v: formula(F.elu(q) + 1, F.elu(k) + 1, v)  # noqa: E731
    label = ('linear_attention_elu', case, dtype, seed)
    return compare(inside, outside, tensors, upstream, ('dq', 'dk', 'dv'), label, say)


def one(case, dtype, seed, say) -> bool:
    if len(case) == 5:
        batch, tokens, heads, key_dim, value_dim = case
        (q, k, v), upstream = draw((key_dim, key_dim, value_dim), batch, tokens, heads, dtype, seed)
        tensors = [(F.elu(q.float()) + 1).to(dtype), (F.elu(k.float()) + 1).to(dtype), v]
        label = ('linear_attention', case, dtype, seed)
        return compare(linear_attention, formula, tensors, upstream, ('dq', 'dk', 'dv'), label, say)
    batch, height, width, heads, dim, lepe, gate = case
    tensors, upstream = draw([dim] * (3 + lepe + gate), batch, height * width, heads, dtype, seed)
    names = ['dq', 'dk', 'dv', *['dlepe'] * lepe, *['dgate'] * gate]

    def with_grid(op):
        def run(q, k, v, *rest):
            rest = list(rest)
            extra = dict(lepe=rest.pop(0) if lepe else None, gate=rest.pop(0) if gate else None)
            return op(q, k, v, height=height, width=width, **extra)

        return run

    label = ('rank_augmented', case, dtype, seed)
    return compare(with_grid(rank_augmented), with_grid(naive_rank_augmented), tensors, upstream, names, label, say)


if __name__ == '__main__':
    main(check)
