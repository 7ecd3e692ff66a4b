"""Image and text towers of contrastive models: open_clip's models, any timm backbone, linear-attention text towers.

`build_towers` gives an `open_clip.CustomTextCLIP` (open_clip 3.3): what open_clip does with a model (`encode_image`,
`encode_text`, `get_tokenizer`, `build_zero_shot_classifier`) works on it. Its own JSON configs name timm models, so
after `import zoo` they may name the zoo's: `open_clip.add_model_config(FILE)` takes one of the user's, and
`register_configs()` adds those of `configs/contrast/open_clip`.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import open_clip
import timm
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer
from timm.layers import Mlp, to_2tuple
from torch import Tensor, nn
from zoo.kernels.gla import bidirectional_gla, gated_linear_attention
from zoo.kernels.norm import rms_norm

from zoo.errors import ZooError

__all__ = [
    'ImageTower',
    'LinearTextTower',
    'TextTower',
    'Towers',
    'WordTokenizer',
    'build_tokenizer',
    'build_towers',
    'register_configs',
]

GATE_NORMALIZER = 16  # GLA's: log gates of sigmoids start near 0, so that a state remembers whole captions


@dataclass
class ImageTower:
    """A vision tower: any model of timm's registry, which holds the zoo's too, pooled and projected.

    Args:
        name: Name in timm's registry.
        kwargs: Further arguments of timm.create_model, such as img_size or patch_size.
        pretrained: Whether to start from the backbone's published weights.
        pool: timm's global pooling; null is the backbone's own.
        proj: Projection to the shared space.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    pool: str | None = 'avg'
    proj: Literal['linear', 'mlp'] = 'linear'


@dataclass
class TextTower:
    """A text tower, trained from scratch.

    Args:
        kind: softmax is open_clip's Transformer, linear has gated linear attention in its place.
        causal: Whether a token sees only what stands before it, as in CLIP; otherwise both directions, as in SigLIP.
        width: Channels.
        heads: Attention heads.
        layers: Blocks.
        mlp_ratio: Hidden width of the MLPs over width.
        context_length: Tokens that captions are padded or cut to.
        words: The whole vocabulary, separated by spaces, for closed sets of captions; null is CLIP's BPE (49408 tokens;
            its file comes with open_clip).
    """

    kind: Literal['softmax', 'linear'] = 'softmax'
    causal: bool = True
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    context_length: int = 77
    words: str | None = None


class TimmTower(TimmModel):
    """open_clip's timm tower that hands further arguments to timm.create_model, where open_clip's takes none.

    Args:
        tower: Settings.
        embed_dim: Channels of the shared space.

    Raises:
        ZooError: No such model, or it does not take the arguments.
    """

    def __init__(self, tower: ImageTower, embed_dim: int):
        nn.Module.__init__(self)
        if not timm.is_model(tower.name.split('.')[0]) and ':' not in tower.name:
            close = difflib.get_close_matches(tower.name, timm.list_models(), n=5, cutoff=0.5)
            raise ZooError(f'no model named {tower.name!r}' + (f'; close: {", ".join(close)}' if close else ''))
        try:
            self.trunk = timm.create_model(tower.name, pretrained=tower.pretrained, **tower.kwargs)
        except TypeError as error:
            raise ZooError(f'model {tower.name} does not take these arguments: {tower.kwargs}\n{error}') from error
        except RuntimeError as error:
            raise ZooError(f'cannot build the image tower {tower.name}: {error}') from error
        self.trunk.reset_classifier(0, **({'global_pool': tower.pool} if tower.pool else {}))
        cfg, width = self.trunk.pretrained_cfg, self.trunk.num_features
        self.image_size = to_2tuple(tower.kwargs.get('img_size') or cfg['input_size'][-2:])
        self.image_mean, self.image_std = tuple(cfg['mean']), tuple(cfg['std'])
        if tower.proj == 'mlp':
            layers = OrderedDict(mlp=Mlp(width, 2 * embed_dim, embed_dim, bias=(True, False)))
        else:
            layers = OrderedDict(drop=nn.Dropout(0.0), proj=nn.Linear(width, embed_dim, bias=False))
        self.head = nn.Sequential(layers)

    def no_weight_decay(self) -> set[str]:
        return {f'trunk.{name}' for name in getattr(self.trunk, 'no_weight_decay', set)()}


class LinearTextBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is gated linear attention (arXiv 2312.06635).

    Args:
        width: channels C.
        heads: H; keys have C / 2 channels in all, values C.
        mlp_ratio: hidden width of the MLP over C.
        causal: one direction, or both.
        gate_rank: rank of the projection to the log gates.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, causal: bool, gate_rank: int = 16):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 2 * width, bias=False)
        gates = width // 2 * (1 if causal else 2)
        self.decay = nn.Sequential(nn.Linear(width, gate_rank, bias=False), nn.Linear(gate_rank, gates))
        self.gate = nn.Linear(width, width)
        self.head_norm = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C); visible: bool (B, T), False at padding, which leaves the states as they are."""
        x = x + self._mix(self.norm1(x), visible)
        return x + self.mlp(self.norm2(x))

    def _mix(self, x: Tensor, visible: Tensor) -> Tensor:
        width = x.shape[-1]
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(x).split((width // 2, width // 2, width), -1))
        hidden = ~visible[..., None, None]
        k = k.masked_fill(hidden, 0)
        decay = F.logsigmoid(self.decay(x).float()) / GATE_NORMALIZER
        decays = [t.unflatten(-1, (self.heads, -1)).masked_fill(hidden, 0) for t in decay.split(width // 2, -1)]
        if self.causal:
            o, _ = gated_linear_attention(q, k, v, *decays)
        else:
            o = bidirectional_gla(q, k, v, *decays)
        o = rms_norm(o, self.head_norm, 1e-6)
        return self.out(o.flatten(2) * F.silu(self.gate(x)))


class LinearTextTower(nn.Module):
    """A text tower whose cost is linear in the length, in the place of `open_clip.transformer.TextTransformer`.

    Captions are read at their end token, which is the one with the largest id, as in CLIP.

    Args:
        tower: Settings.
        vocab_size: Tokens.
        embed_dim: Channels of the shared space.

    Raises:
        ZooError: Widths that do not fit.
    """

    def __init__(self, tower: TextTower, vocab_size: int, embed_dim: int):
        super().__init__()
        if tower.width % (2 * tower.heads):
            raise ZooError(f'text.width {tower.width} must be a multiple of 2 x text.heads = {2 * tower.heads}')
        self.context_length, self.vocab_size, self.width = tower.context_length, vocab_size, tower.width
        self.output_dim, self.grad_checkpointing = embed_dim, False
        self.token_embedding = nn.Embedding(vocab_size, tower.width)
        self.positional_embedding = nn.Parameter(torch.empty(tower.context_length, tower.width))
        blocks = (LinearTextBlock(tower.width, tower.heads, tower.mlp_ratio, tower.causal) for _ in range(tower.layers))
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = nn.LayerNorm(tower.width)
        self.text_projection = nn.Parameter(torch.empty(tower.width, embed_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """CLIP's standard deviations; branches end smaller by the square root of their number."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.width**-0.5)
        for block in self.blocks:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    last = name in ('out', 'mlp.fc2')
                    std = self.width**-0.5 * ((2 * len(self.blocks)) ** -0.5 if last else 1)
                    nn.init.normal_(module.weight, std=std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(self, text: Tensor) -> Tensor:
        """int64 (B, T), 0 is padding, to (B, embed_dim)."""
        end = text.argmax(-1)
        visible = torch.arange(text.shape[1], device=text.device) <= end[:, None]
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, visible, use_reentrant=False)
            else:
                x = block(x, visible)
        x = x[torch.arange(len(x), device=x.device), end]
        return self.ln_final(x) @ self.text_projection

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freezes all but the last `unlocked_layers` blocks; with any of them the end of the tower stays free too."""
        free = [*self.blocks[len(self.blocks) - unlocked_layers :], self.ln_final] if unlocked_layers else []
        self.requires_grad_(False)
        for module in free:
            module.requires_grad_(True)
        self.text_projection.requires_grad_(bool(unlocked_layers))

    def no_weight_decay(self) -> set[str]:
        return {'positional_embedding'}


class WordTokenizer:
    """Whole words of a closed vocabulary, called as open_clip's tokenizers are: 0 is padding, the end token the last.

    Args:
        words: The vocabulary, separated by spaces.
        context_length: Tokens that texts are padded or cut to.
    """

    def __init__(self, words: str, context_length: int) -> None:
        known = list(dict.fromkeys(words.lower().split()))
        self.ids = {word: number for number, word in enumerate(known, 2)}
        self.sot_token_id, self.eot_token_id = 1, len(known) + 2
        self.vocab_size, self.context_length = len(known) + 3, context_length

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """int64 (N, context_length).

        Raises:
            ZooError: Words that are not in the vocabulary.
        """
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        out = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(out, texts):
            words = text.lower().replace(',', ' ').replace('.', ' ').split()
            if unknown := [word for word in words if word not in self.ids]:
                raise ZooError(
                    f'{", ".join(map(repr, unknown))} in {text!r}: not among the words that this network has learned '
                    f'({" ".join(self.ids)}). Put new words into model.text.words and train'
                )
            ids = [self.sot_token_id, *(self.ids[word] for word in words)][: length - 1]
            row[: len(ids) + 1] = torch.tensor([*ids, self.eot_token_id])
        return out


class Towers(open_clip.CustomTextCLIP):
    """open_clip's CustomTextCLIP over two towers that are already built.

    Args:
        visual: Images to (B, embed_dim).
        text: Token ids to (B, embed_dim).
        logit_scale: Natural logarithm of the initial scale of similarities.
        logit_bias: Initial bias of similarities; None for none.
    """

    def __init__(self, visual: nn.Module, text: nn.Module, logit_scale: float, logit_bias: float | None):
        nn.Module.__init__(self)
        self.output_dict, self.visual, self.text = False, visual, text
        self.context_length, self.vocab_size = text.context_length, text.vocab_size
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))


def register_configs() -> list[str]:
    """Makes open_clip know the zoo's model configs; `open_clip.create_model(NAME)` builds them.

    Returns:
        Their names.
    """
    files = sorted(config_folder().glob('*.json'))
    if not {file.stem for file in files} <= set(open_clip.list_models()):
        open_clip.add_model_config(config_folder())
    return [file.stem for file in files]


def config_folder() -> Path:
    """Where the zoo's JSON configs for open_clip are."""
    import zoo

    return next(p for p in (Path(base) / 'configs/contrast/open_clip' for base in zoo.__path__) if p.is_dir())


