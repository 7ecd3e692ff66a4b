"""The model registry: timm's own, with the zoo's models in it.

Importing this module registers every family of `backbones/` with timm; `create_model` is timm's function of that name.
What a family can do is a table here, which tests compare with what its models really do.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

import timm
from timm.models import create_model, is_model, is_model_pretrained, model_entrypoint

from zoo.errors import ZooError

__all__ = ['CAPABILITIES', 'PUBLISHED_TOP1', 'capabilities', 'check_name', 'create_model', 'family', 'list_models']

CAPABILITIES = {
    'features_only': 'create_model(name, features_only=True) returns feature maps at known strides',
    'export': '`zoo export` writes ONNX and torch.export programs that agree with eager',
    'dense': 'any height and width, odd and non-square ones included, give maps of the right stride',
    'pretrained': 'create_model(name, pretrained=True) loads published weights',
}

# One line per file in backbones/. `pretrained` is a property of single models and comes from their weight entries.
_FAMILIES = {
    'mobilemamba': frozenset({'features_only', 'export', 'dense'}),
    'ravlt': frozenset({'features_only', 'export', 'dense'}),
    'vig': frozenset({'features_only', 'export', 'dense'}),
}

# ImageNet-1k top-1 (%) that the authors state for their weights, in their own evaluation at the model's input size.
PUBLISHED_TOP1 = {
    'mobilemamba_t2': 73.6,
    'mobilemamba_t4': 76.1,
    'mobilemamba_s6': 78.0,
    'mobilemamba_b1': 79.9,
    'mobilemamba_b2': 81.6,
    'mobilemamba_b4': 82.5,
    'ravlt_tiny': 82.8,
    'ravlt_small': 84.4,
    'ravlt_base': 85.5,
    'ravlt_large': 85.8,
    'vig_tiny_patch16_224': 77.2,
    'vig_small_patch16_224': 81.7,
    'vig_base_patch16_224': 82.6,
    'vig_hier_tiny_224': 82.8,
    'vig_hier_small_224': 83.8,
    'vig_hier_base_224': 84.2,
}

for _family in _FAMILIES:
    importlib.import_module(f'zoo.backbones.{_family}')


def _architecture(name: str) -> str:
    """The part of a registry name before its weight tag."""
    return name.split('.', 1)[0]


def family(name: str) -> str | None:
    """The file under `backbones/` that a model comes from, or None for timm's own models.

    Args:
        name: a registered model name, with or without a weight tag.
    """
    package, _, module = model_entrypoint(_architecture(name)).__module__.rpartition('.')
    return module if package == 'zoo.backbones' else None


def capabilities(name: str) -> frozenset[str]:
    """Which of `CAPABILITIES` a model of the zoo has.

    Args:
        name: a name from `list_models()`.

    Raises:
        ZooError: if the name is unknown or belongs to timm, whose models are not in the table.
    """
    own = family(check_name(name))
    if own is None:
        raise ZooError(f"{name} is one of timm's models: the capability table covers the zoo's. Type: zoo list")
    return _FAMILIES[own] | ({'pretrained'} if is_model_pretrained(name) else set())


def list_models(filter: str | Iterable[str] = '', capability: str | None = None) -> list[str]:
    """Names of the zoo's models, in natural order.

    Args:
        filter: wildcard pattern or patterns, such as 'vig_hier*'; a plain word matches anywhere in the name.
        capability: keep the models that have it, one of `features_only`, `export`, `dense`, `pretrained`.

    Raises:
        ValueError: for an unknown capability.
    """
    if capability is not None and capability not in CAPABILITIES:
        raise ValueError(f'capability={capability!r}: expected one of {", ".join(CAPABILITIES)}')
    patterns = [filter] if isinstance(filter, str) else list(filter)
    patterns = [p if any(c in p for c in '*?[') else f'*{p}*' for p in patterns]
    names = [n for n in timm.list_models(patterns) if family(n) in _FAMILIES]
    return names if capability is None else [n for n in names if capability in capabilities(n)]


def check_name(name: str) -> str:
    """Return `name` if timm can build it, or say which names are near.

    Args:
        name: a registered name, or one with timm's `hf-hub:` or `local-dir:` prefix.

    Raises:
        ZooError: for an unknown name.
    """
    if name.startswith(('hf-hub:', 'local-dir:')):
        return name
    if not any(c in name for c in '/\\:') and is_model(name):
        return name
    near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
    near = near or difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
    hint = f'Did you mean {" or ".join(near)}? ' if near else ''
    raise ZooError(f'unknown model {name!r}. {hint}Type `zoo list` for the models of the zoo')
