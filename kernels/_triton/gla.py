"""Gated linear attention on GPUs: host side of the Triton kernels in `gla_states` and `gla_chunks`.

Each pass finds the states at every chunk boundary (all kinds in one launch), then works on every chunk on its own. Long
sequences are swept in segments, and a scan over segments runs between the two. The backward pass recomputes the states.
Nothing depends on values on the host, and nothing is tuned at run time: `config` is a fixed table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from zoo.kernels._triton._common import alignment, ceil_div, compute_types, gate_types, next_power
from zoo.kernels._triton.gla_chunks import gla_bwd_kernel_chunk, gla_fwd_kernel_out
from zoo.kernels._triton.gla_states import gla_kernel_scan, gla_kernel_states, gla_kernel_table

MAX_DIM = 128
FORWARD, REVERSE, BOTH = 1, 2, 3
SEGMENT = 512  # tokens
MAX_SEGMENTS = 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_scan_ready: set[tuple] = set()


class Config(NamedTuple):
    """Sizes and launch options of one pass: chunk, padded K, value block, number of value blocks, warps and stages."""

    bt: int
    bk: int
    bv: int
    nv: int
    states: dict
    chunks: dict


def config(dtype: torch.dtype, K: int, V: int, backward: bool) -> Config:
    """The fixed table of block sizes, measured on an H200 (docs/results/gla-kernels-h200.json)."""
    bk, bv = next_power(K), min(64, next_power(V))
    nv = ceil_div(V, bv)
    if dtype != torch.bfloat16:
        bt = 16 if bk > 64 else 32
        return Config(bt, bk, bv, nv, {'num_warps': 4, 'num_stages': 2}, {'num_warps': 8, 'num_stages': 2})
    if backward:
        # 64-row chunks are miscompiled here (Triton 3.6, wgmma): wrong gradients, illegal accesses.
        warps = 4 if bk <= 32 else 8
        return Config(32, bk, bv, nv, {'num_warps': 4, 'num_stages': 3}, {'num_warps': warps, 'num_stages': 2})
    return Config(64, bk, bv, nv, {'num_warps': 4, 'num_stages': 3}, {'num_warps': 4, 'num_stages': 2})


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *gates: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    if q.dtype not in DTYPES:
        return f'dtype {str(q.dtype).removeprefix("torch.")}'
    for g in gates:
        if g is not None and g.dtype not in DTYPES:
            return f'gates in {str(g.dtype).removeprefix("torch.")}'
    if q.shape[-1] > MAX_DIM or v.shape[-1] > MAX_DIM:
        return f'head dimension above {MAX_DIM} (K = {q.shape[-1]}, V = {v.shape[-1]})'
    return None


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with its last dimension contiguous: views of a fused projection pass as they are."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


class _Pass:
    """One pass over one set of inputs: sizes, scratch and the launches that forward and backward share."""

    def __init__(self, q, k, v, gf, gb, scale, init, cu_seqlens, dirs, do=None, dinit=None):
        B, T, H, K = q.shape
        V = v.shape[-1]
        g = gf if gf is not None else gb
        per_head = g is not None and g.dim() == 3
        if not per_head:
            gf, gb = _rows(gf), _rows(gb)
        q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
        backward = do is not None
        cfg = config(q.dtype, K, V, backward)
        self.cfg, self.backward, self.dirs, self.varlen = cfg, backward, dirs, cu_seqlens is not None
        self.B, self.T, self.H, self.K, self.V = B, T, H, K, V
        self.N = cu_seqlens.shape[0] - 1 if self.varlen else B
        self.kinds = (2 if dirs == BOTH else 1) * (2 if backward else 1)
        device = q.device

        length = ceil_div(T, self.N) if self.varlen else T
        long = length > SEGMENT
        self.nch = ceil_div(T, cfg.bt)
        self.cps = max(SEGMENT // cfg.bt, ceil_div(self.nch, MAX_SEGMENTS)) if long else 1 << 20
        if self.varlen:
            self.n_chunks = T // cfg.bt + self.N
            self.n_segs = self.nch // self.cps + self.N
            self.nseg = 2 if long else 1
            cu = cu_seqlens.to(torch.int32) if cu_seqlens.dtype != torch.int64 else cu_seqlens
            self.chunks = torch.full((self.n_chunks, 4), -1, dtype=torch.int32, device=device)
            self.segs = torch.full((self.n_segs, 4), -1, dtype=torch.int32, device=device)
            self.spans = torch.empty((self.N, 2), dtype=torch.int32, device=device)
            gla_kernel_table[(self.N,)](cu, self.chunks, self.segs, self.spans, self.N, self.n_chunks, self.n_segs,
                                        self.cps, BT=cfg.bt, BN=128, num_warps=1)  # fmt: skip
        else:
            self.nseg = ceil_div(self.nch, self.cps)
            self.n_chunks, self.n_segs = B * self.nch, B * self.nseg
            self.chunks = self.segs = self.spans = q
        ct, prec = compute_types(q.dtype)
        mt, split = gate_types(q.dtype, None if g is None else g.dtype)
        state_dtype = torch.bfloat16 if ct.name == 'bf16' else torch.float32
        vp = cfg.nv * cfg.bv
        rows = self.kinds * H * self.n_chunks
        self.states = torch.empty((rows, vp, cfg.bk), dtype=state_dtype, device=device)
        if g is None:
            self.totals = self.prefix = q
        else:
            self.totals = torch.empty((rows, cfg.bk), dtype=torch.float32, device=device)
            self.prefix = torch.empty((rows, cfg.bk), dtype=torch.float32, device=device)
        if self.nseg > 1:
            segs = self.kinds * H * self.n_segs
            self.seg_state = torch.empty((segs, vp, cfg.bk), dtype=torch.float32, device=device)
            self.seg_total = torch.empty((segs, cfg.bk), dtype=torch.float32, device=device)
        else:
            self.seg_state = self.seg_total = self.states if ct.name == 'fp32' else init if init is not None else q

        self.q, self.k, self.v, self.do = q, k, v, do
        self.gf = gf if gf is not None else gb if gb is not None else q
        self.gb = gb if gb is not None else self.gf
        unit = alignment(*(x for x in (q, k, v, do) if x is not None))
        unit_g = 1 if g is None or per_head else alignment(self.gf, self.gb)
        strides = {}
        for name, x, u in (('q', q, unit), ('k', k, unit), ('v', v, unit), ('d', v if do is None else do, unit),
                           ('g', self.gf, unit_g), ('r', self.gb, unit_g)):  # fmt: skip
            s = x.stride()
            strides |= {f'{name}_b': s[0] // u, f'{name}_t': s[1] // u, f'{name}_h': s[2] // u}
        sizes = {'scale': scale, 'T': T, 'nch': self.nch, 'cps': self.cps, 'nseg': self.nseg,
                 'n_chunks': self.n_chunks, 'n_segs': self.n_segs}  # fmt: skip
        self.gate = 0 if g is None else 1 if per_head else 2
        shapes = {'H': H, 'K': K, 'V': V, 'BT': cfg.bt, 'BK': cfg.bk, 'BV': cfg.bv, 'NV': cfg.nv, 'DIRS': dirs,
                  'GATE': self.gate, 'VARLEN': self.varlen, 'A': unit, 'AG': unit_g, 'CT': ct, 'PREC': prec, 'MT': mt,
                  'SPLIT': split}  # fmt: skip
        self.common = strides | sizes | shapes
        self.init, self.dinit = init, dinit
        # The two forms of a chunk are two launches, each of which returns at once from the other's chunks: one kernel
        # with a branch would hold the registers of both. fp32 takes the safe form everywhere, the more exact one.
        self.forms = (False,) if self.gate == 0 else (True,) if q.dtype == torch.float32 else (False, True)
        self.limit = float('inf') if self.forms == (True,) else -100.0
        self.limit = -100.0

    def run_states(self, final: torch.Tensor | None) -> None:
        """Fill the states, and `final` with the state (or in a backward pass its gradient) past the last token."""
        q, cfg = self.q, self.cfg
        init = q if self.init is None else self.init
        dinit = q if self.dinit is None else self.dinit
        flags = {'INIT': self.init is not None, 'DINIT': self.dinit is not None,
                 'FINAL': 0 if final is None else 2 if self.backward else 1}  # fmt: skip
        final = q if final is None else final
        gla_kernel_states[(self.n_segs * self.H * self.kinds, cfg.nv)](
            q, self.k, self.v, self.v if self.do is None else self.do, self.gf, self.gb,
            self.states, self.totals, self.prefix, self.seg_state, self.seg_total, init, dinit, final, self.segs,
            ADJOINT=self.backward, **flags, **self.common, **cfg.states,
        )  # fmt: skip
        vp = cfg.nv * cfg.bv
        bv = 16
        if self.nseg > 1:
            gla_kernel_scan[(self.N * self.H * self.kinds, vp // bv)](
                self.seg_state, self.seg_total, init, dinit, final, self.spans, self.nseg, self.n_segs,
                H=self.H, K=self.K, V=self.V, BK=cfg.bk, BV=bv, VP=vp, DIRS=self.dirs, ADJOINT=self.backward,
                GATE=self.gate, VARLEN=self.varlen, **flags, num_warps=1,
            )  # fmt: skip

    def arguments(self, *names: str) -> dict:
        """The shared arguments of a chunk kernel."""
        return {**self.common, 'LEVELS': self.cfg.bt.bit_length() - 1, 'LIMIT': self.limit, **self.cfg.chunks}


def _forward(q, k, v, gf, gb, scale, init, output_final_state, cu_seqlens, dirs):
    p = _Pass(q, k, v, gf, gb, scale, init, cu_seqlens, dirs)
    o = torch.empty((p.B, p.T, p.H, p.V), dtype=q.dtype, device=q.device)
    final = None
    if output_final_state:
        final = torch.empty((p.N, p.H, p.K, p.V), dtype=torch.float32, device=q.device)
    p.run_states(final)
    args = p.arguments()
    for name in ('d_b', 'd_t', 'd_h'):
        del args[name]
    for safe in p.forms:
        gla_fwd_kernel_out[(p.n_chunks * p.H, p.cfg.nv)](
            p.q, p.k, p.v, p.gf, p.gb, o, p.states, p.totals, p.prefix, p.seg_state, p.chunks, SAFE=safe, **args,
        )  # fmt: skip
    return o, final


def _backward(q, k, v, gf, gb, scale, init, do, dfinal, cu_seqlens, dirs):
    p = _Pass(q, k, v, gf, gb, scale, init, cu_seqlens, dirs, do, dfinal)
    new = lambda d, like: torch.empty((p.B, p.T, p.H, d), dtype=like.dtype, device=q.device)  # noqa: E731
    dq, dk, dv = new(p.K, q), new(p.K, k), new(p.V, v)
    dgf = None if gf is None else torch.empty(gf.shape, dtype=gf.dtype, device=q.device)
    dgb = None if gb is None else torch.empty(gb.shape, dtype=gb.dtype, device=q.device)
    dinit = None if init is None else torch.empty((p.N, p.H, p.K, p.V), dtype=torch.float32, device=q.device)
    p.run_states(dinit)
    args = p.arguments()
    for safe in p.forms:
        gla_bwd_kernel_chunk[(p.n_chunks * p.H,)](
            p.q, p.k, p.v, p.do, p.gf, p.gb, dq, dk, dv, dq if dgf is None else dgf, dq if dgb is None else dgb,
            p.states, p.totals, p.prefix, p.seg_state, p.chunks, SAFE=safe, **args,
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
