"""Vision-language models: importing this module lets transformers' Auto classes load the zoo's.

    import zoo.vlm
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained('hustvl/mmMamba-linear', dtype='bfloat16')

After it, `config.json` of HoVLE (`internvl_chat`), mmMamba (`mmMamba_chat`) and of linearised models of transformers'
own families (`linearized_...`) is read without remote code. InternVL models with a vision encoder also call themselves
`internvl_chat`: load those in a process that does not import this module.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from zoo import _families
from zoo.backbones._mmmamba_layout import register_layout
from zoo.backbones.hovle import HoVLEConfig, HoVLEForConditionalGeneration
from zoo.backbones.mmmamba import HoVLELinearForConditionalGeneration, MMMambaConfig, from_hovle
from zoo.vlm import processing

__all__ = [
    'HoVLEConfig',
    'HoVLEForConditionalGeneration',
    'HoVLELinearForConditionalGeneration',
    'MMMambaConfig',
    'from_hovle',
    'register',
]

MODELS = {HoVLEConfig: HoVLEForConditionalGeneration, MMMambaConfig: HoVLELinearForConditionalGeneration}


def register() -> None:
    """Register configs, models and processors with transformers; importing this module has done it already."""
    for config, model in MODELS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
            auto.register(config, model, exist_ok=True)
    register_layout(MMMambaConfig.model_type)
    _families.register()
    processing.register(*MODELS)


register()
