"""State space duality on GPUs: host side of the Triton kernels in `ssd_kernels`.

Forward: one program sweeps a sequence of one head (and P block), its state in registers. Where that leaves a GPU idle,
sequences are cut into segments: a first launch finds what each segment adds to the state, `gla_kernel_scan` passes the
states on, and the sweeps then start from those. Backward: states and their gradients at every chunk, then every chunk
on its own. Nothing depends on values on the host, and nothing is tuned at run time: `config` is a fixed table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from zoo.kernels._triton._common import (
    Launch,
    Scratch,
    aligned,
    alignment,
    ceil_div,
    compute_types,
    next_power,
    on_device_of_first,
    plan,
    types,
)
from zoo.kernels._triton.gla import Table, _options, _rows, launched, nothing
from zoo.kernels._triton.gla_states import gla_kernel_scan
from zoo.kernels._triton.ssd_kernels import (
    ssd_bwd_kernel_chunk,
    ssd_fwd_kernel_out,
    ssd_kernel_states,
    ssd_kernel_step,
)

MAX_DIM = 256
BLOCK = 128  # P and N of one pass; larger ones are cut, which costs passes instead of minutes of compilation
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ENOUGH = 640  # programs that fill a GPU well enough to make segments a loss
WORK = 2048 * 64 * 64  # state elements in flight that segments aim at
LEAST_CHUNKS = 8  # in a segment
# Tokens in a chunk of a bf16 backward pass. Products with 64 rows become wgmma, and with those Triton 3.6 computes some
# block sizes wrongly on an H100 (gradients of A off by a fifth, by rounding alone 2e-3); 32 rows take mma.sync.
BACKWARD_TOKENS = 32


class Config(NamedTuple):
    """Sizes and launch options of one pass.

    bt: tokens in a chunk; bp, bn: rows of a state block, N padded; np: blocks of P; scan: rows in a program of the scan
    over segments; states, chunks: options of the kernels that find states, and outputs or gradients.
    """

    bt: int
    bp: int
    bn: int
    np: int
    scan: int
    states: dict
    chunks: dict


def config(dtype: torch.dtype, P: int, N: int, backward: bool) -> Config:
    """The fixed table of block sizes; every row has a case in tests/gpu/check_ssd.py."""
    bn = next_power(N)
    bp = min(64, next_power(P))
    blocks = bp, bn, ceil_div(P, bp), min(16, 1024 // bn)
    if dtype != torch.bfloat16:
        return Config(32 if bn <= 64 else 16, *blocks, _options(4, 2), _options(8 if backward else 4, 2))
    states = _options(4, 3, 128 if bn <= 64 else 168)
    if backward:
        return Config(BACKWARD_TOKENS, *blocks, states, _options(4, 2))
    return Config(64, *blocks, states, _options(4, 3, 168) if bn <= 64 else _options(4, 2))


def unsupported(x: torch.dtype, dt: torch.dtype, P: int, N: int) -> str | None:
    """Why the kernels cannot take x and dt of these types with P channels a head and N states, or None."""
    for name, dtype in (('x', x), ('dt', dt)):
        if dtype not in DTYPES:
            return f'{name} in {str(dtype).removeprefix("torch.")}'
    return f'head dimension above {MAX_DIM} (P = {P}, N = {N})' if max(P, N) > MAX_DIM else None


class Plan:
    """All that follows from shapes, types and strides: sizes, and every launch of one pass."""

    def __init__(self, final, x, dt, A, B, C, D, dy, init, dinit, cu_seqlens):
        rows, T, H, P = x.shape
        varlen, sequences = cu_seqlens is not None, rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
        N = B.shape[-1]
        self.in_place = all(_rows(t) is t for t in (x, B, C, dy))
        backward = dy is not None
        kinds = 2 if backward else 1
        self.cfg = cfg = config(x.dtype, P, N, backward)
        self.backward, self.device = backward, x.device
        nch = ceil_div(T, cfg.bt)
        programs = sequences * H * cfg.np * kinds
        cps = max(LEAST_CHUNKS, ceil_div(nch * (1 if varlen else rows) * H * cfg.np * kinds * cfg.bp * cfg.bn, WORK))
        several = programs < ENOUGH and cps < ceil_div(nch, sequences if varlen else 1)
        cps = cps if several else 1 << 20
        if varlen:
            nseg = 2 if several else 1  # only whether there are several counts
            n_chunks, n_segs = T // cfg.bt + sequences, nch // cps + sequences
        else:
            nseg = ceil_div(nch, cps)
            n_chunks, n_segs = rows * nch, rows * nseg
        self.table = Table(sequences, n_chunks, n_segs, cps, cfg.bt) if varlen else None
        self.several = nseg > 1
        ct, prec = compute_types(x.dtype)
        vp = cfg.np * cfg.bp
        states, segs, fp32 = kinds * H * n_chunks, kinds * H * n_segs, torch.float32
        self.scratch = Scratch(
            x.device,
            ((states, vp, cfg.bn), torch.bfloat16 if ct.name == 'bf16' else fp32) if backward else None,
            ((states, cfg.bn), fp32) if backward else None,
            ((segs, vp, cfg.bn), fp32) if self.several else None,
            ((segs, cfg.bn), fp32) if self.several else None,
        )
        self.final_shape = (sequences, H, P, N)
        self.parts_shape = (2, H, n_chunks)

        unit = alignment(*(t for t in (x, B, C, dy) if t is not None))
        sizes = []
        for t, u in ((x, unit), (dt, 1), (B, unit), (C, unit), (x if dy is None else dy, unit)):
            sizes += [s // u for s in t.stride()[:3]]
        sizes += [T, nch, cps, nseg, n_chunks, n_segs]
        consts = {'H': H, 'P': P, 'N': N, 'BT': cfg.bt, 'BP': cfg.bp, 'BN': cfg.bn, 'NP': cfg.np,
                  'RB': H // B.shape[2], 'RC': H // C.shape[2], 'ADJOINT': backward, 'HAS_D': D is not None,
                  'VARLEN': varlen, 'INIT': init is not None, 'DINIT': dinit is not None,
                  'FINAL': 0 if not final else 2 if backward else 1, 'A': unit, 'CT': ct, 'PREC': prec,
                  'WIDE': x.dtype == torch.float32}  # fmt: skip
        scan = consts | {'K': N, 'V': P, 'BK': cfg.bn, 'BV': cfg.scan, 'VP': vp, 'DIRS': 1, 'GATE': 1, 'TURNED': True}
        self.states = launched(ssd_kernel_states, 14, (n_segs * H * kinds * cfg.np, 1, 1), sizes, consts, cfg.states)
        self.scan = launched(gla_kernel_scan, 6, (sequences * H * kinds, vp // cfg.scan, 1), (nseg, n_segs, H), scan,
                             _options(1, 3))  # fmt: skip
        if backward:
            self.run = launched(ssd_bwd_kernel_chunk, 16, (n_chunks * H, 1, 1), sizes, consts, cfg.chunks)
        else:
            self.run = launched(ssd_fwd_kernel_out, 11, (n_segs * H * cfg.np, 1, 1), sizes, consts, cfg.chunks)
        self.prepared = set()

    def memory(self, at_16: bool, x: torch.Tensor) -> tuple[object, list, torch.Tensor]:
        """What to keep; states, prefixes, states and totals of segments; what stands for absent fp32 tensors."""
        ready = at_16 and self.run.compiled is not None
        none = x if ready else nothing(self.device)
        return *self.scratch(ready, none), none

    def run_states(self, at_16: bool, inputs, scratch, init, dinit, final, segs, spans) -> None:
        """Fill the states, and `final` with the state (or in a backward pass its gradient) that leaves a sequence."""
        if self.several or self.backward:
            self.states(at_16, *inputs, *scratch, init, dinit, final, segs)
        if self.several:
            self.scan(at_16, *scratch[2:], init, dinit, final, spans)
        elif at_16 not in self.prepared:
            # What only longer sequences run is compiled now, so that a later call with another T compiles nothing.
            self.prepared.add(at_16)
            if not self.backward:
                self.states.prepare(at_16, *inputs, *scratch, init, dinit, final, segs)
            self.scan.prepare(at_16, *scratch[2:], init, dinit, final, spans)


def _state(state: torch.Tensor | None) -> torch.Tensor | None:
    if state is None or (state.dtype == torch.float32 and state.is_contiguous()):
        return state
    return state.float().contiguous()


def _cuts(size: int) -> list[slice]:
    return [slice(i, min(i + BLOCK, size)) for i in range(0, size, BLOCK)]


def _cut_state(state: torch.Tensor | None, p: slice, n: slice) -> torch.Tensor | None:
    return None if state is None else state[:, :, p, n]


@on_device_of_first
def ssd_fwd(x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens):
    """Forward pass.

    Args:
        x: (B, T, H, P) values.
        dt: (B, T, H) steps.
        A: (H,) rates; D the same, or None.
        B: (B, T, G, N) input maps; C the same, with its own G.
        initial_state: (N, H, P, N) fp32 or None.
        output_final_state: whether to return the state past the last token.
        cu_seqlens: (N + 1,) bounds of packed sequences (B = 1), or None.

    Returns:
        Outputs (B, T, H, P) and the final state (N, H, P, N) fp32 or None.
    """
    if max(x.shape[-1], B.shape[-1]) > BLOCK:  # rows of the state do not meet, and the outputs are sums over N
        ys, finals = [], []
        for p in _cuts(x.shape[-1]):
            parts = [ssd_fwd(x[..., p], dt, A, B[..., n], C[..., n], None if n.start else D,
                             _cut_state(initial_state, p, n), output_final_state, cu_seqlens)
                     for n in _cuts(B.shape[-1])]  # fmt: skip
            ys.append(sum(y.float() for y, _ in parts).to(x.dtype))
            finals.append(torch.cat([f for _, f in parts], -1) if output_final_state else None)
        return torch.cat(ys, -1), torch.cat(finals, -2) if output_final_state else None
    init = _state(initial_state)
    steps = plan(Plan, (output_final_state,), x, dt, A, B, C, D, None, init, None, cu_seqlens)
    if not steps.in_place:
        x, B, C = _rows(x), _rows(B), _rows(C)
        steps = plan(Plan, (output_final_state,), x, dt, A, B, C, D, None, init, None, cu_seqlens)
    at_16 = aligned(x, dt, A, B, C, D, init)
    memory, scratch, none = steps.memory(at_16, x)
    _, segs, spans = (none, none, none) if steps.table is None else steps.table(cu_seqlens)
    y = torch.empty(*x.shape, dtype=x.dtype, device=steps.device)
    final = torch.empty(*steps.final_shape, dtype=torch.float32, device=steps.device) if output_final_state else None
    place, init = none if final is None else final, none if init is None else init
    steps.run_states(at_16, (x, dt, A, B, C, x), (x, *scratch[1:]), init, none, place, segs, spans)
    steps.run(at_16, x, dt, A, B, C, A if D is None else D, y, scratch[2], init, place, segs)
    return y, final


@on_device_of_first
def ssd_bwd(x, dt, A, B, C, D, initial_state, dy, dfinal, cu_seqlens):
    """Gradients of x, dt, A, B, C, D (or None) and initial_state (or None); arguments as `ssd_fwd`."""
    if max(x.shape[-1], B.shape[-1]) > BLOCK:
        return _cut_bwd(x, dt, A, B, C, D, initial_state, dy, dfinal, cu_seqlens)
    init, dinit = _state(initial_state), _state(dfinal)
    x, B, C, dy = _rows(x), _rows(B), _rows(C), _rows(dy)
    steps = plan(Plan, (init is not None,), x, dt, A, B, C, D, dy, init, dinit, cu_seqlens)
    at_16 = aligned(x, dt, A, B, C, D, dy, init, dinit)
    new = lambda shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=steps.device)  # noqa: E731
    dx, ddt = new(x.shape, x.dtype), new(dt.shape, dt.dtype)
    dB, dC = (new((*x.shape[:3], t.shape[-1]), t.dtype) for t in (B, C))
    memory, scratch, none = steps.memory(at_16, x)
    chunks, segs, spans = (none, none, none) if steps.table is None else steps.table(cu_seqlens)
    parts, dinitial = new(steps.parts_shape), None if init is None else new(init.shape)
    steps.run_states(at_16, (x, dt, A, B, C, dy), scratch,
                     none if init is None else init, none if dinit is None else dinit,
                     none if dinitial is None else dinitial, segs, spans)  # fmt: skip
    steps.run(at_16, x, dt, A, B, C, A if D is None else D, dy, dx, ddt, dB, dC, parts, *scratch[:3], chunks)
    dA = parts[0].sum(-1).to(A.dtype)
    dD = None if D is None else parts[1].sum(-1).to(D.dtype)
    return dx, ddt, dA, _sum_heads(dB, B), _sum_heads(dC, C), dD, dinitial


def _cut_bwd(x, dt, A, B, C, D, initial_state, dy, dfinal, cu_seqlens):
    """`ssd_bwd` over blocks of P and N: gradients of what the blocks share are sums."""
    ps, ns = _cuts(x.shape[-1]), _cuts(B.shape[-1])
    grid = [
        [ssd_bwd(x[..., p], dt, A, B[..., n], C[..., n], None if n.start else D, _cut_state(initial_state, p, n),
                 dy[..., p], _cut_state(dfinal, p, n), cu_seqlens) for n in ns] for p in ps
    ]  # fmt: skip
    total = lambda parts, like: sum(g.float() for g in parts).to(like.dtype)  # noqa: E731
    dx = torch.cat([total([g[0] for g in row], x) for row in grid], -1)
    ddt, dA = (total([g[i] for row in grid for g in row], t) for i, t in ((1, dt), (2, A)))
    dB, dC = (torch.cat([total([row[n][i] for row in grid], t) for n in range(len(ns))], -1)
              for i, t in ((3, B), (4, C)))  # fmt: skip
    dD = None if D is None else total([row[0][5] for row in grid], D)
    dinitial = None
    if initial_state is not None:
        dinitial = torch.cat([torch.cat([g[6] for g in row], -1) for row in grid], -2)
    return dx, ddt, dA, dB, dC, dD, dinitial


def _sum_heads(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gradients per head to gradients per group, summed in fp32."""
    groups = like.shape[2]
    return grad if grad.shape[2] == groups else grad.unflatten(2, (groups, -1)).sum(3)


