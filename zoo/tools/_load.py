"""Build a model for a tool: published weights, a checkpoint file or random weights, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models import PretrainedCfg, load_state_dict
from torch import nn

from zoo.backbones._features import unwrap_checkpoint
from zoo.errors import ZooError
from zoo.registry import check_name
from zoo.tools._cost import meta_model

Weights = dict[str, torch.Tensor]


def build(
    name: str,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    img_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Build a model in eval mode.

    Args:
        name: registered name, or one with timm's `hf-hub:` / `local-dir:` prefix.
        checkpoint: published file, bare state dict, safetensors or training checkpoint; its number of classes decides
            that of the model.
        pretrained: load the weights that the name stands for; ignored when `checkpoint` is given.
        img_size: height and width, given to models whose input size is fixed at construction.

    Raises:
        ZooError: for an unknown name, missing or unreadable weights, or weights of another model.
    """
    kwargs = _size_kwargs(check_name(name), img_size)
    if checkpoint is not None and Path(checkpoint).suffix == '.ckpt':
        return _from_run(name, Path(checkpoint))
    if checkpoint is not None:
        return _from_checkpoint(name, Path(checkpoint), kwargs)
    if not pretrained:
        return timm.create_model(name, **kwargs).eval()
    if timm.is_model(name) and not timm.models.is_model_pretrained(name):
        raise ZooError(f'no weights are published for {name}: pass --checkpoint FILE')
    try:
        return timm.create_model(name, pretrained=True, **kwargs).eval()
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ZooError(_how_to_get(name, error)) from error


def _from_run(name: str, path: Path) -> nn.Module:
    """The network of a training run, which its checkpoint describes, with the transform it was trained for."""
    from zoo.checkpoints import load_net  # imports Lightning

    model, described = load_net(path)
    if described['net'] != name.split('.')[0]:
        raise ZooError(f'{path} holds {described["net"]}: give that name instead of {name}')
    view = described.get('view')
    if view:
        model.pretrained_cfg['input_size'] = (view['channels'], view['size'], view['size'])
        model.pretrained_cfg.update({k: view[k] for k in ('interpolation', 'crop_pct', 'mean', 'std')})
    return model


def _size_kwargs(name: str, img_size: tuple[int, int] | None) -> dict:
    if img_size is None or name.startswith(('hf-hub:', 'local-dir:')):
        return {}
    fixed = timm.models.get_pretrained_cfg_value(name, 'fixed_input_size')
    return {'img_size': img_size} if fixed else {}


def _how_to_get(name: str, error: Exception) -> str:
    cfg = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None or not cfg.hf_hub_id:
        return f'the weights of {name} could not be loaded: {error}'
    repo = cfg.hf_hub_id.split('@')[0]
    file = cfg.hf_hub_filename or ''
    return (
        f'the weights of {name} are not in the Hugging Face cache and could not be downloaded '
        f'({type(error).__name__}). One of these helps:\n'
        f'  on a machine with a network: hf download {repo} {file}\n'
        f'  with a cache copied from there: HF_HOME=/path/to/huggingface (the folder that holds hub/)\n'
        f'  with the file itself: --checkpoint /path/to/{file or "weights"}'
    )


def read_weights(path: Path) -> Weights:
    """Read tensors from a file, out of whichever wrapper they are in; the EMA copy where there is one.

    Args:
        path: `.pth`, `.pt`, `.ckpt`, `.bin` or `.safetensors` file.

    Raises:
        ZooError: if the file is missing, truncated or holds no tensors.
    """
    if not path.is_file():
        raise ZooError(f'no such checkpoint file: {path}')
    try:
        state = unwrap_checkpoint(load_state_dict(str(path)))
    except Exception as error:  # torch, zipfile, pickle and safetensors each have their own
        first = str(error).strip().splitlines()[0] if str(error).strip() else ''
        raise ZooError(
            f'cannot read {path} as a checkpoint (truncated, or another format?): {type(error).__name__}: {first}'
        ) from error
    weights = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not weights:
        raise ZooError(f'{path} holds no tensors (keys: {", ".join(map(str, list(state)[:5]))})')
    return weights


def _unprefixed(weights: Weights, expected: set[str]) -> Weights:
    """Drop the attribute name under which a training module keeps its network."""
    if expected & weights.keys():
        return weights
    anchor = next(iter(sorted(expected)))
    for key in weights:
        if key.endswith('.' + anchor):
            prefix = key[: -len(anchor)]
            return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    return weights


def _from_checkpoint(name: str, path: Path, kwargs: dict) -> nn.Module:
    outline = meta_model(name, **kwargs)
    weights = _unprefixed(read_weights(path), set(outline.state_dict()))
    cfg = PretrainedCfg(**outline.pretrained_cfg)
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else None
    head = weights.get(f'{classifier}.weight')
    classes = cfg.num_classes if head is None else head.shape[0]
    try:
        model = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={'state_dict': weights, 'num_classes': classes},
            num_classes=classes,
            **kwargs,
        )
    except RuntimeError as error:
        raise ZooError(f'{path} does not fit {name}: {_short(str(error))}') from error
    except KeyError as error:  # a checkpoint filter met a name it does not know
        raise ZooError(f'{path} does not fit {name}: {_differences(weights, outline.state_dict())}') from error
    model.pretrained_cfg.pop('state_dict', None)
    return model.eval()


def _differences(found: Weights, wanted: Weights) -> str:
    """A few of the key names that two state dicts do not share."""
    parts = []
    for word, keys in (('missing', wanted.keys() - found.keys()), ('unexpected', found.keys() - wanted.keys())):
        if keys:
            parts.append(f'{len(keys)} {word} ({", ".join(sorted(keys)[:3])}, ...)')
    return '; '.join(parts) or 'its tensors have other shapes'


def _short(message: str, lines: int = 12) -> str:
    """The first lines of a long message."""
    kept = message.strip().splitlines()
    return '\n'.join(kept[:lines] + ([f'... {len(kept) - lines} more'] if len(kept) > lines else []))


def image_size(values: list[int] | None) -> tuple[int, int] | None:
    """Read a command-line size of one number (square) or two (height width).

    Args:
        values: what followed `--img-size`.
    """
    if not values:
        return None
    if len(values) > 2 or min(values) < 1:
        raise ZooError('--img-size takes one positive number (square) or two (height width)')
    return values[0], values[-1]
