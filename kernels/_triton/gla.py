"""Gated linear attention on GPUs: host side of the Triton kernels in `gla_states` and `gla_chunks`.

Each pass finds the states at every chunk boundary (all kinds in one launch), then works on every chunk on its own. Long
sequences are swept in segments, and a scan over segments runs between the two. The backward pass recomputes the states.
Nothing depends on values on the host, and nothing is tuned at run time: `config` is a fixed table.
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
    gate_types,
    next_power,
    on_device_of_first,
    plan,
)
from zoo.kernels._triton.gla_chunks import gla_bwd_kernel_chunk, gla_fwd_kernel_out
from zoo.kernels._triton.gla_states import gla_kernel_scan, gla_kernel_states, gla_kernel_table
from zoo.kernels._triton.gla_sweep import gla_fwd_kernel_sweep

MAX_DIM = 128
FORWARD, REVERSE, BOTH = 1, 2, 3
SEGMENT = 512  # tokens
MAX_SEGMENTS = 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SAFE_PARTS, SAFE_WARPS = 4, 1  # the sweep's safe form: pieces of a chunk, warps
SAFE_GROUP = 8  # chunks that one program of the safe backward form looks at
LIMIT = -100.0  # log 2 of the smallest gate product inside a chunk that the fast form takes


class Config(NamedTuple):
    """Sizes and launch options of one pass.

    bt: tokens in a chunk; bk: K padded; bv: value block; nv: number of value blocks; sweep: whether one program runs
    over a whole segment (bidirectional forward) instead of one per chunk; states, chunks: options of the two kernels.
    Backward only: loop: whether both directions are a loop; group: chunks in one program; ahead: how many of them have
    their loads under way; sums: operands of the sums behind the gates' gradient.
    """

    bt: int
    bk: int
    bv: int
    nv: int
    sweep: bool
    states: dict
    chunks: dict
    loop: bool = False
    group: int = 1
    ahead: int = 1
    sums: str = 'tf32'


def config(dtype: torch.dtype, K: int, V: int, backward: bool, bidirectional: bool) -> Config:
    """The fixed table of block sizes, measured on an H100 and an H200 with tests/gpu/sweep_gla.py.

    Every row has a case in tests/gpu/check_gla.py: Triton 3.6 miscompiles some choices on Hopper, such as 64-row chunks
    in the backward pass or with 8 warps (wrong results, illegal accesses).
    """
    bk, bv = next_power(K), min(64, next_power(V))
    nv = ceil_div(V, bv)
    if dtype != torch.bfloat16:
        bt = 16 if bk > 64 else 32
        return Config(bt, bk, bv, nv, False, _options(4, 2), _options(8, 2))
    if not backward:
        return Config(64, bk, bv, nv, bidirectional and bk <= 64, _options(4, 3), _options(4, 3))
    if bk > 32 or nv > 1:
        return Config(32, bk, bv, nv, False, _options(4, 3), _options(4 if bk <= 32 else 8, 2))
    if bidirectional:
        return Config(32, bk, bv, nv, False, _options(4, 3, 112), _options(2, 2), loop=True)
    return Config(32, bk, bv, nv, False, _options(4, 3, 112), _options(4, 2), group=3, ahead=2)


def _options(warps: int, stages: int, registers: int | None = None) -> dict:
    options = {'num_warps': warps, 'num_stages': stages}
    return options if registers is None else options | {'maxnreg': registers}


def unsupported(dtype: torch.dtype, gates: torch.dtype | None, K: int, V: int) -> str | None:
    """Why the kernels cannot take q, k, v of `dtype` with gates of that type (None without), or None."""
    if dtype not in DTYPES:
        return f'dtype {str(dtype).removeprefix("torch.")}'
    if gates is not None and gates not in DTYPES:
        return f'gates in {str(gates).removeprefix("torch.")}'
    return f'head dimension above {MAX_DIM} (K = {K}, V = {V})' if max(K, V) > MAX_DIM else None


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with its last dimension contiguous: views of a fused projection pass as they are."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _gates(x: torch.Tensor | None) -> torch.Tensor | None:
    """The same for gates; those of heads may lie anyhow."""
    return x if x is None or x.dim() == 3 else _rows(x)


class Table:
    """Where the chunks and segments of packed sequences lie, found on the device.

    Args:
        sequences: how many.
        n_chunks: how many chunks there are at most.
        n_segs: how many segments.
        cps: chunks in a segment.
        bt: tokens in a chunk.
    """

    def __init__(self, sequences: int, n_chunks: int, n_segs: int, cps: int, bt: int):
        self.sequences, self.rows = sequences, (n_chunks, n_segs)
        self.fill = Launch(gla_kernel_table, (sequences, 1, 1), (sequences, cps), {'BT': bt, 'BN': 128}, 1)

    def __call__(self, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`chunks`, `segs` and `spans` of `gla_kernel_table`."""
        ints, cu_seqlens = dict(dtype=torch.int32, device=cu_seqlens.device), cu_seqlens.contiguous()
        chunks, segs = torch.full((sum(self.rows), 4), -1, **ints).split_with_sizes(self.rows)
        spans = torch.empty(self.sequences, 2, **ints)
        self.fill(aligned(cu_seqlens), cu_seqlens, chunks, segs, spans)
        return chunks, segs, spans


