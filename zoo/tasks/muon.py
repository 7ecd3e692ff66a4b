"""Muon for processors on which products of small bf16 matrices are slow."""

from __future__ import annotations

import torch
from timm.optim.muon import get_lr_scale, reshape_for_muon, zeropower_via_newtonschulz
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ['Muon32']

# timm's default: a polynomial of its own for each iteration
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


class Muon32(torch.optim.Optimizer):
    """timm's Muon with its Newton-Schulz iterations in fp32, those of matrices of one shape side by side.

    timm and PyTorch iterate in bf16, which suits a GPU; on a CPU without units for bf16 that takes 16 times as long as
    fp32 for matrices of some hundred rows. The rule is timm's otherwise: momentum, orthogonalisation, steps scaled to
    the size of AdamW's. Parameters that are not matrices, and groups with `use_fallback` (timm makes them of names in
    fallback_list, such as embeddings), take AdamW's steps.
    Source: K. Jordan et al., "Muon", 2024; scaling: arXiv 2502.16982; timm.optim.muon.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate of both rules.
        weight_decay: Of both rules, decoupled.
        momentum: Of the matrices.
        nesterov: Whether the momentum looks ahead.
        ns_steps: Newton-Schulz iterations.
        betas: AdamW's.
        eps: Least norm of a gradient, and AdamW's.
    """

    def __init__(
        self,
        params,
        lr: float = 2e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = False,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-7,
    ) -> None:
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            betas=betas,
            eps=eps,
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters that have a gradient; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices: dict[torch.Size, list[Tensor]] = {}
            others = []
            for p in group['params']:
                if p.grad is None:
                    continue
                if _is_matrix(p) and not group.get('use_fallback'):
                    matrices.setdefault(p.shape, []).append(p)
                else:
                    others.append(p)
            for same in matrices.values():
                self._orthogonal_step(same, group)
            if others:
                self._adamw_step(others, group)
        return loss

    def _orthogonal_step(self, params: list[Tensor], group: dict) -> None:
        grads = [p.grad for p in params]
        for p in params:
            if 'momentum_buffer' not in self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        momenta = [self.state[p]['momentum_buffer'] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
        steps = torch._foreach_lerp(grads, momenta, group['momentum']) if group['nesterov'] else momenta
        flat = torch.stack([reshape_for_muon(s, mode='flatten')[0] if s.ndim > 2 else s for s in steps])
        flat = zeropower_via_newtonschulz(flat, group['ns_steps'], QUINTIC, eps=group['eps'], dtype=torch.float32)
        scale = get_lr_scale(flat.shape[1:], 'match_rms_adamw')
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_add_(params, [s.reshape(p.shape) for s, p in zip(flat, params)], alpha=-group['lr'] * scale)

    def _adamw_step(self, params: list[Tensor], group: dict) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        kept = {key: [self.state[p][key] for p in params] for key in ('exp_avg', 'exp_avg_sq', 'step')}
        beta1, beta2 = group['betas']
        adamw(
            params,
            [p.grad for p in params],
            kept['exp_avg'],
            kept['exp_avg_sq'],
            [],
            kept['step'],
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group['lr'],
            weight_decay=group['weight_decay'],
            eps=group['eps'],
            maximize=False,
        )


def _is_matrix(p: Tensor) -> bool:
    """Whether timm's Muon would orthogonalise it (its defaults)."""
    if p.ndim < 2 or 1 in p.shape[:2]:
        return False
    short, long = sorted((p.shape[0], p[0].numel()))
    return short >= 4 and long <= 128 * short