class _StepPlan:
    """The launch of one token's step."""

    def __init__(self, _, gains, __, x, dt, B, C):
        (batch, H, P), N = x.shape, B.shape[-1]
        bn = next_power(N, 1)
        bp = min(next_power(P, 1), max(1, 2048 // bn))
        consts = {'H': H, 'P': P, 'N': N, 'BP': bp, 'BN': bn, 'NP': ceil_div(P, bp), 'RB': H // B.shape[1],
                  'RC': H // C.shape[1], 'HAS_D': gains is not None}  # fmt: skip
        sizes = [s for t in (x, dt, B, C) for s in t.stride()[:2]]
        self.run = Launch(ssd_kernel_step, (batch * H * consts['NP'], 1, 1), sizes, consts)


@on_device_of_first
def _step(x, dt, A, B, C, state, D, out):
    x, B, C = _rows(x), _rows(B), _rows(C)
    steps = plan(_StepPlan, types(A, D, state), x, dt, B, C)
    y = x.new_empty(*x.shape)
    steps.run(aligned(x, dt, A, B, C, D, state, out), x, dt, A, B, C, A if D is None else D, y, state, out)
    return y, out


def ssd_step(x, dt, A, B, C, state, D):
    """One token: y (B, H, P) and the new state (B, H, P, N) fp32."""
    state = _state(state)
    return _step(x, dt, A, B, C, state, D, torch.empty_like(state))


def ssd_step_(x, dt, A, B, C, state, D):
    """`ssd_step` that overwrites the contiguous fp32 state; y alone."""
    return _step(x, dt, A, B, C, state, D, state)[0]


def ssd_step_bwd(x, dt, A, B, C, state, D, dy, dnew):
    """Gradients of `ssd_step`: the torch path's, a step is far too small for more."""
    from zoo.kernels import _torch_ssd

    return _torch_ssd.ssd_step_bwd(x, dt, A, B, C, state, D, dy, dnew)