class Plan:
    """All that follows from shapes, types and strides: sizes, and every launch of one pass."""

    def __init__(self, dirs, final, scale, q, k, v, gf, gb, do, init, dinit, cu_seqlens):
        B, T, H, K = q.shape
        varlen, N = cu_seqlens is not None, B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        V = v.shape[-1]
        g = gf if gf is not None else gb
        self.in_place = all(_rows(x) is x for x in (q, k, v, do)) and _gates(gf) is gf and _gates(gb) is gb
        self.gate = 0 if g is None else 1 if g.dim() == 3 else 2
        backward = do is not None
        cfg = config(q.dtype, K, V, backward, dirs == BOTH and self.gate > 0)
        self.cfg, self.device = cfg, q.device
        self.sweep = cfg.sweep
        kinds = (2 if dirs == BOTH else 1) * (2 if backward else 1)

        length = ceil_div(T, N) if varlen else T
        # Sweeping a whole sequence in one program saves the scan, where enough programs remain to fill the GPU.
        long = length > SEGMENT and (self.sweep or length > 8 * SEGMENT or N * H * kinds * cfg.nv < 256)
        nch = ceil_div(T, cfg.bt)
        cps = max(SEGMENT // cfg.bt, ceil_div(nch, MAX_SEGMENTS)) if long else 1 << 20
        if varlen:
            nseg = 2 if long else 1  # only whether there are several counts
            n_chunks, n_segs = T // cfg.bt + N, nch // cps + N
        else:
            nseg = ceil_div(nch, cps)
            n_chunks, n_segs = B * nch, B * nseg
        self.table = Table(N, n_chunks, n_segs, cps, cfg.bt) if varlen else None
        self.several = nseg > 1
        ct, prec = compute_types(q.dtype)
        mt, split = gate_types(q.dtype, None if g is None else g.dtype)
        vp = cfg.nv * cfg.bv
        seg_rows, fp32 = kinds * H * n_segs, torch.float32
        totals = ((kinds * H * n_chunks, cfg.bk), fp32) if self.gate and not self.sweep else None
        self.scratch = Scratch(
            q.device,
            (((SAFE_PARTS if self.sweep else kinds) * n_chunks * H, vp, cfg.bk),
             torch.bfloat16 if ct.name == 'bf16' else fp32),
            totals,
            totals,
            ((seg_rows, vp, cfg.bk), fp32) if self.several else None,
            ((seg_rows, cfg.bk), fp32) if self.several else None,
            ((n_segs * H * cfg.nv,), torch.int32) if self.sweep else None,
        )  # fmt: skip
        self.out_shape, self.final_shape = (B, T, H, V), (N, H, K, V)

        unit = alignment(*(x for x in (q, k, v, do) if x is not None))
        unit_g = alignment(*(x for x in (gf, gb) if x is not None)) if self.gate == 2 else 1
        ints = []
        for x, u in ((q, unit), (k, unit), (v, unit), (v if do is None else do, unit), (gf, unit_g), (gb, unit_g)):
            x = x if x is not None else g if g is not None else q
            ints += [s // u for s in x.stride()[:3]]
        # A chunk's two forms are two launches, each of which returns at once from the other's chunks: one kernel with a
        # branch would hold the registers of both. fp32 takes the safe form everywhere, the more exact one.
        forms = (False,) if self.gate == 0 else (True,) if q.dtype == torch.float32 else (False, True)
        sizes = (*ints, scale, T, nch, cps, nseg, n_chunks, n_segs, H)
        consts = {'K': K, 'V': V, 'BT': cfg.bt, 'BK': cfg.bk, 'BV': cfg.bv, 'NV': cfg.nv, 'DIRS': dirs,
                  'GATE': self.gate, 'VARLEN': varlen, 'A': unit, 'AG': unit_g, 'CT': ct, 'PREC': prec, 'MT': mt,
                  'SPLIT': split, 'ADJOINT': backward, 'INIT': init is not None, 'DINIT': dinit is not None,
                  'FINAL': 0 if not final else 2 if backward else 1, 'KEEP': not self.sweep,
                  'LEVELS': cfg.bt.bit_length() - 1, 'SUMS': cfg.sums if prec == 'tf32' else prec,
                  'LIMIT': float('inf') if forms == (True,) else LIMIT}  # fmt: skip
        self.states = launched(gla_kernel_states, 15, (n_segs * H * kinds, cfg.nv, 1), sizes, consts, cfg.states)
        scan = consts | {'BV': 16, 'VP': vp, 'TURNED': False}
        self.scan = launched(gla_kernel_scan, 6, (N * H * kinds, vp // 16, 1), (nseg, n_segs, H), scan, _options(1, 3))
        kernel, tensors, grid = gla_fwd_kernel_out, 11, (n_chunks * H, cfg.nv, 1)
        if backward:
            kernel, tensors = gla_bwd_kernel_chunk, 16
        elif self.sweep:
            kernel, tensors, grid = gla_fwd_kernel_sweep, 10, (n_segs * H, cfg.nv, 1)
        self.chunks = []
        for safe in forms:
            group = SAFE_GROUP if safe else cfg.group
            grid = (ceil_div(n_chunks, group) * H, 1, 1) if backward else grid
            parts = SAFE_PARTS if safe and self.sweep else 1  # the sweep's safe form cuts chunks into parts
            rows = cfg.bt // parts
            consts |= {'SAFE': safe, 'GROUP': group, 'STAGES': 1 if safe else cfg.ahead, 'LOOP': cfg.loop and not safe,
                       'PARTS': parts, 'BT': rows,
                       'LEVELS': rows.bit_length() - 1}  # fmt: skip
            options = cfg.chunks
            if safe and (self.sweep or cfg.loop):
                options = _options(SAFE_WARPS, 3) if self.sweep else _options(4, 2)
            self.chunks.append(launched(kernel, tensors, grid, sizes, consts, options))
        self.prepared = set()

    def memory(self, at_16: bool, none: torch.Tensor) -> tuple[object, tuple, object]:
        """What to keep, then states, totals, prefixes, states and totals of segments, and flags of the sweep."""
        ready = at_16 and self.chunks[-1].compiled is not None
        memory, (*scratch, flags) = self.scratch(ready, none)
        if not ready and not self.several:  # the kernels' code must not depend on it: same types in both cases
            scratch[3] = scratch[4] = nothing(self.device)
        return memory, scratch, flags

    def run_states(self, at_16: bool, inputs, scratch, init, dinit, final, segs, spans) -> None:
        """Fill the states, and `final` with the state (or in a backward pass its gradient) past the last token."""
        if self.several or not self.sweep:
            self.states(at_16, *inputs, *scratch, init, dinit, final, segs)
        if self.several:
            self.scan(at_16, *scratch[3:], init, dinit, final, spans)
        elif at_16 not in self.prepared:
            # What only longer sequences run is compiled now, so that a later call with another T compiles nothing.
            self.prepared.add(at_16)
            if self.sweep:
                self.states.prepare(at_16, *inputs, *scratch, init, dinit, final, segs)
            self.scan.prepare(at_16, *scratch[3:], init, dinit, final, spans)


def launched(kernel, tensors: int, grid: tuple, sizes: tuple, consts: dict, options: dict) -> Launch:
    """The launch of a kernel that takes so many tensors, with those of `consts` that it takes."""
    consts = {name: consts[name] for name in kernel.arg_names[tensors + len(sizes) :]}
    warps, stages, registers = options['num_warps'], options['num_stages'], options.get('maxnreg')
    return Launch(kernel, grid, sizes, consts, warps, stages, registers)


def nothing(device: torch.device) -> torch.Tensor:
    """A tensor that stands where none is needed; not kept, since CUDA graphs own what is allocated under them."""
    return torch.empty(16, dtype=torch.float32, device=device)


@on_device_of_first
def _forward(q, k, v, gf, gb, scale, init, output_final_state, cu_seqlens, dirs):
    options = dirs, output_final_state, scale
    steps = plan(Plan, options, q, k, v, gf, gb, None, init, None, cu_seqlens)
    if not steps.in_place:
        q, k, v, gf, gb = _rows(q), _rows(k), _rows(v), _gates(gf), _gates(gb)
        steps = plan(Plan, options, q, k, v, gf, gb, None, init, None, cu_seqlens)
    at_16 = aligned(q, k, v, gf, gb, init)
    gf = gf if gf is not None else gb if gb is not None else q
    gb = gf if gb is None else gb
    memory, scratch, flags = steps.memory(at_16, q)
    chunks, segs, spans = (q, q, q) if steps.table is None else steps.table(cu_seqlens)
    o = torch.empty(*steps.out_shape, dtype=q.dtype, device=steps.device)
    final = None
    if output_final_state:
        final = torch.empty(*steps.final_shape, dtype=torch.float32, device=steps.device)
    steps.run_states(at_16, (q, k, v, v, gf, gb), scratch, q if init is None else init, q,
                     q if final is None else final, segs, spans)  # fmt: skip
    if steps.sweep:
        tensors = q, k, v, gf, gb, o, scratch[0], scratch[3], flags, segs
    else:
        tensors = q, k, v, gf, gb, o, *scratch[:4], chunks
    for run in steps.chunks:
        run(at_16, *tensors)
    return o, final


@on_device_of_first
def _backward(q, k, v, gf, gb, scale, init, do, dfinal, cu_seqlens, dirs):
    q, k, v, do, gf, gb = _rows(q), _rows(k), _rows(v), _rows(do), _gates(gf), _gates(gb)
    steps = plan(Plan, (dirs, init is not None, scale), q, k, v, gf, gb, do, init, dfinal, cu_seqlens)
    at_16 = aligned(q, k, v, gf, gb, do, init, dfinal)
    new = lambda x: None if x is None else torch.empty(*x.shape, dtype=x.dtype, device=steps.device)  # noqa: E731
    dq, dk, dv, dgf, dgb, dinit = (new(x) for x in (q, k, v, gf, gb, init))
    in_f = gf if gf is not None else gb if gb is not None else q
    in_b = in_f if gb is None else gb
    memory, scratch, _ = steps.memory(at_16, q)
    chunks, segs, spans = (q, q, q) if steps.table is None else steps.table(cu_seqlens)
    steps.run_states(at_16, (q, k, v, do, in_f, in_b), scratch, q if init is None else init,
                     q if dfinal is None else dfinal, q if dinit is None else dinit, segs, spans)  # fmt: skip
    tensors = (q, k, v, do, in_f, in_b, dq, dk, dv, dq if dgf is None else dgf, dq if dgb is None else dgb,
               *scratch[:4], chunks)  # fmt: skip
    for run in steps.chunks:
        run(at_16, *tensors)
    return dq, dk, dv, dgf, dgb, dinit


def gla_fwd(q, k, v, g, scale, initial_state, output_final_state, reverse, cu_seqlens):
    """One direction, forward.

    Args:
        q: (B, T, H, K) queries; k the same, v (B, T, H, V).
        g: (B, T, H, K) or (B, T, H) log gates, or None.
        scale: factor of the outputs.
        initial_state: (N, H, K, V) fp32 or None.
        output_final_state: whether to return the state past the last token.
        reverse: run from the last token to the first.
        cu_seqlens: (N + 1,) bounds of packed sequences (B = 1), or None.

    Returns:
        Outputs (B, T, H, V) and the final state (N, H, K, V) fp32 or None.
    """
    init = None if initial_state is None else initial_state.float().contiguous()
    gates = (None, g) if reverse else (g, None)
    return _forward(q, k, v, *gates, scale, init, output_final_state, cu_seqlens, REVERSE if reverse else FORWARD)


def gla_bwd(q, k, v, g, scale, initial_state, do, dfinal_state, reverse, cu_seqlens):
    """One direction, gradients (dq, dk, dv, dg or None, dinitial_state or None); arguments as `gla_fwd`."""
    init = None if initial_state is None else initial_state.float().contiguous()
    dfinal = None if dfinal_state is None else dfinal_state.float().contiguous()
    gates = (None, g) if reverse else (g, None)
    dq, dk, dv, dgf, dgb, dinit = _backward(
        q, k, v, *gates, scale, init, do, dfinal, cu_seqlens, REVERSE if reverse else FORWARD
    )
    return dq, dk, dv, dgb if reverse else dgf, dinit


def bidirectional_gla_fwd(q, k, v, g_fwd, g_bwd, scale, cu_seqlens):
    """Both directions, forward: scale * (forward scan + reverse scan) -> (B, T, H, V)."""
    return _forward(q, k, v, g_fwd, g_bwd, scale, None, False, cu_seqlens, BOTH)[0]


def bidirectional_gla_bwd(q, k, v, g_fwd, g_bwd, scale, do, cu_seqlens):
    """Both directions, gradients (dq, dk, dv, dg_fwd or None, dg_bwd or None)."""
    return _backward(q, k, v, g_fwd, g_bwd, scale, None, do, None, cu_seqlens, BOTH)[:5]
