"""What training and distilling a UNet share: the pipeline around it, noisy inputs with their targets, conditions."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.diffusion.class_to_image import ClassToImagePipeline
from zoo.errors import ZooError

PIPELINE = 'model'  # the pipeline's folder in the folder of a run that trains a UNet


class Denoising(NamedTuple):
    """A batch as a UNet meets it.

    Args:
        noisy: fp32 (B, C, H, W).
        timesteps: int64 (B,).
        target: fp32 (B, C, H, W): noise, velocity or clean image, as the scheduler's prediction_type says.
        condition: Further arguments of the UNet.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    condition: dict[str, Any]

    def run(self, unet: nn.Module, dtype: torch.dtype) -> Tensor:
        """The UNet's output, fp32.

        Args:
            unet: The UNet, compiled or not.
            dtype: Of its inputs.
        """
        return unet(self.noisy.to(dtype), self.timesteps, **self.condition).sample.float()


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers pipeline with a UNet, frozen, on the CPU.

    Args:
        folder: Folder or hub name; weights are read from safetensors only.
        dtype: Of all weights.

    Raises:
        ZooError: It cannot be loaded, or has no UNet2DConditionModel.
    """
    import diffusers
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from packaging.version import Version

    index = Path(folder) / 'model_index.json'
    ours = index.is_file() and json.loads(index.read_text()).get('_class_name') == ClassToImagePipeline.__name__
    loader = ClassToImagePipeline if ours else DiffusionPipeline
    # of no use here, and most mirrors have left it out
    parts = {} if ours else {'safety_checker': None, 'requires_safety_checker': False}
    parts['dtype' if Version(diffusers.__version__) >= Version('0.42') else 'torch_dtype'] = dtype
    try:
        with quiet_diffusers():
            pipeline = loader.from_pretrained(str(folder), use_safetensors=True, **parts)
    except Exception as error:  # diffusers and the hub raise a dozen types; the user needs the name and the cause
        raise ZooError(f'cannot load a diffusers pipeline from {folder}: {str(error).splitlines()[0]}') from error
    unet = getattr(pipeline, 'unet', None)
    if not isinstance(unet, UNet2DConditionModel):
        raise ZooError(f'{folder} has no UNet2DConditionModel (model_index.json names {type(pipeline).__name__})')
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def quiet_diffusers() -> Any:
    """Keeps progress bars and warnings about unused parts of a pipeline off the console."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    levels = [(logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in (ours, theirs)]
    for logging, _, _ in levels:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, level, bar in levels:
            logging.set_verbosity(level)
            if bar:
                logging.enable_progress_bar()


