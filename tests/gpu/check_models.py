"""Whole models on the GPU: Triton kernels against the torch path, eager, fused and compiled, in fp32 and bf16.

    python tests/gpu/check_models.py [--models mobilemamba_t2,ravlt_tiny] [--compile]

fp32: logits and the gradient of every parameter agree. bf16 autocast: the kernels are no further from the fp32 result
than 1.5 times the torch path is. Parameters that begin at zero, such as the gains of residual branches, are drawn
anew: a branch behind a gain of 0 would agree whatever it computes.
"""

from __future__ import annotations

import argparse

import timm
import torch
from harness import DEVICE, rms
from torch import Tensor, nn

import zoo

MODELS = {'vig_tiny_patch16_224': 224, 'vig_hier_tiny_224': 224, 'ravlt_tiny': 224, 'mobilemamba_t2': 192}
FP32_LIMIT, MEDIAN_GRAD_LIMIT, BF16_RATIO = 2e-5, 2e-4, 1.5


def build(name: str) -> nn.Module:
    """In training mode, without anything random: drop path off, running statistics fixed."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return model.to(DEVICE).train()


def run(model: nn.Module, call, x: Tensor, backend: str, dtype: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of a fixed random projection of them."""
    model.zero_grad(set_to_none=True)
    with zoo.kernel_backend(backend), torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        y = call(x).float()
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)).sum().backward()
    return y.detach(), {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(result, expected) -> tuple[float, float, float, str]:
    """Of the logits, of the gradients in the middle and at worst, and the worst one's name."""
    grads = {name: rms(grad, expected[1][name]) for name, grad in result[1].items()}
    worst = max(grads, key=grads.get)
    return rms(result[0], expected[0]), sorted(grads.values())[len(grads) // 2], grads[worst], worst


def check(name: str, size: int, compiled: bool) -> int:
    """Number of comparisons that failed."""
    model = build(name)
    x = torch.randn(4, 3, size, size, device=DEVICE)
    expected, bad = run(model, model, x, 'torch', None), 0
    calls = {'eager': model} | ({'compiled': torch.compile(model, dynamic=False)} if compiled else {})
    half = errors(run(model, model, x, 'torch', torch.bfloat16), expected)
    for how, call in calls.items():
        logits, middle, worst, where = errors(run(model, call, x, 'auto', None), expected)
        failed = logits > FP32_LIMIT or middle > MEDIAN_GRAD_LIMIT
        print(f'{name} {how} fp32: logits {logits:.1e}, gradients {middle:.1e}, worst {worst:.1e} {where}', flush=True)
        found = errors(run(model, call, x, 'auto', torch.bfloat16), expected)
        worse = [f'{what} {a:.1e} against {b:.1e}' for what, a, b in zip(('logits', 'gradients'), found, half)]
        print(f'{name} {how} bf16: {", ".join(worse)} of the torch path', flush=True)
        bad += failed + any(a > BF16_RATIO * b for a, b in zip(found[:2], half[:2]))
    if hasattr(model, 'fuse'):
        model.eval()
        with torch.no_grad():
            plain = model(x)
            fused = rms(model.fuse()(x), plain)
        print(f'{name} fused: {fused:.1e}', flush=True)
        bad += fused > 1e-4
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', default=','.join(MODELS))
    parser.add_argument('--compile', action='store_true', help='the compiled model too')
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    bad = 0
    for name in args.models.split(','):
        try:
            bad += check(name, MODELS[name], args.compile)
        except Exception as error:
            print(f'{name}: {type(error).__name__}: {str(error)[-500:]}', flush=True)
            bad += 1
    print(f'{bad} bad')
    return int(bad > 0)


if __name__ == '__main__':
    raise SystemExit(main())
