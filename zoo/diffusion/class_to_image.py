"""Class-conditional image generation in pixel space with a stock diffusers UNet.

The classes reach the UNet as text would, through cross-attention. The table of class embeddings is the UNet's own
`encoder_hid_proj` (`encoder_hid_dim_type: text_proj`), a linear layer that is fed one-hot tokens: a folder written here
holds nothing but a UNet and a scheduler that plain diffusers loads. The last class stands for no class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError

try:
    from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
except ImportError as error:
    raise ZooError('diffusion models need the extra "diffusion": pip install "linear-zoo[diffusion]"') from error

from zoo.backbones.linfusion import LinearUNet2DConditionModel

__all__ = ['ClassToImagePipeline', 'build_class_unet', 'build_unet', 'class_tokens']


def build_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """A new UNet.

    Args:
        config: Arguments of UNet2DConditionModel; with projection_mid_dim or modules_list its self-attention is linear.

    Raises:
        ZooError: It cannot be built.
    """
    linear = {'projection_mid_dim', 'modules_list'} & set(config)
    kind = LinearUNet2DConditionModel if linear else UNet2DConditionModel
    try:
        return kind(**config)
    except (TypeError, ValueError) as error:
        raise ZooError(f'cannot build a {kind.__name__} from this config: {error}') from error


def build_class_unet(config: dict[str, Any], classes: int, tokens: int = 4) -> UNet2DConditionModel:
    """A new UNet for `classes` classes.

    Args:
        config: See build_unet; without what is about the conditioning but cross_attention_dim.
        classes: Number of classes; one more, the last, stands for none.
        tokens: Tokens that a class becomes in cross-attention.

    Raises:
        ZooError: The UNet cannot be built from `config`.
    """
    if {'encoder_hid_dim', 'encoder_hid_dim_type'} & set(config):
        raise ZooError('leave encoder_hid_dim and encoder_hid_dim_type out of the config of a UNet with classes')
    unet = build_unet(
        {**config, 'encoder_hid_dim_type': 'text_proj', 'encoder_hid_dim': (classes + 1) * max(tokens, 1)}
    )
    # a table of embeddings: Linear's own initialisation is made for inputs that are not one-hot, and far too small
    nn.init.normal_(unet.encoder_hid_proj.weight)
    return unet


def class_tokens(labels: Tensor, classes: int, width: int) -> Tensor:
    """One-hot tokens, fp32 (B, tokens, width), of class numbers (B,).

    Args:
        labels: int64 (B,), 0..classes; `classes` stands for none.
        classes: Number of classes.
        width: The UNet's encoder_hid_dim.
    """
    tokens = width // (classes + 1)
    places = labels[:, None] * tokens + torch.arange(tokens, device=labels.device)
    return F.one_hot(places, width).float()


class ClassToImagePipeline(DiffusionPipeline):
    """Draws images of given classes with classifier-free guidance.

    Args:
        unet: Made by build_class_unet, with softmax or linear self-attention.
        scheduler: Any scheduler of diffusers; sampling uses its settings with DDIM's steps.
        id2label: Class number (as JSON has it, a string) to name, as diffusers' DiTPipeline has it.
    """

    model_cpu_offload_seq = 'unet'

    def __init__(self, unet: UNet2DConditionModel, scheduler: Any, id2label: dict[str, str] | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label={str(k): v for k, v in (id2label or {}).items()})  # as JSON gives it back

    @property
    def class_names(self) -> list[str]:
        return list(self.config.id2label.values())

    @property
    def classes(self) -> int:
        return len(self.config.id2label)

    def encode(self, labels: Tensor) -> Tensor:
        """What the UNet takes as encoder_hidden_states; the label `classes` stands for none."""
        tokens = class_tokens(labels, self.classes, self.unet.config.encoder_hid_dim)
        return tokens.to(self.unet.dtype)

    @torch.no_grad()
    def __call__(
        self,
        labels: list[int] | Tensor,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = 'pil',
        unet: nn.Module | None = None,
    ) -> ImagePipelineOutput:
        """Draws one image for each label.

        Args:
            labels: Class numbers (B,).
            num_inference_steps: DDIM steps.
            guidance_scale: 1 is no guidance.
            generator: Of the starting noise; a CPU generator gives the same noise on every device.
            height: In pixels; the UNet's sample_size by default, other sizes need no training.
            width: In pixels.
            output_type: pil, np (B, H, W, C) in 0..1, or pt (B, C, H, W) in -1..1.
            unet: Denoises in place of the pipeline's own.

        Raises:
            ZooError: for a label that is no class, or a size that the UNet cannot halve often enough.
        """
        net = self.unet if unet is None else unet
        labels = torch.as_tensor(labels, dtype=torch.long)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ZooError(f'labels must be within 0..{self.classes - 1}')
        size = self.unet.config.sample_size
        height, width = height or size, width or size
        factor = 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise ZooError(f'height {height} and width {width} must be multiples of {factor} for this UNet')
        device, dtype = self.unet.device, self.unet.dtype
        shape = (len(labels), self.unet.config.in_channels, height, width)
        where = generator.device if generator is not None else device
        x = torch.randn(shape, generator=generator, device=where, dtype=torch.float32).to(device)
        labels = labels.to(device)
        guided = guidance_scale != 1
        both = torch.cat([torch.full_like(labels, self.classes), labels]) if guided else labels
        condition = self.encode(both)
        scheduler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing='trailing')
        scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(scheduler.timesteps):
            noisy = torch.cat([x, x]) if guided else x
            out = net(noisy.to(dtype), t, encoder_hidden_states=condition).sample.float()
            if guided:
                none, some = out.chunk(2)
                out = none + guidance_scale * (some - none)
            x = scheduler.step(out, t, x).prev_sample
        x = x.clamp(-1, 1)
        if output_type == 'pt':
            return ImagePipelineOutput(images=x)
        pixels = (x / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
        if output_type == 'np':
            return ImagePipelineOutput(images=pixels)
        return ImagePipelineOutput(images=self.numpy_to_pil(pixels))
