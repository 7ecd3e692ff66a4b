"""The layer of LinFusion and what it can replace."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention
from diffusers.utils import logging
from torch import Tensor, nn
from zoo.kernels.linear_attention import linear_attention
from zoo.kernels.norm import leaky_layer_norm

EPS = 1e-4
# What these do is what attn1 does without them: they have no weights and compute softmax attention.
STOCK = (
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.FusedAttnProcessor2_0,
    processors.SlicedAttnProcessor,
    processors.XFormersAttnProcessor,
)
FOLDED = ('to_q', 'to_k', 'to_v', 'to_q_', 'to_k_')

logger = logging.get_logger(__name__)


def middle_width(dim: int, rule: int | str | None) -> int | None:
    """The width of the MLPs that a rule gives for a layer of width `dim`, as the published config writes it.

    Args:
        dim: channels of the layer.
        rule: None for dim, -1 for no MLP, a width, or `div:16` for dim / 16.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(rule, str) and re.fullmatch(r'div:[1-9]\d*', rule):
        return max(1, dim // int(rule[4:]))
    if rule is None or (isinstance(rule, int) and not isinstance(rule, bool) and rule >= -1):
        return rule or None  # the published code takes 0 for None
    raise ValueError(f'projection_mid_dim must be None, -1, a positive integer or "div:N", got {rule!r}')


def _projection(dim: int, mid_dim: int | None) -> nn.Module:
    if mid_dim == -1:
        return nn.Identity()
    mid_dim = mid_dim or dim
    return nn.Sequential(nn.Linear(dim, mid_dim), nn.LayerNorm(mid_dim), nn.LeakyReLU(), nn.Linear(mid_dim, dim))


@functools.cache
def _say_once(processor: str) -> None:
    logger.warning(f'{processor} has no effect on linear self-attention: LinearSelfAttention computes it itself')


def project_out(to_out: nn.ModuleList, x: Tensor) -> Tensor:
    """The output of an attention layer; a dropout that does nothing is not called, which saves the host time.

    Args:
        to_out: projection and dropout, as `Attention` has them.
        x: what they are for.
    """
    project, dropout, *_ = to_out
    y = project(x)
    idle = type(dropout) is nn.Dropout and not (dropout.training or dropout._forward_hooks)
    return y if idle else dropout(y)


class LinearSelfAttention(Attention):
    """Normalised linear self-attention in the place of a softmax `attn1`.

    It is an `Attention` with its parameter names and a processor slot, so that everything in diffusers which walks over
    attention modules finds what it expects; the processor in the slot is not called.

    Args:
        dim: channels.
        heads: number of heads, a divisor of dim.
        projection_mid_dim: width of the MLPs of queries and keys; None for dim, -1 for none (their input is 2x then).
        bias: whether queries, keys and values have one.
        out_bias: whether the output has one.
        dropout: of the output.
    """

    _folded_from: tuple | None = None

    def __init__(
        self,
        dim: int,
        heads: int,
        projection_mid_dim: int | None = None,
        bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
    ):
        if dim % heads:
            raise ValueError(f'heads must divide dim, got {heads} and {dim}')
        super().__init__(dim, heads=heads, dim_head=dim // heads, dropout=dropout, bias=bias, out_bias=out_bias)
        self.to_q_ = _projection(dim, projection_mid_dim)
        self.to_k_ = _projection(dim, projection_mid_dim)

    def __setattr__(self, name: str, value) -> None:
        if name == 'processor' and not isinstance(value, STOCK):
            _say_once(type(value).__name__)  # it is kept and never called; some pipelines set it without set_processor
        if name in FOLDED and self._folded_from is not None:
            # an adapter, which may leave again with its weights merged into these in a way that torch does not count
            self.fuse_projections(False)
        super().__setattr__(name, value)

    def _apply(self, fn, recurse: bool = True):
        folded = self._is_folded()
        super()._apply(fn, recurse)
        if folded:  # moved or cast, folded weights with the others
            self._folded_from = self._sources()
        return self

    @torch.no_grad()
    def fuse_projections(self, fuse: bool = True) -> None:
        """Fold weights for inference; `fuse_qkv_projections()` of a UNet or pipeline calls it.

        With a the activation inside an MLP, to_q(x + W a + b) = to_q(x) + (to_q W) a + to_q b: the products with x are
        one, and so are the first layers of both MLPs. Used where no gradient is recorded, without autocast and
        compilation, until a weight changes, an adapter comes or another processor than diffusers' fused one is set; a
        CUDA graph replays the weights that it was captured with, and what writes into the `.data` of a weight has to
        call this again. The folded weights are not saved. Weights that are quantised, kept in 8 bits or made in
        inference mode are not folded.

        Args:
            fuse: False to drop them.
        """
        for name in [name for name in self._buffers if name.startswith('folded_')]:
            del self._buffers[name]
        self._folded_from = None
        parts = [self.to_q, self.to_k, self.to_v, *self.to_q_.children(), *self.to_k_.children()]
        if not fuse or {type(x) for x in parts} - {nn.Linear, nn.LayerNorm, nn.LeakyReLU}:
            return  # with an adapter a projection is more than its weight
        weights = [p for x in parts for p in x.parameters()]
        if not all(type(p) is nn.Parameter and p.dtype.itemsize > 1 and not p.is_inference() for p in weights):
            return
        self._folded_from = self._sources()
        wide = lambda x: x.detach().double()  # noqa: E731
        weights, biases, inner = [], [], not isinstance(self.to_q_, nn.Identity)
        for linear, mlp in ((self.to_q, self.to_q_), (self.to_k, self.to_k_), (self.to_v, None)):
            weight = wide(linear.weight) * (2 if mlp is not None and not inner else 1)
            bias = weight.new_zeros(len(weight)) if linear.bias is None else wide(linear.bias)
            weights.append(weight)
            biases.append(bias + weight @ wide(mlp[3].bias) if inner and mlp is not None else bias)
        folded = {}
        if inner:
            mlps = (self.to_q_, self.to_k_)
            folded['out'] = torch.stack([(weight @ wide(mlp[3].weight)).T for weight, mlp in zip(weights, mlps)])
            weights += [wide(mlp[0].weight) for mlp in mlps]
            biases += [wide(mlp[0].bias) for mlp in mlps]
            folded['norm'] = torch.stack([wide(mlp[1].weight) for mlp in mlps])
            folded['norm_bias'] = torch.stack([wide(mlp[1].bias) for mlp in mlps])
        folded |= {'in': torch.cat(weights), 'in_bias': torch.cat(biases)}
        for name, x in folded.items():
            self.register_buffer(f'folded_{name}', x.to(self.to_q.weight.dtype), persistent=False)

    def _sources(self) -> tuple[list, list]:
        """Where modules and weights that are folded hang, and what hangs there."""
        parts = [(self._modules, name) for name in FOLDED]
        parts += [(mlp._modules, name) for mlp in (self.to_q_, self.to_k_) for name in mlp._modules]
        held = [(d, name, d[name]) for d, name in parts]
        own = [(m._parameters, name, p) for *_, m in held for name, p in m._parameters.items() if p is not None]
        return held, [(*entry, entry[-1]._version, entry[-1].data_ptr()) for entry in own]

    def _is_folded(self) -> bool:
        """Whether weights are folded, and neither they nor the modules that they belong to have changed since."""
        if self._folded_from is None:
            return False
        modules, weights = self._folded_from
        for held, name, module in modules:
            if held.get(name) is not module:
                return False
        for held, name, p, version, place in weights:
            if held.get(name) is not p or p._version != version or p.data_ptr() != place:
                return False
        return True

    def _uses_folded(self, device: str) -> bool:
        if self._folded_from is None or torch.is_grad_enabled():
            return False
        if not isinstance(self.processor, processors.FusedAttnProcessor2_0):
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
            return False  # a compiled program would not see a weight change
        if not self._is_folded():
            self.fuse_projections(False)  # what has changed may change back in a way that torch does not count
        return self._folded_from is not None

    def _folded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values per head, each (B, N, H, D), in one tensor."""
        folded, dim = self._buffers, self.inner_dim  # looking every name up in the module takes a while
        y = F.linear(x, folded['folded_in'], folded['folded_in_bias'])  # and what goes into the norms of the MLPs
        if 'folded_out' in folded:
            weight, (_, norm, activation, _) = folded['folded_norm'], self.to_q_._modules.values()
            a = y.narrow(-1, 3 * dim, y.shape[-1] - 3 * dim).unflatten(-1, weight.shape)
            a = leaky_layer_norm(a, weight, folded['folded_norm_bias'], norm.eps, activation.negative_slope)
            qk = y.narrow(-1, 0, 2 * dim).flatten(0, 1).unflatten(-1, (2, dim)).transpose(0, 1)
            qk.baddbmm_(a.flatten(0, 1).transpose(0, 1), folded['folded_out'])
        return y.narrow(-1, 0, 3 * dim).unflatten(-1, (3, self.heads, -1)).unbind(2)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs,
    ) -> Tensor:
        """Self-attention of (B, N, dim); keywords that pipelines give to every layer are ignored.

        Raises:
            ValueError: for anything to attend to but the tokens themselves, a mask, or another shape.
        """
        if encoder_hidden_states is not None:
            raise ValueError('linear self-attention got encoder_hidden_states: it attends to its own tokens only')
        if attention_mask is not None:
            raise ValueError('linear self-attention got an attention_mask, and has no way to leave tokens out')
        if hidden_states.ndim != 3:
            raise ValueError(f'linear self-attention takes (B, N, dim), got {tuple(hidden_states.shape)}')
        x = hidden_states
        if self._uses_folded(x.device.type):
            q, k, v = self._folded(x)
        else:
            parts = self.to_q(x + self.to_q_(x)), self.to_k(x + self.to_k_(x)), self.to_v(x)
            q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in parts)  # (B, N, H, D)
        o = linear_attention(q, k, v, eps=EPS, elu=True)
        return project_out(self.to_out, o.flatten(2))

    def adopt(self, teacher: Attention) -> None:
        """Start from a softmax layer: its projections, and MLPs that add nothing yet but receive a gradient.

        Args:
            teacher: the layer that is replaced.
        """
        with torch.no_grad():
            for ours, theirs in ((self.to_q, teacher.to_q), (self.to_k, teacher.to_k), (self.to_v, teacher.to_v),
                                 (self.to_out[0], teacher.to_out[0])):  # fmt: skip
                ours.load_state_dict(theirs.state_dict())
            for mlp in (self.to_q_, self.to_k_):
                if not isinstance(mlp, nn.Identity):
                    mlp[3].weight.zero_()
                    mlp[3].bias.zero_()


# --------------------------------------------------------------------------------------------------------------------
# Which layers are replaced


def softmax_layers(model: nn.Module) -> dict[str, Attention]:
    """The self-attention layers of a diffusion model by name, in the order of the published files.

    Args:
        model: a UNet or DiT of diffusers.
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, Attention) and 'attn1' in n.split('.')}


