"""Diffusion models with linear self-attention: importing this module lets diffusers load them by name.

    import zoo.diffusion
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained('stable-diffusion-v1-5/stable-diffusion-v1-5')
    zoo.diffusion.LinFusion.attach(pipeline, 'auto')       # the published weights that fit its UNet
    zoo.diffusion.fast_layers(pipeline)                    # GroupNorm, GEGLU, attention
    with zoo.diffusion.captured_steps(pipeline):           # steps as CUDA graphs, at small sizes
        image = pipeline('a cat').images[0]
    pipeline.save_pretrained('linear')                     # DiffusionPipeline.from_pretrained loads it

diffusers finds classes by name in its own namespace, and has no other registry: there the linear classes are put, and
the pipeline that `zoo.tasks.TrainUNet` leaves of data with classes. A UNet to train from scratch is
`LinearUNet2DConditionModel(**config)`.
"""

from __future__ import annotations

from zoo.errors import ZooError

try:
    import diffusers
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
except ImportError as error:
    raise ZooError('diffusion models need the extra "diffusion": pip install "linear-zoo[diffusion]"') from error

from zoo.backbones import linfusion
from zoo.backbones.linfusion import (
    LinearDiTTransformer2DModel,
    LinearPixArtTransformer2DModel,
    LinearSelfAttention,
    LinearUNet2DConditionModel,
    LinFusion,
)
from zoo.diffusion.capture import captured_steps
from zoo.diffusion.class_to_image import ClassToImagePipeline
from zoo.diffusion.layers import fast_layers, plain_layers

__all__ = [
    'ClassToImagePipeline',
    'LinFusion',
    'LinearDiTTransformer2DModel',
    'LinearPixArtTransformer2DModel',
    'LinearSelfAttention',
    'LinearUNet2DConditionModel',
    'captured_steps',
    'fast_layers',
    'plain_layers',
    'register',
]

MODELS = (LinearUNet2DConditionModel, LinearPixArtTransformer2DModel, LinearDiTTransformer2DModel)


def register() -> None:
    """Make our classes known to diffusers; importing this module has done it already."""
    for known in (*MODELS, ClassToImagePipeline):
        setattr(diffusers, known.__name__, known)
    # a pipeline notes the module of its parts' classes, and loads from modules of this table only
    LOADABLE_CLASSES.setdefault(linfusion.__name__, {'ModelMixin': ['save_pretrained', 'from_pretrained']})


register()
