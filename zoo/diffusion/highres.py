"""Images beyond the size a model was trained at: a small one first, then twice the size again and again.

Every level but the first takes the image of the one before, enlarged, adds the noise of `strength` of the schedule and
removes it (SDEdit, arXiv 2108.01073; the LinFusion authors go to 16384 x 8192 in this way). Only the small image is
composed; larger ones get detail, so strengths fall. Stock pipelines of diffusers do all of it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from zoo.diffusion.memory import MARGIN, available_bytes, on_meta, peak_bytes, weight_bytes
from zoo.errors import ZooError

STRENGTHS = (0.4, 0.3, 0.2, 0.1)  # of the LinFusion authors' 16K example


@dataclass(frozen=True)
class Stage:
    """One level.

    Args:
        width, height: pixels.
        strength: part of the schedule that is run again; None for an image from nothing.
        steps: of the whole schedule.
    """

    width: int
    height: int
    strength: float | None
    steps: int

    @property
    def calls(self) -> int:
        """Denoising steps that are run."""
        return self.steps if self.strength is None else int(self.steps * self.strength)

    def __str__(self) -> str:
        return f'{self.width}x{self.height}'


@dataclass(frozen=True)
class Savings:
    """Ways to need less memory; the image stays the same but for `tile`.

    Args:
        chunk_guidance: the two halves of guidance one after the other.
        chunk_feed_forward: pieces of the tokens that feed-forward layers take one after the other.
        tile: side in pixels beyond which the VAE works on overlapping tiles of this side; 0 for never. It divides by
            four times the VAE's factor (by 32 with the usual 8): diffusers joins other tiles out of place.
        offload: `none`, `model` (one model at a time on the device) or `sequential` (one layer at a time).
    """

    chunk_guidance: bool = False
    chunk_feed_forward: int = 1
    tile: int = 1024
    offload: str = 'none'


def ladder(
    pipe, width: int, height: int, steps: int = 50, strengths: tuple[float, ...] = STRENGTHS, native: int | None = None
) -> list[Stage]:
    """The levels up to a size.

    Args:
        pipe: a text-to-image pipeline.
        width, height: pixels of the result.
        steps: of the schedule.
        strengths: of the levels after the first; the last one is repeated.
        native: side that the model was trained at; the pipeline's by default.

    Raises:
        ZooError: for sizes or strengths that the pipeline cannot have, or levels where it has no image-to-image
            sibling.
    """
    unit, native = size_unit(pipe), native or native_side(pipe)
    if native < 1:
        raise ZooError(f'the side of the first level must be at least 1, got {native}')
    if min(width, height) < unit or width % unit or height % unit:
        fits = 'x'.join(str(max(unit, round(n / unit) * unit)) for n in (width, height))
        raise ZooError(f'the size {width}x{height} must be in multiples of {unit}, such as {fits}')
    doublings = 0
    while min(width, height) >> (doublings + 1) >= native:
        doublings += 1
    if doublings and (not strengths or not all(0 < s <= 1 and int(steps * s) > 0 for s in strengths[:doublings])):
        raise ZooError(f'every strength needs at least one of {steps} steps and at most all, got {strengths}')
    if doublings:
        image_to_image(pipe)
    stages = []
    for level in range(doublings + 1):
        size = (max(unit, round(n / 2 ** (doublings - level) / unit) * unit) for n in (width, height))
        strength = strengths[min(level, len(strengths)) - 1] if level else None
        stages.append(Stage(*size, strength, steps))
    return stages


def size_unit(pipe) -> int:
    """Of what height and width are multiples: of 8 in all pipelines, of the pixels of a token, and of both.

    Args:
        pipe: a text-to-image pipeline.

    Raises:
        ZooError: for other pipelines.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    if getattr(pipe, 'vae', None) is None or not hasattr(pipe, 'vae_scale_factor') or 'prompt' not in known:
        raise ZooError(f'{type(pipe).__name__} does not make an image of a text with a VAE')
    patch = denoiser(pipe).config.get('patch_size')
    return math.lcm(8, pipe.vae_scale_factor * (patch if isinstance(patch, int) else 1))


def image_to_image(pipe):
    """The pipeline that refines an image with the same models.

    Args:
        pipe: a text-to-image pipeline.

    Raises:
        ZooError: if diffusers has none.
    """
    try:
        return AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        kind = type(pipe).__name__
        raise ZooError(
            f'{kind} has no image-to-image sibling: it makes images below twice the size that it was trained at'
        ) from error