def why_not(layer: Attention) -> str | None:
    """Why a layer cannot be replaced, or None.

    Args:
        layer: what is to be replaced.
    """
    if isinstance(layer, LinearSelfAttention):
        return 'it is linear already (detach() restores the softmax layers)'
    if any(hasattr(m, 'base_layer') for m in layer.modules()):
        return (
            'it carries LoRA layers, which would be lost: unload them (pipeline.unload_lora_weights() or '
            'delete_adapters), attach, load them again'
        )
    if layer.added_kv_proj_dim is not None:
        return 'it attends to text and image tokens jointly'
    if layer.is_cross_attention:
        return 'it attends to the text (only_cross_attention)'
    if layer.is_causal:
        return 'it is causal'
    if layer.norm_q is not None or layer.norm_k is not None:
        return 'its queries and keys are normalised, which the linear layer has no place for'
    if layer.group_norm is not None or layer.spatial_norm is not None or layer.residual_connection:
        return 'it holds its own norm or residual connection'
    if (
        not layer.inner_dim == layer.inner_kv_dim == layer.query_dim == layer.out_dim
        or layer.rescale_output_factor != 1
    ):
        return 'its widths differ or its output is rescaled'
    if not isinstance(layer.to_out, nn.ModuleList):
        return 'it has no output projection of its own'
    if not isinstance(layer.processor, STOCK):
        return f'its processor {type(layer.processor).__name__} does more than softmax attention'
    if hasattr(layer.to_q, '_hf_hook'):
        return 'its weights are offloaded one by one: attach before enable_sequential_cpu_offload()'
    if not {type(x) for x in (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0])} == {nn.Linear}:
        return f'its projections are {type(layer.to_q).__name__}, not plain matrices (load the model unquantised)'
    return None


