"""Plug-ins for evaluation programs of others. Nothing here is imported by the rest of the package."""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """What the entry point `lmms_eval.models` gives to lmms-eval: its model `zoo`; the class is imported when used.

    Returns:
        lmms_eval.models.registry_v2.ModelManifest (lmms-eval 0.6 and later).
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id='zoo', chat_class_path='zoo.integrations.lmms_eval.ZooVLM', aliases=('linear_zoo',))