def native_side(pipe) -> int:
    """Pixels of a side of the images that a pipeline was trained on.

    Args:
        pipe: a pipeline.

    Raises:
        ZooError: if it does not say.
    """
    side = denoiser(pipe).config.get('sample_size')
    if not isinstance(side, int):
        raise ZooError(f'{type(pipe).__name__} does not say what size it was trained at: use --native and --size')
    return side * pipe.vae_scale_factor


def denoiser(pipe) -> nn.Module:
    """The UNet or transformer of a pipeline.

    Args:
        pipe: a pipeline.

    Raises:
        ZooError: if it has neither.
    """
    for name in ('unet', 'transformer'):
        if getattr(pipe, name, None) is not None:
            return getattr(pipe, name)
    raise ZooError(f'{type(pipe).__name__} has neither a unet nor a transformer')


# --------------------------------------------------------------------------------------------------------------------
# Less memory


def _part(value, batch: int, rows: slice):
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {k: _part(v, batch, rows) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_part(v, batch, rows) for v in value)
    return value


@contextlib.contextmanager
def _forward(module: nn.Module, make: Callable) -> Iterator[None]:
    """The module with another `forward`, made from the one it has (an offloading hook's, possibly)."""
    own = module.__dict__.get('forward')
    module.forward = make(module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def savings(model: nn.Module, how: Savings) -> Iterator[None]:
    """A UNet or transformer that takes its batch and its feed-forward layers in pieces; results stay the same.

    Args:
        model: what is called at every step.
        how: which pieces.
    """

    def halves(plain):
        def forward(sample, *args, **kwargs):
            batch = sample.shape[0]
            if batch % 2:
                return plain(sample, *args, **kwargs)
            found = []
            for rows in (slice(batch // 2), slice(batch // 2, batch)):
                positional, named = (_part(x, batch, rows) for x in (args, kwargs))
                found.append(plain(sample[rows], *positional, **named | {'return_dict': False})[0])
            whole = torch.cat(found)
            return (whole,) if not kwargs.get('return_dict', True) else _Output(whole)

        return forward

    def pieces(plain):
        def forward(tokens, *args, **kwargs):
            parts = tokens.chunk(how.chunk_feed_forward, 1)
            out = torch.empty_like(tokens)  # not a list to concatenate: that would hold everything twice
            for x, y in zip(parts, out.chunk(how.chunk_feed_forward, 1)):
                y.copy_(plain(x, *args, **kwargs))
            return out

        return forward

    with contextlib.ExitStack() as stack:
        if how.chunk_guidance:
            stack.enter_context(_forward(model, halves))
        if how.chunk_feed_forward > 1:
            for module in model.modules():
                if isinstance(module, FeedForward):
                    stack.enter_context(_forward(module, pieces))
        yield


class _Output(tuple):
    """What models of diffusers return: a tuple of one tensor, also called sample."""

    def __new__(cls, sample: Tensor):
        return super().__new__(cls, (sample,))

    @property
    def sample(self) -> Tensor:
        return self[0]


def _blend(axis: int) -> Callable:
    """AutoencoderKL's blending of a tile's first rows or columns with its neighbour's last, all of them at once."""

    def blend(before: Tensor, tile: Tensor, extent: int) -> Tensor:
        extent = min(before.shape[axis], tile.shape[axis], extent)
        share = torch.arange(extent, device=tile.device, dtype=torch.float32) / max(extent, 1)
        share = share.to(tile.dtype).view(-1, *[1] * (3 - axis))
        ours = tile.narrow(axis, 0, extent)
        ours.copy_(before.narrow(axis, before.shape[axis] - extent, extent) * (1 - share) + ours * share)
        return tile

    return blend


def _tiling(vae: nn.Module, tile: int, largest: int) -> None:
    if not hasattr(vae, 'enable_tiling'):
        return
    if tile and largest > tile:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // _factor(vae)
    else:
        vae.disable_tiling()


def _factor(vae: nn.Module) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


# --------------------------------------------------------------------------------------------------------------------
# How much there will be needed


def _step_inputs(model: nn.Module, stage: Stage, unit: int, batch: int) -> tuple[tuple, dict] | None:
    """Meta tensors for one step, None for models whose inputs are not known here."""
    empty = lambda *shape: torch.empty(*shape, dtype=model.dtype, device='meta')  # noqa: E731
    c = model.config
    sample = empty(batch, c.in_channels, stage.height // unit, stage.width // unit)
    t = torch.zeros(batch, dtype=torch.int64, device='meta')
    if isinstance(model, UNet2DConditionModel):
        others = c.encoder_hid_dim_type or c.class_embed_type or c.addition_embed_type not in (None, 'text_time')
        if others or not isinstance(c.cross_attention_dim, int):
            return None
        named = {}
        if c.addition_embed_type:
            pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
            named['added_cond_kwargs'] = {'text_embeds': empty(batch, pooled), 'time_ids': empty(batch, 6)}
        return (sample, t, empty(batch, 77, c.cross_attention_dim)), named
    if isinstance(model, PixArtTransformer2DModel):
        sizes = {'resolution': empty(batch, 2), 'aspect_ratio': empty(batch, 1)}
        return (sample, empty(batch, 300, c.caption_channels), t), {'added_cond_kwargs': sizes}
    return None


def estimate(pipe, stages: list[Stage], how: Savings, guided: bool = True, images: int = 1) -> dict[str, int] | None:
    """Bytes that the largest moment of a ladder needs on the device: shapes are followed through the models' code.

    Args:
        pipe: a text-to-image pipeline.
        stages: the levels.
        how: ways to need less.
        guided: whether guidance doubles the batch.
        images: at a time.

    Returns:
        `weights`, `step` (activations of the denoiser), `vae` (activations of encoding and decoding) and `total`, which
        carries a margin; None for models whose inputs are not known here.
    """
    model, vae, last = denoiser(pipe), pipe.vae, stages[-1]
    batch = images * (2 if guided and not how.chunk_guidance else 1)
    given = _step_inputs(model, last, pipe.vae_scale_factor, batch)
    if given is None:
        return None
    twin = on_meta(model, model.dtype)
    with savings(twin, how):
        step = peak_bytes(lambda: twin(*given[0], **given[1]))
    step += 4 * images * 2 * given[0][0][0].numel() * model.dtype.itemsize  # latents, noise, both predictions
    decoder = on_meta(vae, torch.float32 if getattr(vae.config, 'force_upcast', False) else vae.dtype)
    sides = last.height, last.width
    tiled = bool(how.tile) and max(sides) > how.tile
    height, width = (min(n, how.tile) if tiled else n for n in sides)
    factor, channels = _factor(vae), vae.config.latent_channels
    shape = 1 if tiled else images, channels, height // factor, width // factor
    z = torch.empty(shape, dtype=decoder.dtype, device='meta')
    pixels = images * 3 * sides[0] * sides[1] * decoder.dtype.itemsize
    # tiles overlap by a quarter and are kept with the finished rows, then joined
    images_held = 4 * pixels if tiled else 2 * pixels
    decode = peak_bytes(lambda: decoder.decode(z)) + images_held
    parts = {name: weight_bytes(m) for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    weights = {'none': sum(parts.values()), 'model': max(parts.values()), 'sequential': 0}[how.offload]
    return {'weights': weights, 'step': step, 'vae': decode, 'total': int((weights + max(step, decode)) * MARGIN)}


def check_memory(
    pipe, stages: list[Stage], how: Savings, device: str, guided: bool = True, images: int = 1, limit: int | None = None
) -> dict[str, int] | None:
    """The estimate, compared with what the device has.

    Args:
        pipe: a text-to-image pipeline.
        stages: the levels.
        how: ways to need less.
        device: where it will run.
        guided: whether guidance doubles the batch.
        images: at a time.
        limit: bytes to stay below; what the device has by default.

    Raises:
        ZooError: if it will not fit, with the largest size of this shape that does and what would help.
    """
    found = estimate(pipe, stages, how, guided, images)
    have = limit
    if have is None:
        have = available_bytes(device)
        kind = torch.device(device).type
        if have is not None:  # weights that are there already are not needed again
            parts = (m for m in pipe.components.values() if isinstance(m, nn.Module))
            have += sum(weight_bytes(m) for m in parts if next(m.parameters()).device.type == kind)
    if found is None or have is None or found['total'] <= have:
        return found
    last, largest = stages[-1], None
    unit = size_unit(pipe)
    fixed = found['weights'] * MARGIN
    scale = max(0.0, (have - fixed) / (found['total'] - fixed)) ** 0.5  # everything else grows with the pixels
    for shrink in (1.0, 0.97, 0.9, 0.75, 0.5, 0.25):
        width, height = (int(n * scale * shrink) // unit * unit for n in (last.width, last.height))
        if min(width, height) < unit:
            break
        smaller = [*stages[:-1], Stage(width, height, last.strength, last.steps)]
        if estimate(pipe, smaller, how, guided, images)['total'] <= have:
            largest = f'{width}x{height}'
            break
    helps = [
        *(['--chunk-guidance'] if guided and not how.chunk_guidance else []),
        *(['--chunk-feed-forward 8'] if how.chunk_feed_forward == 1 else []),
        *(['--tile 512'] if not how.tile or how.tile > 512 else []),
        *(['--offload model'] if how.offload == 'none' and torch.device(device).type != 'cpu' else []),
    ]
    says = f'{last} needs about {found["total"] / 1e9:.1f} GB on {device}, which has {have / 1e9:.1f} GB; '
    says += f'the largest size of this shape that fits is {largest}' if largest else 'no size of this shape fits'
    raise ZooError(says + (f'. What needs less: {", ".join(helps)}' if helps else ''))


# --------------------------------------------------------------------------------------------------------------------
# The ladder


@contextlib.contextmanager
def _watched(vae: nn.Module, spent: dict[str, float], device: str, before: Callable | None) -> Iterator[None]:
    """Adds up the seconds of encoding and decoding, and blends tiles in few launches; `before` is called first."""

    def timed(name, plain):
        def call(*args, **kwargs):
            if before is not None:
                before()  # captured steps hold the memory of a step
            _sync(device)
            start = time.perf_counter()
            found = plain(*args, **kwargs)
            _sync(device)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            return found

        return call

    changed = {name: timed(name, getattr(vae, name)) for name in ('encode', 'decode')}
    if type(vae) is AutoencoderKL:
        changed |= {'blend_v': _blend(2), 'blend_h': _blend(3)}
    for name, call in changed.items():
        setattr(vae, name, call)
    try:
        yield
    finally:
        for name in changed:
            delattr(vae, name)


def _sync(device: str) -> None:
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()


def enlarge(image: Tensor, width: int, height: int) -> Tensor:
    """Bicubic, clamped.

    Args:
        image: (B, 3, H, W) in [0, 1].
        width, height: pixels of the result.
    """
    work = image if image.is_cuda else image.float()
    return F.interpolate(work, (height, width), mode='bicubic', align_corners=False).clamp(0, 1).to(image.dtype)


def generate(
    pipe,
    stages: list[Stage],
    how: Savings | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
    guidance: float = 7.5,
    capture: bool = False,
    **inputs,
) -> tuple[Tensor, list[dict]]:
    """Run a ladder.

    Args:
        pipe: a text-to-image pipeline, on its device or with offloading enabled.
        stages: the levels, as `ladder` gives them.
        how: ways to need less memory.
        seed: of the noise.
        say: told when a level starts.
        guidance: scale of classifier-free guidance.
        capture: whether steps are replayed as CUDA graphs, see `zoo.diffusion.captured_steps`.
        inputs: of the pipeline: `prompt`, `negative_prompt`, or embeddings of them.

    Returns:
        Images (B, 3, H, W) in [0, 1], and per level its size, steps and seconds: `seconds` of all, `encode`, `decode`.

    Raises:
        ZooError: if the pipeline has no image-to-image sibling and the ladder more than one level.
    """
    from zoo.diffusion.capture import captured_steps

    how, device = how or Savings(), str(pipe._execution_device)
    rng = torch.Generator('cpu').manual_seed(seed)
    again = None
    if 'use_resolution_binning' in inspect.signature(type(pipe).__call__).parameters:
        inputs.setdefault('use_resolution_binning', False)  # it would make an image of another size and resize it
    if len(stages) > 1:
        again = image_to_image(pipe)
        again._progress_bar_config = dict(getattr(pipe, '_progress_bar_config', {}))
    image, report = None, []
    for number, stage in enumerate(stages, 1):
        say(f'{number}/{len(stages)}: {stage}, {stage.calls} steps')
        spent: dict[str, float] = {}
        _tiling(pipe.vae, how.tile, max(stage.width, stage.height))
        _sync(device)
        start = time.perf_counter()
        shared = inputs | dict(num_inference_steps=stage.steps, guidance_scale=guidance)
        shared |= dict(generator=rng, output_type='pt')
        replays = captured_steps(pipe) if capture else contextlib.nullcontext()
        with replays as steps, savings(denoiser(pipe), how), _watched(pipe.vae, spent, device, steps and steps.forget):
            if stage.strength is None:
                image = pipe(width=stage.width, height=stage.height, **shared).images
            else:
                image = again(image=enlarge(image, stage.width, stage.height), strength=stage.strength, **shared).images
        _sync(device)
        timed = {'seconds': time.perf_counter() - start, **spent}
        report.append({'width': stage.width, 'height': stage.height, 'steps': stage.calls}
                      | {k: round(v, 3) for k, v in timed.items()})  # fmt: skip
    return image, report