def open_clip_config(name: str) -> dict[str, Any]:
    """open_clip's config of a model.

    Args:
        name: A name that open_clip knows, the zoo's included, or local-dir:FOLDER or hf-hub:REPOSITORY.

    Raises:
        ZooError: No such model.
    """
    register_configs()
    try:
        config = open_clip.get_model_config(name)
    except Exception as error:  # whatever the file system or the hub client raises
        raise ZooError(f'cannot read the config of the open_clip model {name!r}: {error}') from error
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=5, cutoff=0.4)
        raise ZooError(f'open_clip has no model {name!r}' + (f'; close: {", ".join(close)}' if close else ''))
    return config


def load_open_clip(name: str, pretrained: str | None) -> nn.Module:
    """A model of open_clip as a CustomTextCLIP.

    Args:
        name: See open_clip_config.
        pretrained: Tag or file of its weights; None for random ones (schemas bring theirs).

    Raises:
        ZooError: It cannot be built or loaded, or has no two towers.
    """
    open_clip_config(name)
    try:
        model = open_clip.create_model(name, pretrained=pretrained or None, force_custom_text=True, weights_only=True)
    except Exception as error:
        tags = ', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'
        raise ZooError(f'cannot load {name} {pretrained or ""}: {error}\npublished weights: {tags}') from error
    if type(model) is not open_clip.CustomTextCLIP:
        raise ZooError(f'{name} is a {type(model).__name__}; models with an image and a text tower are needed')
    return model


