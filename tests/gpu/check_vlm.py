"""Checks what a VLM runs on the GPU: kernels around its layers, and the captured decoding step inside `generate`.

    python tests/gpu/check_vlm.py [--out FILE] [--dtypes A,B]

Kernels against their oracles in fp64 on poisoned memory, twice for determinism; `fast_decode` against transformers' own
loop token for token in fp32, and by its logits in bf16. Ends with the times of products of one token inside a graph.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import DEVICE, LIMITS, main, verdict
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from zoo.kernels import decode
from zoo.kernels.causal_conv import causal_conv
from zoo.kernels.norm import gated_rms_norm

import zoo
from zoo.tools._timing import graph_ms, wall_ms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PRODUCTS = [(2048, 2048), (8192, 2048), (2048, 8192), (4096, 2048), (92553, 2048), (17, 896), (151, 1040)]

LAYERS = [  # batch, heads, key-value heads, d, hidden size, window, biases
    (1, 16, 8, 128, 2048, 2, False),
    (2, 16, 8, 128, 2048, 2, False),
    (3, 6, 2, 64, 896, 4, True),
    (1, 6, 2, 64, 896, 4, True),
    (2, 4, 4, 40, 160, 2, True),
    (4, 4, 2, 16, 64, 3, True),  # states so small that several threads hold each element
    (8, 16, 8, 128, 2048, 2, False),
    (17, 6, 2, 64, 896, 4, True),
]


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def gradients(function, tensors: list[Tensor | None], down: list[Tensor]) -> dict[str, Tensor]:
    """Results and gradients by name."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [t for t in leaves if t is not None]
    found = torch.autograd.grad(out, wanted, [d.to(y.dtype) for d, y in zip(down, out)])
    return {f'y{i}': y.detach() for i, y in enumerate(out)} | {f'd{i}': g for i, g in enumerate(found)}


def _differentiable(say, dtype: torch.dtype) -> int:
    """The causal convolution and the gated norm, at a model's size and at odd ones."""
    limit, bad = LIMITS[dtype][0] * 2, 0  # the activation's slope amplifies the rounding of z
    cases = []
    for (batch, length, channels), width, extras in [((1, 3000, 4096), 2, True), ((3, 65, 200), 4, True),
                                                     ((2, 1, 64), 3, False)]:  # fmt: skip
        x = draw(batch, length, channels + 16, dtype=dtype)[..., :channels]
        w, down = draw(channels, width, dtype=dtype), [draw(batch, length, channels, dtype=dtype)]
        bias, past = (draw(channels, dtype=dtype), draw(batch, channels, width, dtype=dtype)) if extras else (None,) * 2

        def conv(x, w, bias, past):
            return causal_conv(x, w, bias, activation='silu', initial_state=past)[0]

        cases.append((('causal_conv', batch, length, channels, width), conv, [x, w, bias, past], down))
    for batch, length, heads, dim in [(1, 3000, 16, 128), (3, 5, 3, 40)]:
        gate = draw(batch, length, heads * dim + 48, dtype=dtype)[..., 48:].unflatten(-1, (heads, dim))
        y, w = draw(batch, length, heads, dim, dtype=dtype), draw(dim, dtype=dtype)
        cases.append(
            (('gated_rms_norm', batch, length, heads, dim), gated_rms_norm, [y, w, gate], [torch.randn_like(y)])
        )
    worst: dict[str, float] = {}
    for label, function, tensors, down in cases:
        with zoo.kernel_backend('torch'):
            wide = [None if t is None else t.double() for t in tensors]
            expected = gradients(function, wide, [d.double() for d in down])
        with zoo.kernel_backend('triton'):
            good, errors = verdict(
                lambda f=function, t=tensors, d=down: gradients(f, t, d), expected, limit, (dtype, label)
            )
        bad += not good
        worst[label[0]] = max(worst.get(label[0], 0.0), *errors.values())
    say(what='differentiable', dtype=str(dtype)[6:], worst=worst)
    return bad


@torch.no_grad()
def _products(say, dtype: torch.dtype) -> int:
    limit, bad, worst = LIMITS[dtype][0], 0, 0.0
    for outputs, inputs in PRODUCTS:
        for rows in (1, 2, 3, 8, 17) if outputs < 5000 else (1, 3):
            x, w, w3 = (
                draw(rows, inputs, dtype=dtype),
                draw(outputs, inputs, dtype=dtype),
                draw(outputs, inputs, dtype=dtype),
            )
            b, r = draw(outputs, dtype=dtype), draw(rows, outputs, dtype=dtype)
            w, w3 = w * inputs**-0.5, w3 * inputs**-0.5
            xs, ws, w3s = x.double(), w.double(), w3.double()
            expected = {'plain': xs @ ws.T, 'all': xs @ ws.T + b + r, 'swiglu': F.silu(xs @ ws.T) * (xs @ w3s.T)}

            def run(x=x, w=w, w3=w3, b=b, r=r) -> dict[str, Tensor]:
                with zoo.kernel_backend('triton'):
                    return {'plain': decode.token_linear(x, w), 'all': decode.token_linear(x, w, b, r),
                            'swiglu': decode.token_swiglu(x, w, w3)}  # fmt: skip

            good, errors = verdict(run, expected, limit, (dtype, 'products', outputs, inputs, rows))
            bad, worst = bad + (not good), max(worst, *errors.values())
    say(what='products', dtype=str(dtype)[6:], worst=worst)
    return bad


