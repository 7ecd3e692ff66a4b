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
    aligned,
    alignment,
    ceil_div,
    compute_types,
    interpreting,
    next_power,
    on_device_of_first,
    plan,
)
from zoo.kernels._triton.gla import Table, _compiled, _launch, _nothing, _options, _rows
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

_codes: dict[tuple, int] = {}


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
    """All that follows from shapes, types and strides: sizes, grids and constants of every launch of one pass."""

    def __init__(self, final, x, dt, A, B, C, D, dy, init, dinit, cu_seqlens):
        rows, T, H, P = x.shape
        varlen, sequences = cu_seqlens is not None, rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
        N = B.shape[-1]
        self.backward = dy is not None
        kinds = 2 if self.backward else 1
        self.cfg = cfg = config(x.dtype, P, N, self.backward)
        self.varlen, self.sequences, self.H = varlen, sequences, H
        nch = ceil_div(T, cfg.bt)
        programs = sequences * H * cfg.np * kinds
        cps = max(LEAST_CHUNKS, ceil_div(nch * (1 if varlen else rows) * H * cfg.np * kinds * cfg.bp * cfg.bn, WORK))
        several = programs < ENOUGH and cps < ceil_div(nch, sequences if varlen else 1)
        cps = cps if several else 1 << 20
        if varlen:
            nseg = 2 if several else 1  # only whether there are several counts
            self.n_chunks, self.n_segs = T // cfg.bt + sequences, nch // cps + sequences
        else:
            nseg = ceil_div(nch, cps)
            self.n_chunks, self.n_segs = rows * nch, rows * nseg
        self.table = Table(sequences, self.n_chunks, self.n_segs, cps, cfg.bt) if varlen else None
        self.several = nseg > 1
        ct, prec = compute_types(x.dtype)
        vp = cfg.np * cfg.bp
        self.state_dtype = torch.bfloat16 if ct.name == 'bf16' else torch.float32
        self.state_shape = (kinds * H * self.n_chunks, vp, cfg.bn)
        self.prefix_shape = (kinds * H * self.n_chunks, cfg.bn)
        self.seg_shape = (kinds * H * self.n_segs, vp, cfg.bn)

        unit = alignment(*(t for t in (x, B, C, dy) if t is not None))
        self.ints = []
        for t, u in ((x, unit), (dt, 1), (B, unit), (C, unit), (x if dy is None else dy, unit)):
            self.ints += [s // u for s in t.stride()[:3]]
        self.ints += [T, nch, cps, nseg, self.n_chunks, self.n_segs]
        wide = x.dtype == torch.float32
        consts = {'H': H, 'P': P, 'N': N, 'BT': cfg.bt, 'BP': cfg.bp, 'BN': cfg.bn, 'NP': cfg.np,
                  'RB': H // B.shape[2], 'RC': H // C.shape[2], 'ADJOINT': self.backward, 'HAS_D': D is not None,
                  'VARLEN': varlen, 'INIT': init is not None, 'DINIT': dinit is not None,
                  'FINAL': 0 if not final else 2 if self.backward else 1, 'A': unit, 'CT': ct, 'PREC': prec,
                  'WIDE': wide}  # fmt: skip
        self.consts = consts
        self.scan_consts = consts | {'K': N, 'V': P, 'BK': cfg.bn, 'BV': cfg.scan, 'VP': vp, 'DIRS': 1, 'GATE': 1,
                                     'TURNED': True}  # fmt: skip
        # What decides the compiled code: the constants, the types and the alignment of what a kernel is given.
        types = [None if t is None else t.dtype for t in (x, dt, A, D)]
        code = (*consts.values(), *types, x.device)
        self.codes = {at_16: _codes.setdefault((*code, at_16), len(_codes)) for at_16 in (True, False)}
        self.grid_states = (self.n_segs * H * kinds * cfg.np, 1, 1)
        self.grid_scan = (sequences * H * kinds, vp // cfg.scan, 1)
        self.grid_out = (self.n_segs * H * cfg.np, 1, 1)
        self.grid_chunks = (self.n_chunks * H, 1, 1)


class _Run:
    """One pass over one set of inputs: scratch, and the launches that both passes share."""

    def __init__(self, x, dt, A, B, C, D, init, cu_seqlens, final, dy=None, dinit=None):
        x, B, C, dy = _rows(x), _rows(B), _rows(C), _rows(dy)
        self.plan = steps = plan(Plan, (final,), x, dt, A, B, C, D, dy, init, dinit, cu_seqlens)
        self.inputs = [x, dt, A, B, C]
        self.D = A if D is None else D
        self.dy = x if dy is None else dy
        self.none = none = _nothing(x.device)
        self.init, self.dinit = none if init is None else init, none if dinit is None else dinit
        ends = [*self.inputs, self.D, self.dy, self.init, self.dinit]
        self.code = steps.codes[aligned(*ends)]
        self.seg_state = self.seg_total = none
        if steps.several:
            self.seg_state = torch.empty(*steps.seg_shape, dtype=torch.float32, device=x.device)
            self.seg_total = torch.empty(steps.seg_shape[0], steps.cfg.bn, dtype=torch.float32, device=x.device)
        self.states, self.prefix = x, none
        if steps.backward:
            self.states = torch.empty(*steps.state_shape, dtype=steps.state_dtype, device=x.device)
            self.prefix = torch.empty(*steps.prefix_shape, dtype=torch.float32, device=x.device)
        self.chunks = self.segs = self.spans = none
        if steps.varlen:
            self.chunks, self.segs, self.spans = steps.table(cu_seqlens)

    def launch(self, name: str, kernel, grid: tuple, tensors: list, options: dict, run: bool = True) -> None:
        """Run a kernel on its tensors and the plan's numbers, or (not `run`) only compile it."""
        code = (name, self.code)
        if run or code not in _compiled:
            _launch(kernel, code, grid, tensors, self.plan.ints, self.plan.consts, options, run)

    def run_states(self, final: torch.Tensor) -> None:
        """Fill the states, and `final` with the state (or in a backward pass its gradient) that leaves a sequence."""
        steps = self.plan
        # What only longer sequences run is compiled now, so that a later call with another T compiles nothing.
        tensors = [*self.inputs, self.dy, self.states, self.prefix, self.seg_state, self.seg_total, self.init,
                   self.dinit, final, self.segs]  # fmt: skip
        run = steps.several or steps.backward
        self.launch('ssd states', ssd_kernel_states, steps.grid_states, tensors, steps.cfg.states, run)
        code = ('ssd scan', self.code)
        if steps.several or (code not in _compiled and not interpreting()):
            nseg, _, n_segs = steps.ints[-3:]
            args = [self.seg_state, self.seg_total, self.init, self.dinit, final, self.spans]
            _launch(
                gla_kernel_scan,
                code,
                steps.grid_scan,
                args,
                [nseg, n_segs, steps.H],
                steps.scan_consts,
                {'num_warps': 1},
                steps.several,
            )


def _state(state: torch.Tensor | None) -> torch.Tensor | None:
    return None if state is None else state.float().contiguous()


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
    run = _Run(x, dt, A, B, C, D, _state(initial_state), cu_seqlens, output_final_state)
    steps = run.plan
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    final = None
    if output_final_state:
        shape = (steps.sequences, *x.shape[2:], B.shape[-1])
        final = torch.empty(*shape, dtype=torch.float32, device=x.device)
    place = run.none if final is None else final
    run.run_states(place)
    run.launch('ssd out', ssd_fwd_kernel_out, steps.grid_out,
               [*run.inputs, run.D, y, run.seg_state, run.init, place, run.segs], steps.cfg.chunks)  # fmt: skip
    return y, final


@on_device_of_first
def ssd_bwd(x, dt, A, B, C, D, initial_state, dy, dfinal, cu_seqlens):
    """Gradients of x, dt, A, B, C, D (or None) and initial_state (or None); arguments as `ssd_fwd`."""
    if max(x.shape[-1], B.shape[-1]) > BLOCK:
        return _cut_bwd(x, dt, A, B, C, D, initial_state, dy, dfinal, cu_seqlens)
    init, dinit = _state(initial_state), _state(dfinal)
    run = _Run(x, dt, A, B, C, D, init, cu_seqlens, init is not None, dy, dinit)
    steps = run.plan
    new = lambda shape, dtype: torch.empty(*shape, dtype=dtype, device=x.device)  # noqa: E731
    dx, ddt = new(x.shape, x.dtype), new(dt.shape, dt.dtype)
    dB, dC = (new((*x.shape[:3], t.shape[-1]), t.dtype) for t in (B, C))
    parts = new((2, steps.H, steps.n_chunks), torch.float32)
    dinitial = None if init is None else new(init.shape, torch.float32)
    run.run_states(run.none if dinitial is None else dinitial)
    run.launch('ssd gradients', ssd_bwd_kernel_chunk, steps.grid_chunks,
               [*run.inputs, run.D, run.dy, dx, ddt, dB, dC, parts, run.states, run.prefix, run.seg_state, run.chunks],
               steps.cfg.chunks)  # fmt: skip
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

    def __init__(self, x, dt, A, B, C, D, state):
        (batch, H, P), N = x.shape, B.shape[-1]
        bn = next_power(N, 1)
        bp = min(next_power(P, 1), max(1, 2048 // bn))
        consts = {'H': H, 'P': P, 'N': N, 'BP': bp, 'BN': bn, 'NP': ceil_div(P, bp), 'RB': H // B.shape[1],
                  'RC': H // C.shape[1], 'HAS_D': D is not None}  # fmt: skip
        sizes = [s for t in (x, dt, B, C) for s in t.stride()[:2]]
        self.run = Launch(ssd_kernel_step, (batch * H * consts['NP'], 1, 1), sizes, consts)


@on_device_of_first
def _step(x, dt, A, B, C, state, D, out):
    x, B, C = _rows(x), _rows(B), _rows(C)
    steps = plan(_StepPlan, (), x, dt, A, B, C, D, state)
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
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
