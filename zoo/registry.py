"""The model registry: timm's own, with the zoo's models in it."""

from __future__ import annotations

from timm.models import create_model

import zoo.backbones.vig  # noqa: F401  registers its models

__all__ = ['create_model', 'list_models']


def list_models(filter: str = '', capability: str | None = None) -> list[str]:
    import timm

    return timm.list_models(filter or '*', module='vig')