@torch.no_grad()
def _layer(say, dtype: torch.dtype) -> int:
    """The two launches of mmMamba's layer and attention over a buffer."""
    limit, bad, worst = LIMITS[dtype][0] * 2, 0, {}
    for batch, heads, kv, dim, hidden, width, biased in LAYERS:
        sizes = [kv * dim, kv * dim, heads * dim, heads * dim, heads]
        channels = sum(sizes[:3])
        weights = [draw(n, hidden, dtype=dtype) * hidden**-0.5 for n in sizes]
        biases = [draw(n, dtype=dtype) if biased and i < 3 else None for i, n in enumerate(sizes)]
        conv = draw(channels, width, dtype=dtype), draw(channels, dtype=dtype)
        x, columns = draw(batch, hidden, dtype=dtype), draw(batch, channels, width, dtype=dtype)
        state = draw(batch, heads, dim, dim, dtype=torch.float32)
        rest = draw(heads, dtype=dtype), draw(heads, dtype=dtype), draw(heads, dtype=dtype), draw(dim, dtype=dtype)

        def run(cast=lambda t: t, x=x, parts=(weights, biases, conv, rest), states=(columns, state), kv=kv):
            columns, state = (cast(t.clone()) for t in states)
            args = [[None if t is None else cast(t) for t in ts] for ts in parts]
            mixed = decode.token_projections_(cast(x), args[0], args[1], *args[2], columns)
            y = decode.mamba2_step_(mixed, state, *args[3], 1e-5, kv)
            return {'mixed': mixed, 'columns': columns, 'y': y, 'state': state}

        with zoo.kernel_backend('torch'):
            expected = run(lambda t: t.double())
        with zoo.kernel_backend('triton'):
            good, errors = verdict(run, expected, limit, (dtype, 'layer', batch, heads, kv, dim))
            first = run()  # a race shows itself once in a while
            differs = [n for _ in range(30) for n, t in run().items() if not torch.equal(t, first[n])]
        if differs:
            print('BAD', dtype, 'layer', batch, heads, kv, dim, 'differs from run to run', set(differs), flush=True)
        bad += not good or bool(differs)
        worst['layer'] = max(worst.get('layer', 0.0), *errors.values())
    for batch, heads, kv, dim, length, capacity in [(1, 16, 8, 128, 103000, 103168), (1, 16, 16, 64, 1, 256),
                                                    (3, 6, 2, 80, 777, 1024)]:  # fmt: skip
        q = draw(batch, heads, dim, dtype=dtype)
        keys, values = (draw(batch, kv, capacity, dim, dtype=dtype) for _ in range(2))
        keys[:, :, length:] = values[:, :, length:] = float('nan')
        start = torch.arange(batch, device=DEVICE) * (length // 4)
        count = torch.tensor([length], device=DEVICE)
        wide = [t.double() for t in (q, keys, values)]
        expected = {'y': decode.naive_decode_attention(*wide, count, start, dim**-0.5)}

        def attend(q=q, keys=keys, values=values, count=count, start=start) -> dict[str, Tensor]:
            with zoo.kernel_backend('triton'):
                return {'y': decode.decode_attention(q, keys, values, count, start=start)}

        good, errors = verdict(attend, expected, limit, (dtype, 'attention', batch, heads, kv, dim, length))
        bad += not good
        worst['attention'] = max(worst.get('attention', 0.0), *errors.values())
    say(what='layer', dtype=str(dtype)[6:], worst=worst)
    return bad


@torch.no_grad()
def _pieces(say, dtype: torch.dtype) -> int:
    """Attention of a piece of a prompt in a key-value buffer, by blocks where PyTorch prefers cuDNN and in one go."""
    from zoo.backbones._pieces import _cudnn_is_chosen, attend_piece

    bad = 0
    for length, total in [(4096, 4096), (4096, 5 * 4096), (4096, 8 * 4096), (3000, 9000)]:
        q = draw(1, length, 4, 128, dtype=dtype).transpose(1, 2)
        keys, values = (draw(1, 2, total + 256, 128, dtype=dtype)[:, :, :total] for _ in range(2))
        seen = torch.ones(length, total, device=DEVICE, dtype=torch.bool).tril(total - length)
        rows = []
        for head in range(4):
            scores = (q[0, head].double() @ keys[0, head // 2].double().T * 0.2).masked_fill_(~seen, float('-inf'))
            rows.append(scores.softmax(-1) @ values[0, head // 2].double())

        def run(q=q, keys=keys, values=values) -> dict[str, Tensor]:
            return {'y': attend_piece(q, keys, values, 0.2)}

        good, errors = verdict(
            run, {'y': torch.stack(rows)[None]}, 2 * LIMITS[dtype][0], (dtype, 'piece', length, total)
        )
        bad += not good
        cudnn = _cudnn_is_chosen(q, keys, values, 0.2)
        say(what='piece', dtype=str(dtype)[6:], queries=length, keys=total, cudnn=cudnn, **errors)
    return bad


def _model(kind: str, dtype: torch.dtype):
    """Four layers with HoVLE's head size."""
    from zoo.backbones import hovle, mmmamba

    torch.manual_seed(0)
    sizes = dict(
        num_hidden_layers=2, hidden_size=512, num_attention_heads=4, num_key_value_heads=2, intermediate_size=768
    )
    first = dict(sizes, image_size=56, llm_vocab_size=1000, llm_hidden_size=512, img_context_token_id=999)
    config = hovle.HoVLEConfig(embedding_config=first, llm_config=dict(sizes, vocab_size=1000))
    model = hovle.HoVLEForConditionalGeneration(config).eval()
    if kind != 'softmax':
        model = mmmamba.from_hovle(model, range(4) if kind == 'linear' else [1, 3])
    for parameter in model.parameters():  # away from initial values, at which little depends on the input
        parameter.data.add_(
            0.5 * torch.randn_like(parameter) / (parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 5)
        )
    for parameter in model.parameters():  # as `from_pretrained` does: rotary frequencies stay in fp32
        parameter.data = parameter.data.to(dtype)
    return model.to(DEVICE)


def _generate(say, dtype: torch.dtype) -> int:
    """Tokens of the captured loop against transformers' loop: one prompt, a second one, padding, pieces, sampling."""
    from zoo.vlm import _step
    from zoo.vlm.decode import fast_decode

    bad = 0
    steps: list[_step.Step] = []
    plain_init = _step.Step.__init__
    for kind in ('linear', 'hybrid', 'softmax'):
        model = _model(kind, dtype)
        ids = torch.randint(3, 900, (2, 300), device=DEVICE)
        padded = torch.ones_like(ids)
        padded[0, :37] = 0
        calls = {
            'one': dict(input_ids=ids[:1], max_new_tokens=40),
            'shorter': dict(input_ids=ids[:1, :120], max_new_tokens=40),
            'padded': dict(input_ids=ids, attention_mask=padded, max_new_tokens=24),
            'pieces': dict(input_ids=ids[:1], max_new_tokens=24, prefill_chunk_size=128),
            'penalty': dict(input_ids=ids[:1], max_new_tokens=24, repetition_penalty=1.2),
        }
        expected = {n: model.generate(**c, do_sample=False) for n, c in calls.items()}
        ends = dict(calls['one'], eos_token_id=int(expected['one'][0, 320]))
        calls['ends'], expected['ends'] = ends, model.generate(**ends, do_sample=False)
        steps.clear()
        _step.Step.__init__ = lambda self, *a, **k: (plain_init(self, *a, **k), steps.append(self))[0]
        try:
            with fast_decode(model):
                got = {n: model.generate(**c, do_sample=False) for n, c in calls.items()}
        finally:
            _step.Step.__init__ = plain_init
        captured = [s.graph is not None for s in steps]
        same = {n: _agreement(got[n], expected[n]) for n in calls}
        # in half precision two kernels may round a near tie to different tokens, and all after it differ
        least = 1.0 if dtype == torch.float32 else 0.05
        good = all(captured) and all(s >= least for s in same.values())
        if not good:
            print('BAD', dtype, kind, same, captured, [s.failure for s in steps], flush=True)
        bad += not good
        say(what='generate', dtype=str(dtype)[6:], model=kind, same=same, captures=len(captured), good=good)
        bad += _logits(say, model, kind, dtype, ids[:1])
    return bad


def _agreement(got: Tensor, expected: Tensor) -> float:
    """Share of the answer before the first difference."""
    if got.shape[0] != expected.shape[0]:
        return 0.0
    n = min(got.shape[1], expected.shape[1])
    wrong = (got[:, :n] != expected[:, :n]).any(0).nonzero()
    reached = int(wrong[0]) if len(wrong) else n if got.shape == expected.shape else 0
    prompt = 300 if n > 300 else 120
    return round(max(0.0, (reached - prompt) / max(1, expected.shape[1] - prompt)), 3)


@torch.no_grad()
def _logits(say, model, kind: str, dtype: torch.dtype, ids: Tensor) -> int:
    """Logits of replayed steps against one pass over all tokens in fp64 on the torch path."""
    from zoo.vlm import _step
    from zoo.vlm.decode import fast_decode

    seen: list[Tensor] = []
    plain = _step.Step.__call__

    def call(self, *args):
        plain(self, *args)
        seen.append(self.logits.clone())

    _step.Step.__call__ = call
    try:
        with fast_decode(model):
            out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    finally:
        _step.Step.__call__ = plain
    with zoo.kernel_backend('torch'):
        wide = type(model)(model.config).to(DEVICE).double().eval()
        wide.load_state_dict(model.state_dict())
        expected = wide(input_ids=out).logits[0, ids.shape[1] : -1].double()
    got = torch.cat(seen).double()
    error = ((got - expected).norm() / expected.norm()).item() if got.shape == expected.shape else float('inf')
    good = error < {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    if not good:
        print('BAD', dtype, kind, 'logits', error, flush=True)
    say(what='logits', dtype=str(dtype)[6:], model=kind, steps=len(expected), error=error, good=good)
    return not good


@torch.no_grad()
def _times(say) -> None:
    """Products of one bf16 token by graph: ours, cuBLAS's, and the bandwidth that ours reaches."""
    for outputs, inputs in PRODUCTS[:5]:
        copies = max(2, min(12, 2**29 // (2 * outputs * inputs)))
        sets = [
            (draw(1, inputs, dtype=torch.bfloat16), draw(outputs, inputs, dtype=torch.bfloat16)) for _ in range(copies)
        ]
        ours = graph_ms([lambda x=x, w=w: decode.token_linear(x, w) for x, w in sets], 20)
        theirs = graph_ms([lambda x=x, w=w: F.linear(x, w) for x, w in sets], 20)
        say(what='product', shape=(outputs, inputs), us=ours * 1e3, cublas_us=theirs * 1e3,
            tb_per_s=2 * outputs * inputs / ours / 1e9)  # fmt: skip
    state = [draw(1, 16, 128, 128, dtype=torch.float32) for _ in range(8)]
    mixed, small, norm = (draw(*s, dtype=torch.bfloat16) for s in ((1, 6160), (16,), (128,)))
    step = [lambda s=s: decode.mamba2_step_(mixed, s, small, small, None, norm, 1e-5, 8) for s in state]
    say(what='mamba2_step_', us=graph_ms(step, 20) * 1e3)
    count = torch.tensor([103000], device=DEVICE)
    keys = [draw(1, 8, 103168, 128, dtype=torch.bfloat16) for _ in range(2)]
    q = draw(1, 16, 128, dtype=torch.bfloat16)
    ms = graph_ms([lambda: decode.decode_attention(q, *keys, count)], 20)
    say(what='decode_attention 103000', us=ms * 1e3, tb_per_s=4 * 8 * 103000 * 128 / ms / 1e9)
    from zoo.backbones import _pieces

    q = draw(1, 16384, 16, 128, dtype=torch.bfloat16).transpose(1, 2)
    for pieces in (1, 4, 6):
        part = [t[:, :, : 16384 * pieces] for t in keys]
        flops = 4 * 16 * 128 * 16384**2 * (pieces - 0.5)
        first = wall_ms(lambda p=part: _pieces.attend_piece(q, *p, 0.1), DEVICE)
        chosen = min(wall_ms(lambda p=part: _pieces.attend_piece(q, *p, 0.1), DEVICE) for _ in range(5))
        bias = causal_lower_right(16384, 16384 * pieces)
        whole = [t.repeat_interleave(2, 1) for t in part]
        flash = min(wall_ms(lambda w=whole, b=bias: F.scaled_dot_product_attention(q, *w, attn_mask=b), DEVICE)
                    for _ in range(5))  # fmt: skip
        say(what='piece of 16384', keys=16384 * pieces, first_ms=first, ms=chosen,
            tflops=flops / chosen / 1e9, one_product_ms=flash)  # fmt: skip


def check(say, dtypes=(torch.float32, torch.float16, torch.bfloat16)) -> int:
    """Number of bad cases."""
    bad = 0
    for dtype in dtypes:
        torch.manual_seed(0)
        bad += _differentiable(say, dtype) + _products(say, dtype) + _layer(say, dtype)
        bad += _pieces(say, dtype)
        if dtype != torch.float16:
            bad += _generate(say, dtype)
    if torch.bfloat16 in dtypes:
        _times(say)
    return bad


if __name__ == '__main__':
    main(check)
