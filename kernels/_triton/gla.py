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
    aligned,
    alignment,
    ceil_div,
    compute_types,
    gate_types,
    interpreting,
    next_power,
    on_device_of_first,
    plan,
    start,
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

_compiled: dict[tuple, object] = {}
_codes: dict[tuple, int] = {}


class Config(NamedTuple):
    """Sizes and launch options of one pass.

    bt: tokens in a chunk; bk: K padded; bv: value block; nv: number of value blocks; sweep: whether one program runs
    over a whole segment (bidirectional forward) instead of one per chunk; states, chunks: options of the two kernels.
    Backward only: group: chunks in one program; ahead: how many of them have their loads under way; sums: operands of
    the sums behind the gates' gradient.
    """

    bt: int
    bk: int
    bv: int
    nv: int
    sweep: bool
    states: dict
    chunks: dict
    group: int = 1
    ahead: int = 1
    sums: str = 'tf32'


def config(dtype: torch.dtype, K: int, V: int, backward: bool, bidirectional: bool) -> Config:
    """The fixed table of block sizes, measured on an H200 (docs/results/gla-kernels-h200.json).

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
    """All that follows from shapes, types and strides: sizes, grids and constants of every launch of one pass."""

    def __init__(self, dirs, final, q, k, v, gf, gb, do, init, dinit, cu_seqlens):
        B, T, H, K = q.shape
        varlen, N = cu_seqlens is not None, B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        V = v.shape[-1]
        g = gf if gf is not None else gb
        self.gate = 0 if g is None else 1 if g.dim() == 3 else 2
        self.backward = do is not None
        cfg = config(q.dtype, K, V, self.backward, dirs == BOTH and self.gate > 0)
        self.cfg, self.varlen, self.N, self.H = cfg, varlen, N, H
        self.sweep = cfg.sweep
        kinds = (2 if dirs == BOTH else 1) * (2 if self.backward else 1)

        length = ceil_div(T, N) if varlen else T
        # Sweeping a whole sequence in one program saves the scan, where enough programs remain to fill the GPU.
        long = length > SEGMENT and (self.sweep or length > 8 * SEGMENT or N * H * kinds * cfg.nv < 256)
        nch = ceil_div(T, cfg.bt)
        cps = max(SEGMENT // cfg.bt, ceil_div(nch, MAX_SEGMENTS)) if long else 1 << 20
        if varlen:
            nseg = 2 if long else 1  # only whether there are several counts
            self.n_chunks, self.n_segs = T // cfg.bt + N, nch // cps + N
        else:
            nseg = ceil_div(nch, cps)
            self.n_chunks, self.n_segs = B * nch, B * nseg
        self.table = Table(N, self.n_chunks, self.n_segs, cps, cfg.bt) if varlen else None
        self.several = nseg > 1
        ct, prec = compute_types(q.dtype)
        mt, split = gate_types(q.dtype, None if g is None else g.dtype)
        vp = cfg.nv * cfg.bv
        self.state_dtype = torch.bfloat16 if ct.name == 'bf16' else torch.float32
        scratch = SAFE_PARTS * self.n_chunks if self.sweep else kinds * self.n_chunks
        self.state_shape = (scratch * H, vp, cfg.bk)
        self.total_shape = (kinds * H * self.n_chunks, cfg.bk)
        self.seg_shape = (kinds * H * self.n_segs, vp, cfg.bk)

        unit = alignment(*(x for x in (q, k, v, do) if x is not None))
        unit_g = alignment(*(x for x in (gf, gb) if x is not None)) if self.gate == 2 else 1
        self.ints = []
        for x, u in ((q, unit), (k, unit), (v, unit), (v if do is None else do, unit), (gf, unit_g), (gb, unit_g)):
            x = x if x is not None else g if g is not None else q
            self.ints += [s // u for s in x.stride()[:3]]
        self.sizes = [T, nch, cps, nseg, self.n_chunks, self.n_segs, H]
        consts = {'K': K, 'V': V, 'BT': cfg.bt, 'BK': cfg.bk, 'BV': cfg.bv, 'NV': cfg.nv, 'DIRS': dirs,
                  'GATE': self.gate, 'VARLEN': varlen, 'A': unit, 'AG': unit_g, 'CT': ct, 'PREC': prec, 'MT': mt,
                  'SPLIT': split, 'ADJOINT': self.backward, 'INIT': init is not None, 'DINIT': dinit is not None,
                  'FINAL': 0 if not final else 2 if self.backward else 1, 'KEEP': not self.sweep,
                  'LEVELS': cfg.bt.bit_length() - 1,
                  'SUMS': cfg.sums if prec == 'tf32' else prec}  # fmt: skip
        # A chunk's two forms are two launches, each of which returns at once from the other's chunks: one kernel with a
        # branch would hold the registers of both. fp32 takes the safe form everywhere, the more exact one.
        self.forms = (False,) if self.gate == 0 else (True,) if q.dtype == torch.float32 else (False, True)
        consts['LIMIT'] = float('inf') if self.forms == (True,) else LIMIT
        self.consts = consts
        self.scan_consts = consts | {'BV': 16, 'VP': vp, 'TURNED': False}
        # What decides the compiled code: a kernel's constants, the types and the alignment of what it is given.
        code = (*consts.values(), q.dtype, None if g is None else g.dtype, self.state_dtype, q.device)
        self.codes = {at_16: _codes.setdefault((*code, at_16), len(_codes)) for at_16 in (True, False)}
        self.grid_states = (self.n_segs * H * kinds, cfg.nv, 1)
        self.grid_scan = (N * H * kinds, vp // 16, 1)
        self.grid_chunks = (self.n_chunks * H, cfg.nv, 1)
        self.grid_sweep = (self.n_segs * H, cfg.nv, 1)
        self.out_shape = (B, T, H, V)

    def parts(self, safe: bool) -> dict:
        """Constants of the sweep: the safe form works on chunks cut into parts."""
        parts = SAFE_PARTS if safe and self.sweep else 1
        rows = self.cfg.bt // parts
        return {'PARTS': parts, 'BT': rows, 'LEVELS': rows.bit_length() - 1}


def _launch(kernel, code: tuple, grid: tuple, tensors: list, numbers: list, consts: dict, options: dict,
            run: bool = True) -> None:  # fmt: skip
    """Run a kernel, or only compile it; from the second time on past Triton's own look-up, most of a launch's time."""
    found = _compiled.get(code)  # never there in the interpreter
    if found is None:
        args = [*tensors, *numbers]
        used = {n: consts[n] for n in kernel.arg_names[len(args) :]}
        if interpreting():
            if run:
                kernel[grid](*args, **used)
        elif run:
            _compiled[code] = kernel[grid](*args, **used, **options), tuple(used.values())
        else:
            compiled = kernel.warmup(*args, grid=grid, **used, **options)
            compiled[grid]  # loads it and builds its launcher
            _compiled[code] = compiled, tuple(used.values())
    elif run:
        compiled, values = found
        start(compiled, grid, tensors, (*numbers, *values))


class _Run:
    """One pass over one set of inputs: scratch, and the launches that all passes share."""

    def __init__(self, q, k, v, gf, gb, scale, init, cu_seqlens, dirs, final, do=None, dinit=None):
        if gf is not None and gf.dim() == 4:
            gf = _rows(gf)
        if gb is not None and gb.dim() == 4:
            gb = _rows(gb)
        q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
        self.plan = steps = plan(Plan, (dirs, final), q, k, v, gf, gb, do, init, dinit, cu_seqlens)
        device = q.device
        self.q, self.k, self.v, self.do = q, k, v, v if do is None else do
        self.gf = gf if gf is not None else gb if gb is not None else q
        self.gb = gb if gb is not None else self.gf
        self.init = q if init is None else init
        self.dinit = q if dinit is None else dinit
        self.ints = [*steps.ints, float(scale), *steps.sizes]
        ends = q.data_ptr() | k.data_ptr() | v.data_ptr() | self.do.data_ptr() | self.gf.data_ptr() | self.gb.data_ptr()
        ends |= self.init.data_ptr() | self.dinit.data_ptr()
        self.code = steps.codes[ends % 16 == 0]

        self.states = torch.empty(*steps.state_shape, dtype=steps.state_dtype, device=device)
        self.totals = self.prefix = self.seg_state = self.seg_total = q
        if steps.gate and not steps.sweep:
            self.totals = torch.empty(*steps.total_shape, dtype=torch.float32, device=device)
            self.prefix = torch.empty(*steps.total_shape, dtype=torch.float32, device=device)
        # The kernels' code must not depend on whether there are several segments: same types in both cases.
        if steps.several:
            self.seg_state = torch.empty(*steps.seg_shape, dtype=torch.float32, device=device)
            self.seg_total = torch.empty(steps.seg_shape[0], steps.cfg.bk, dtype=torch.float32, device=device)
        else:
            self.seg_state = self.seg_total = _nothing(device)
        self.chunks = self.segs = self.spans = q
        if steps.varlen:
            self.chunks, self.segs, self.spans = steps.table(cu_seqlens)

    def run_states(self, final: torch.Tensor | None) -> None:
        """Fill the states, and `final` with the state (or in a backward pass its gradient) past the last token."""
        steps, q = self.plan, self.q
        final = q if final is None else final
        # What only longer sequences run is compiled now, so that a later call with another T compiles nothing.
        code = ('states', self.code)
        if steps.several or not steps.sweep or code not in _compiled:
            args = [q, self.k, self.v, self.do, self.gf, self.gb, self.states, self.totals, self.prefix,
                    self.seg_state, self.seg_total, self.init, self.dinit, final, self.segs]  # fmt: skip
            _launch(gla_kernel_states, code, steps.grid_states, args, self.ints, steps.consts, steps.cfg.states,
                    steps.several or not steps.sweep)  # fmt: skip
        code = ('scan', self.code)
        if steps.several or code not in _compiled:
            args = [self.seg_state, self.seg_total, self.init, self.dinit, final, self.spans]
            numbers = [steps.sizes[3], steps.n_segs, steps.H]
            _launch(
                gla_kernel_scan,
                code,
                steps.grid_scan,
                args,
                numbers,
                steps.scan_consts,
                {'num_warps': 1},
                steps.several,
            )

    def run_chunks(self, name: str, kernel, grid: tuple | None, tensors: list) -> None:
        """The launches of a kernel that comes in a fast and a safe form; no grid stands for groups of chunks."""
        steps = self.plan
        for safe in steps.forms:
            code = (name, safe, self.code)
            group = SAFE_GROUP if safe else steps.cfg.group
            consts = {}
            if code not in _compiled:
                consts = steps.consts | {'SAFE': safe, 'GROUP': group, 'STAGES': 1 if safe else steps.cfg.ahead}
                consts |= steps.parts(safe)
            size = grid if grid else (ceil_div(steps.n_chunks, group) * steps.H, 1, 1)
            options = _options(SAFE_WARPS, 3) if safe and steps.sweep else steps.cfg.chunks
            _launch(kernel, code, size, tensors, self.ints, consts, options)


def _nothing(device: torch.device) -> torch.Tensor:
    """A tensor that stands where none is needed; not kept, since CUDA graphs own what is allocated under them."""
    return torch.empty(16, dtype=torch.float32, device=device)


@on_device_of_first
def _forward(q, k, v, gf, gb, scale, init, output_final_state, cu_seqlens, dirs):
    run = _Run(q, k, v, gf, gb, scale, init, cu_seqlens, dirs, output_final_state)
    steps = run.plan
    o = torch.empty(*steps.out_shape, dtype=q.dtype, device=q.device)
    final = None
    if output_final_state:
        final = torch.empty(steps.N, steps.H, q.shape[-1], v.shape[-1], dtype=torch.float32, device=q.device)
    run.run_states(final)
    tensors = [run.q, run.k, run.v, run.gf, run.gb, o, run.states]
    if steps.sweep:
        flags = torch.empty(steps.grid_sweep[0] * steps.grid_sweep[1], dtype=torch.int32, device=q.device)
        run.run_chunks('sweep', gla_fwd_kernel_sweep, steps.grid_sweep, [*tensors, run.seg_state, flags, run.segs])
    else:
        run.run_chunks('out', gla_fwd_kernel_out, steps.grid_chunks,
                       [*tensors, run.totals, run.prefix, run.seg_state, run.chunks])  # fmt: skip
    return o, final


@on_device_of_first
def _backward(q, k, v, gf, gb, scale, init, do, dfinal, cu_seqlens, dirs):
    run = _Run(q, k, v, gf, gb, scale, init, cu_seqlens, dirs, init is not None, do, dfinal)
    dq, dk, dv = (torch.empty(*x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dgf = None if gf is None else torch.empty(*gf.shape, dtype=gf.dtype, device=q.device)
    dgb = None if gb is None else torch.empty(*gb.shape, dtype=gb.dtype, device=q.device)
    dinit = None if init is None else torch.empty(*init.shape, dtype=torch.float32, device=q.device)
    run.run_states(dinit)
    run.run_chunks('gradients', gla_bwd_kernel_chunk, None,
                   [run.q, run.k, run.v, run.do, run.gf, run.gb, dq, dk, dv, dq if dgf is None else dgf,
                    dq if dgb is None else dgb, run.states, run.totals, run.prefix, run.seg_state, run.chunks],
                   )  # fmt: skip
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
