"""From a softmax Transformer to a linear-time student: `zoo.linearize`, and what distillation needs around it.

    import zoo, zoo.vlm
    teacher = AutoModelForImageTextToText.from_pretrained(folder)
    student = zoo.linearize(teacher, 'mamba2', layers='3:1')
    student.save_pretrained('student')          # AutoModelForImageTextToText.from_pretrained('student') reads it

A student starts with the teacher's weights, not with its function: the mixers only inherit projections. Distillation
(`zoo.tasks`) turns it into a model. All mixers are causal; PaliGemma and Gemma 3 let the tokens of an image see each
other in both directions, which their linear layers lose.
"""

from __future__ import annotations

import copy
import numbers
import operator
import re
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo._sensitivity import Sensitivity, sensitivity
from zoo.errors import ZooError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    'Captured',
    'Sensitivity',
    'capture',
    'decoder_layers',
    'families',
    'linear_layers',
    'linearize',
    'mixers',
    'restore_attention',
    'sensitivity',
    'trainable',
]

ROLES = ('new', 'qkv', 'output', 'rest')


def linearize(
    teacher: PreTrainedModel,
    mixer: str = 'mamba2',
    layers: str | int | Sequence[int] = 'all',
    *,
    mixer_kwargs: dict[str, Any] | None = None,
    calibration: Iterable[dict[str, Tensor]] | None = None,
    report: str | Path | None = None,
    share_frozen: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """A student: the teacher with linear-time mixers in the place of softmax attention layers.

    Args:
        teacher: loaded transformers model with its head, of a family in `zoo.linearizer.families()`, or a native HoVLE
            (whose student is a native mmMamba); not changed.
        mixer: `mamba2`, `gla`, `hedgehog` or `gated_deltanet`.
        layers: which layers become linear: `'all'`; a ratio linear:softmax such as `'3:1'`, the softmax layers first in
            each group; the indices of the linear layers; or the number of layers that stay softmax, which are then
            those whose linearisation changes the calibration batches' logits most.
        mixer_kwargs: options of the mixer, see `zoo.backbones._mixers`.
        calibration: model inputs (a list of keyword dictionaries) for a number of softmax layers.
        report: folder for the sensitivities behind that choice, as JSON and as a plot.
        share_frozen: everything but the mixers shares memory with the teacher and does not require gradients.
        seed: of the mixers' random parameters; the same layer gets the same ones whatever the other layers are.

    Returns:
        The student, of the class `Linearized...` of its family, on the teacher's device and in its dtype. With a number
        of softmax layers it has the `Sensitivity` as `linearizer_report`.

    Raises:
        ZooError: for a teacher that cannot be linearised and for arguments that do not fit, naming the reason.
    """
    from zoo.backbones._mixers import MIXERS

    if mixer not in MIXERS:
        raise ZooError(f'unknown mixer {mixer!r}: choose one of {", ".join(MIXERS)}')
    native = _is_hovle(teacher)
    if native and mixer != 'mamba2':
        raise ZooError("a native HoVLE becomes a native mmMamba: mixer='mamba2' is the only choice")
    from zoo._families import VERSION, check_teacher

    kind = None if native else check_teacher(teacher)
    count, found = len(decoder_layers(teacher)), None
    if isinstance(layers, numbers.Integral):
        layers = layers if isinstance(layers, bool) else int(layers)
        found = _budget(teacher, layers, count, calibration, mixer, mixer_kwargs, seed)
        chosen = found.linear_layers(layers)
    else:
        chosen = linear_layers(layers, count)
    if not chosen:
        raise ZooError(f'layers={layers!r} makes none of the {count} layers linear: the student would be the teacher')
    recipe = {'layers': chosen, 'mixer': mixer, 'mixer_kwargs': dict(mixer_kwargs or {}), 'version': VERSION}
    if native:
        student = _native_student(teacher, recipe, share_frozen, seed)
    else:
        student = _copy_with_mixers(teacher, kind, recipe, share_frozen, seed)
    student._shares_frozen = share_frozen
    if found is not None:
        student.linearizer_report = found
        if report is not None:
            found.save(report, softmax=count - len(chosen))
    return student


def _budget(teacher, layers: int, count: int, calibration, mixer: str, mixer_kwargs, seed: int) -> Sensitivity:
    if isinstance(layers, bool) or not 0 <= layers <= count:
        raise ZooError(f'layers={layers}: the teacher has {count} layers that could stay softmax')
    if calibration is None:
        raise ZooError(
            f'layers={layers} keeps the {layers} softmax layers that matter most: pass calibration=[batch, ...], '
            "or choose without data, e.g. layers='3:1'"
        )
    return sensitivity(teacher, calibration, mixer, mixer_kwargs=mixer_kwargs, seed=seed)


def families() -> tuple[str, ...]:
    """Model types that `linearize` takes."""
    from zoo._families import FAMILIES

    return tuple(sorted(FAMILIES))


def linear_layers(layers: str | Sequence[int], count: int) -> list[int]:
    """The indices of the linear layers of a decoder with `count` layers.

    Raises:
        ZooError: for anything but `'all'`, a ratio such as `'3:1'`, or indices in range.
    """
    if isinstance(layers, str):
        if layers == 'all':
            return list(range(count))
        ratio = re.fullmatch(r'(\d+):(\d+)', layers)
        if not ratio or int(ratio[1]) + int(ratio[2]) == 0:
            raise ZooError(f"layers={layers!r}: expected 'all', a ratio linear:softmax such as '3:1', or layer indices")
        linear, softmax = int(ratio[1]), int(ratio[2])
        return [i for i in range(count) if i % (linear + softmax) >= softmax]
    try:
        # neither flags nor fractions, which `int` would take for indices
        chosen = sorted(operator.index('' if isinstance(i, bool) else i) for i in layers)
    except TypeError as error:
        raise ZooError(f"layers={layers!r}: expected 'all', a ratio such as '3:1', or layer indices") from error
    if len(set(chosen)) < len(chosen) or any(not 0 <= i < count for i in chosen):
        raise ZooError(f'layers={list(layers)}: expected different indices from 0 to {count - 1}')
    return chosen


def _copy_with_mixers(teacher, kind: type, recipe: dict[str, Any], share: bool, seed: int) -> PreTrainedModel:
    from zoo._families import attach_padding, attention_name, attention_shape
    from zoo.backbones._mixers import MIXERS

    memo: dict[int, Any] = {}
    for i, layer in enumerate(decoder_layers(teacher)):
        attention = getattr(layer, attention_name(layer))
        shape = attention_shape(attention, i)  # softmax layers are checked too
        if i in recipe['layers']:
            generator = torch.Generator().manual_seed(seed * 100_003 + i)
            new = _build(MIXERS[recipe['mixer']], attention, shape, generator, recipe)
            memo[id(attention)] = new
    if share:
        for p in [*teacher.parameters(), *teacher.buffers()]:
            memo[id(p)] = nn.Parameter(p.detach(), False) if isinstance(p, nn.Parameter) else p
    # Copying maps a module that is already in the memo to what stands there: the mixer of that layer.
    student = copy.deepcopy(teacher, memo)
    student.config.__class__ = kind.config_class
    student.config.linearizer = recipe
    student.__class__ = kind
    attach_padding(student)
    return student


def _build(cls: type, attention: nn.Module, shape, generator: torch.Generator, recipe: dict[str, Any]) -> nn.Module:
    try:
        return cls.from_attention(attention, shape, generator=generator, **recipe['mixer_kwargs'])
    except (TypeError, ValueError) as error:
        raise ZooError(
            f'mixer {recipe["mixer"]!r} does not take mixer_kwargs={recipe["mixer_kwargs"]}: {error}'
        ) from error


def _is_hovle(teacher: Any) -> bool:
    return hasattr(teacher, 'embedding_model') and teacher.config.model_type == 'internvl_chat'


def _native_student(teacher, recipe: dict[str, Any], share: bool, seed: int) -> PreTrainedModel:
    from zoo.backbones.mmmamba import from_hovle

    options = recipe['mixer_kwargs']
    try:
        return from_hovle(teacher, recipe['layers'], mixer_kwargs=options, share_frozen=share, seed=seed)
    except (TypeError, ValueError) as error:
        raise ZooError(f"mixer 'mamba2' does not take mixer_kwargs={options}: {error}") from error


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the text decoder, in the order of their cache slots; PEFT's wrapper is looked through.

    Raises:
        ZooError: if there is no decoder.
    """
    from zoo._families import decoder_layers

    return decoder_layers(model)


def mixers(model: nn.Module) -> dict[int, nn.Module]:
    """Decoder layer index to mixer, of the linear layers of a student."""
    from zoo._families import attention_name
    from zoo.backbones._mixer import Mixer

    found = {i: getattr(layer, attention_name(layer)) for i, layer in enumerate(decoder_layers(model))}
    return {i: module for i, module in found.items() if isinstance(module, Mixer)}


def trainable(model: nn.Module, roles: Iterable[str]) -> dict[str, nn.Parameter]:
    """Let exactly the parameters of some roles require gradients.

    Args:
        model: a student.
        roles: any of `new` (what the mixers add), `qkv` and `output` (projections that the mixers inherit), `rest`
            (everything outside the mixers).

    Returns:
        The parameters that train, by their name in the model.

    Raises:
        ZooError: for an unknown role, a model without mixers, or `rest` of a student that shares it with its teacher.
    """
    roles = set(roles)
    if roles - set(ROLES):
        raise ZooError(f'unknown role {", ".join(sorted(roles - set(ROLES)))}: choose among {", ".join(ROLES)}')
    if not mixers(model):
        raise ZooError(f'{type(model).__name__} has no linear layers: make a student with zoo.linearize(...)')
    if 'rest' in roles and getattr(model, '_shares_frozen', False):
        raise ZooError("the student shares everything but its mixers with the teacher: role 'rest' would train both")
    role = {p: r for m in mixers(model).values() for p, r in zip(m.parameters(), m.parameter_roles().values())}
    for parameter in model.parameters():
        parameter.requires_grad_(role.get(parameter, 'rest') in roles)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def restore_attention(student: nn.Module, teacher: nn.Module, layers: Iterable[int]) -> None:
    """Give linear layers of a student their softmax attention back, as copies of the teacher's, frozen.

    Args:
        student: changed in place; its config names the layers that stay linear.
        teacher: the model it was made from.
        layers: indices of the layers that become softmax again.

    Raises:
        ZooError: if one of them is not linear in the student, or softmax in the teacher.
    """
    from zoo._families import attention_name, mark_linear, unwrapped

    student, teacher = unwrapped(student), unwrapped(teacher)
    layers, linear, taken = sorted(set(layers)), mixers(student), mixers(teacher)
    wrong = [i for i in layers if i not in linear or i in taken]
    if wrong:
        raise ZooError(f'layers {wrong}: expected linear layers of the student that are softmax in the teacher')
    originals = decoder_layers(teacher)
    for i in layers:
        layer = decoder_layers(student)[i]
        name = attention_name(layer)
        theirs = getattr(originals[i], name)
        config = student.config if theirs.config is teacher.config else student.config.get_text_config(decoder=True)
        mine = copy.deepcopy(theirs, {id(theirs.config): config})
        setattr(layer, name, mine.requires_grad_(False).train(student.training))
    mark_linear(student, [i for i in linear if i not in layers])


@dataclass
class Captured:
    """What the softmax layers of a decoder saw and made in the newest forward pass, by layer index, detached.

    inputs: normed inputs of the attention (B, L, hidden). heads: outputs of its heads before the output projection
    (B, L, H, d). kwargs: the layer's other arguments that a mixer may need (`position_embeddings`).
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    kwargs: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Input, head outputs and arguments of one layer."""
        return self.inputs[index], self.heads[index], self.kwargs[index]


@contextmanager
def capture(teacher: nn.Module, layers: Iterable[int] | None = None, callback=None):
    """Collect what layer-wise distillation compares, while the teacher runs with its own attention kernels.

        with capture(teacher) as seen, torch.no_grad():
            teacher(**batch)
        loss = (mixer.heads(seen.inputs[3], **seen.kwargs[3]) - seen.heads[3]).square().mean()

    Args:
        teacher: a transformers decoder or a native HoVLE.
        layers: indices of the layers to watch; all softmax layers by default.
        callback: `callback(index, inputs, heads, kwargs)`, called as each layer has run, in the place of collecting:
            only one layer's tensors then live at a time.

    Returns:
        A context manager with the `Captured`; hooks are removed at its end.
    """
    from zoo._families import attention_name

    seen, handles = Captured(), []
    known = mixers(teacher)
    for i, layer in enumerate(decoder_layers(teacher)):
        if i in known or (layers is not None and i not in set(layers)):
            continue
        attention = getattr(layer, attention_name(layer))
        handles += _watch(i, attention, seen, callback)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _watch(index: int, attention: nn.Module, seen: Captured, callback) -> list:
    output = attention.o_proj if hasattr(attention, 'o_proj') else attention.wo

    def before(module, args, kwargs):
        hidden_states = args[0] if args else kwargs['hidden_states']
        seen.inputs[index] = hidden_states.detach()
        seen.kwargs[index] = {k: kwargs[k] for k in ('position_embeddings',) if kwargs.get(k) is not None}

    def after(module, args):
        heads = args[0].detach().unflatten(-1, (-1, attention.head_dim))
        if callback is None:
            seen.heads[index] = heads
        else:
            callback(index, seen.inputs.pop(index), heads, seen.kwargs.pop(index))

    return [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        output.register_forward_pre_hook(after),
    ]