def describe(layers: Mapping[str, Attention], rule: int | str | None) -> list[dict]:
    """`modules_list` of the published config for these layers.

    Args:
        layers: by name.
        rule: width of the MLPs, see `middle_width`.
    """
    entries = []
    for name, layer in layers.items():
        dim = layer.to_q.weight.shape[0]
        entry = {'module_name': name, 'dim_n': dim, 'heads': layer.heads, 'projection_mid_dim': middle_width(dim, rule)}
        if layer.to_q.bias is not None:
            entry['bias'] = True  # DiTs; the published files know UNets, which have none
        if layer.to_out[0].bias is None:
            entry['out_bias'] = False
        entries.append(entry)
    return entries


def normalised(modules_list: Iterable) -> list[dict]:
    """Both published forms of `modules_list` as the newer one: dictionaries."""
    entries = []
    for entry in modules_list:
        if not isinstance(entry, Mapping):
            name, dim, heads = entry  # older files
            entry = {'module_name': name, 'dim_n': dim, 'heads': heads}
        entries.append({**entry, 'projection_mid_dim': entry.get('projection_mid_dim')})
    return entries


def differences(ours: list[dict], theirs: list[dict]) -> str | None:
    """The first thing in which weights for `theirs` do not fit a model with layers `ours`, or None."""
    if len(ours) != len(theirs):
        return f'they are for {len(theirs)} self-attention layers, the model has {len(ours)}'
    for a, b in zip(ours, theirs):
        for key, what in (('module_name', 'layer'), ('dim_n', 'width'), ('heads', 'number of heads')):
            if a[key] != b[key]:
                return f"{what} {b[key]} does not fit the model's {a[key]} ({a['module_name']})"
        for key in ('bias', 'out_bias'):
            if a.get(key) != b.get(key):
                return f'{key} of {a["module_name"]} is another one'
    return None