class Frame:
    """A pipeline as training uses it: batches to latents and conditions, noise and targets.

    Batches hold `image` (B, C, H, W) in -1..1, or `latent_mean` and `latent_std` of images that were encoded before;
    `target` (class numbers), or `caption` (texts), or `prompt_embeds` (and `pooled_embeds`) encoded before; and
    `sizes` (B, 6) where the UNet is conditioned on them: original height and width, top and left of the crop, height
    and width of what was cut out, in pixels.

    Args:
        pipeline: A pipeline of load_pipeline; its UNet is not used here.
    """

    def __init__(self, pipeline: Any) -> None:
        from diffusers import DDPMScheduler

        self.pipeline = pipeline
        self.unet_config = pipeline.unet.config
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction = self.scheduler.config.prediction_type
        self.vae = getattr(pipeline, 'vae', None)
        self.classes = pipeline.classes if isinstance(pipeline, ClassToImagePipeline) else None
        self.needs_sizes = self.unet_config.addition_embed_type == 'text_time'
        if self.classes is None and not hasattr(pipeline, 'encode_prompt'):
            raise ZooError(f'{type(pipeline).__name__} has neither classes nor encode_prompt: nothing to condition on')
        self.null: dict[str, Tensor] | None = None
        self.device = torch.device('cpu')

    # where things are

    @property
    def encoders(self) -> list[nn.Module]:
        """Text encoders of the pipeline."""
        found = (getattr(self.pipeline, name, None) for name in ('text_encoder', 'text_encoder_2'))
        return [encoder for encoder in found if encoder is not None]

    def to(self, device: torch.device, encode: bool = True) -> None:
        """Moves what encodes; a VAE that overflows in half precision goes to fp32.

        Args:
            device: Where to.
            encode: Whether images and texts will come as such, rather than encoded.
        """
        self.device = device
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)
        for part in [*self.encoders, self.vae] if encode else []:
            if part is not None:
                part.to(device)
        if encode and self.vae is not None and getattr(self.vae.config, 'force_upcast', False):
            self.vae.float()

    def check(self, data: Any) -> None:
        """Raises ZooError where the data is not what this pipeline is trained on."""
        view, encoded = getattr(data, 'view', None), getattr(data, 'encoded', False)
        if self.classes is not None:
            names = getattr(data, 'class_names', None)
            if not names or view is None:
                raise ZooError(f'a pipeline with classes needs images with classes, not {type(data).__name__}')
            if len(names) != self.classes:
                raise ZooError(f'the data has {len(names)} classes, the pipeline {self.classes}')
            if any(value != 0.5 for value in (*view.mean, *view.std)):
                raise ZooError(
                    'a UNet takes pixels in -1..1: set view.mean and view.std to 0.5 for each channel, such as '
                    '--data.view.mean="[0.5]" --data.view.std="[0.5]"'
                )
            wanted = self.unet_config.in_channels
            if view.channels != wanted:
                raise ZooError(f'the UNet takes {wanted} channels: set --data.view.channels {wanted}')
        elif not encoded and not getattr(data, 'captioned', False):
            name = type(self.pipeline).__name__
            raise ZooError(f'{name} needs captions: take zoo.data.CaptionedImages or zoo.data.CachedLatents')
        if encoded:
            data.check(self)

    def encoding(self) -> dict[str, Any]:
        """What a cache of latents and embeddings has to agree in."""
        config = self.unet_config
        return {
            'latent_channels': config.in_channels,
            'embed_width': config.cross_attention_dim if config.encoder_hid_dim is None else config.encoder_hid_dim,
            'scaling_factor': self.vae.config.scaling_factor,
        }

    # inputs

    def draw(self, batch: dict[str, Any], dropout: float = 0.0, generator: torch.Generator | None = None) -> Denoising:
        """Noise at random timesteps for a batch.

        Args:
            batch: See the class.
            dropout: Share of samples that lose their class or caption.
            generator: Of all random numbers, on the frame's device; the default one where not given.
        """
        clean = self.latents(batch, generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        steps = self.scheduler.config.num_train_timesteps
        t = torch.randint(steps, (len(clean),), generator=generator, device=clean.device)
        noisy = self.scheduler.add_noise(clean, noise, t)
        target = {'epsilon': noise, 'sample': clean}.get(self.prediction)
        if target is None:
            target = self.scheduler.get_velocity(clean, noise, t)
        lost = torch.rand(len(clean), generator=generator, device=clean.device) < dropout if dropout else None
        return Denoising(noisy, t, target, self.condition(batch, lost))

    @torch.no_grad()
    def latents(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> Tensor:
        """Clean latents, or pixels where there is no VAE, fp32 (B, C, H, W)."""
        if 'latent_mean' in batch:
            mean, std = batch['latent_mean'].float(), batch['latent_std'].float()
        elif self.vae is None:
            return batch['image'].float()
        else:
            mean, std = self.encode_images(batch['image'])
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        shift = getattr(self.vae.config, 'shift_factor', None) or 0.0
        return (mean + std * noise - shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, fp32, before they are scaled."""
        with torch.autocast(images.device.type, enabled=False):
            found = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return found.mean.float(), found.std.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about -1..1 of latents, outside of any autocast."""
        shift = getattr(self.vae.config, 'shift_factor', None) or 0.0
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode((latents.float() / self.vae.config.scaling_factor + shift).to(self.vae.dtype)).sample

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """prompt_embeds (B, T, D), and pooled_embeds (B, P) where the pipeline has them."""
        made = self.pipeline.encode_prompt(
            prompt=texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        found = {'prompt_embeds': made[0]}
        return {**found, 'pooled_embeds': made[2]} if len(made) == 4 else found

    @torch.no_grad()
    def encode_nothing(self) -> dict[str, Tensor]:
        """What guidance is against, as the pipeline itself has it: an empty text or zeros, for one sample."""
        made = self.pipeline.encode_prompt(
            prompt=[''], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        found = {'prompt_embeds': made[1]}
        return {**found, 'pooled_embeds': made[3]} if len(made) == 4 else found

    def condition(self, batch: dict[str, Any], lost: Tensor | None = None) -> dict[str, Any]:
        """Arguments of the UNet besides the noisy input and its timesteps.

        Args:
            batch: See the class.
            lost: bool (B,): the samples that lose their class or caption; None for none.
        """
        if self.classes is not None:
            labels = batch['target'] if lost is None else batch['target'].masked_fill(lost, self.classes)
            return {'encoder_hidden_states': self.pipeline.encode(labels)}
        if 'prompt_embeds' in batch:
            found = {key: batch[key] for key in ('prompt_embeds', 'pooled_embeds') if key in batch}
        else:
            found = self.encode_texts(batch['caption'])
        if lost is not None:
            self.null = self.null or self.encode_nothing()
            for key, value in found.items():
                where = lost.view(-1, *[1] * (value.ndim - 1))
                found[key] = torch.where(where, self.null[key].to(value), value)
        dtype = self.pipeline.unet.dtype
        kwargs: dict[str, Any] = {'encoder_hidden_states': found['prompt_embeds'].to(dtype)}
        if self.needs_sizes:
            added = {'text_embeds': found['pooled_embeds'].to(dtype), 'time_ids': batch['sizes'].to(dtype)}
            kwargs['added_cond_kwargs'] = added
        return kwargs

    def noise_error(self, found: Tensor, step: Denoising) -> Tensor:
        """Mean squared error of the noise that an output stands for, (B,), whatever the prediction type."""
        alpha = self.scheduler.alphas_cumprod.to(found.device)[step.timesteps]
        # with x = a x0 + s e: e is found as it is, from v (e = a v + s x) or from x0 (e = (x - a x0) / s)
        scale = {'epsilon': torch.ones_like(alpha), 'v_prediction': alpha, 'sample': alpha / (1 - alpha)}
        return scale[self.prediction] * (found - step.target).square().flatten(1).mean(1)