def build_tokenizer(net: str | None, text: TextTower | None) -> Any:
    """What turns texts into ids: of the text tower where one is given, else of the open_clip model."""
    if text is None:
        open_clip_config(net)
        return open_clip.get_tokenizer(net)
    if text.words:
        return WordTokenizer(text.words, text.context_length)
    return open_clip.SimpleTokenizer(context_length=text.context_length)


def build_towers(
    net: str | None = None,
    pretrained: str | None = None,
    image: ImageTower | None = None,
    text: TextTower | None = None,
    embed_dim: int | None = None,
    logit_scale: float = 1 / 0.07,
    logit_bias: float | None = None,
) -> open_clip.CustomTextCLIP:
    """A contrastive model from an open_clip model, from towers, or from an open_clip model with a tower replaced.

    Args:
        net: open_clip model; None where both towers are given.
        pretrained: Tag or file of its weights; None for random ones.
        image: Vision tower, in the place of the model's.
        text: Text tower, in the place of the model's.
        embed_dim: Channels of the shared space where there is no open_clip model; 512 by default.
        logit_scale: Initial scale of similarities; of no account where an open_clip model brings its own.
        logit_bias: Initial bias of similarities, which SigLIP has; the same.

    Raises:
        ZooError: Settings that do not fit together, or what cannot be built.
    """
    if net is None:
        if image is None or text is None:
            raise ZooError('without model.net, an open_clip model, both model.image and model.text are needed')
        embed_dim = embed_dim or 512
        towers = (TimmTower(image, embed_dim), build_text(text, embed_dim))
        return Towers(*towers, float(torch.tensor(logit_scale).log()), logit_bias)
    config = open_clip_config(net)
    if embed_dim not in (None, config['embed_dim']):
        raise ZooError(f'embed_dim is {config["embed_dim"]} in {net}, not {embed_dim}')
    model = load_open_clip(net, pretrained)
    if image is not None:
        model.visual = TimmTower(image, config['embed_dim'])
    if text is not None:
        model.text = build_text(text, config['embed_dim'])
        model.context_length, model.vocab_size = model.text.context_length, model.text.vocab_size
    if logit_bias is not None and model.logit_bias is None:
        model.logit_bias = nn.Parameter(torch.tensor(float(logit_bias)))
    return model


def build_text(tower: TextTower, embed_dim: int) -> nn.Module:
    """A text tower with random weights."""
    vocab_size = build_tokenizer(None, tower).vocab_size
    if tower.kind == 'linear':
        return LinearTextTower(tower, vocab_size, embed_dim)
    return TextTransformer(
        context_length=tower.context_length,
        vocab_size=vocab_size,
        width=tower.width,
        heads=tower.heads,
        layers=tower.layers,
        mlp_ratio=tower.mlp_ratio,
        output_dim=embed_dim,
        no_causal_mask=not tower.causal,
        use_pad_mask=not tower.causal,
    )


def normalisation(visual: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of the images that a vision tower expects."""
    mean, std = (getattr(visual, name, None) for name in ('image_mean', 'image_std'))
    return tuple(mean or open_clip.OPENAI_DATASET_MEAN), tuple(std or open_clip.OPENAI_DATASET_STD)
