"""LinFusion: the self-attention of a diffusion model replaced by normalised linear attention, arXiv 2409.02097.

    linear = LinFusion.attach(pipeline, 'Yuanshi/LinFusion-1-5')     # or a UNet, and weights of one's own
    linear.detach()                                                  # the softmax layers are back

Every `attn1` of a UNet becomes, with P(x) = W2 LeakyReLU(LayerNorm(W1 x + b1)) + b2 and N tokens per picture,

    Q = elu(to_q(x + P_q(x))) + 1      K = elu(to_k(x + P_k(x))) + 1      V = to_v(x)            per head
    O_i = S^T Q_i / (Q_i . kbar + 1e-4)      S = mean_j K_j V_j^T      kbar = mean_j K_j      y = to_out(O)

so that a step costs N instead of N^2, and, the sums being means, a model trained at one resolution runs at another.
Everything else of the model stays as it is: cross-attention, ControlNets, IP-Adapters and LoRAs keep working.

Published weights (`Yuanshi/LinFusion-1-5`, `-2-1`, `-XL`, Apache-2.0) are read and written as they are: tensors
`{i}.to_q.weight` and so on, where i counts the `attn1` modules in the order of `named_modules()`, which in diffusers
puts the mid block last. Layout and formulas: github.com/Huage001/LinFusion at 62ef289.

`LinearUNet2DConditionModel` is a UNet that is linear by its config: what an attached UNet saves and loads as, and what
one trains from scratch. Attaching changes the class of the model to it, so that no file of linear weights is ever read
back into softmax layers.
"""

from __future__ import annotations

import inspect
import json
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

try:
    from diffusers import DiTTransformer2DModel, ModelMixin, PixArtTransformer2DModel, UNet2DConditionModel
    from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
except ImportError as error:
    raise ImportError('LinFusion needs the extra "diffusion": pip install "linear-zoo[diffusion]"') from error

from zoo.backbones._linfusion_layer import (
    Attention,
    LinearSelfAttention,
    describe,
    differences,
    middle_width,
    normalised,
    processors,
    softmax_layers,
    why_not,
)

__all__ = [
    'LinFusion',
    'LinearDiTTransformer2DModel',
    'LinearPixArtTransformer2DModel',
    'LinearSelfAttention',
    'LinearUNet2DConditionModel',
]

# Per (modules, their (width, heads)): which of the published weights are for such a UNet.
PUBLISHED = {
    (16, ((320, 8), (640, 8), (1280, 8))): 'Yuanshi/LinFusion-1-5',
    (16, ((320, 5), (640, 10), (1280, 20))): 'Yuanshi/LinFusion-2-1',
    (70, ((640, 10), (1280, 20))): 'Yuanshi/LinFusion-XL',
}


def _checked_layers(model: nn.Module) -> dict[str, Attention]:
    """The layers to replace.

    Raises:
        ValueError: if the model is of no known class or one of its layers cannot be replaced.
    """
    kind = type(model).__name__
    if type(model) not in _LINEAR and not isinstance(model, _LinearModel):
        known = ', '.join(base.__name__ for base in _LINEAR)
        joint = any(isinstance(m, Attention) and m.added_kv_proj_dim is not None for m in model.modules())
        reason = 'its attention is joint over text and image tokens' if joint else 'it is none of the known classes'
        if kind == 'OptimizedModule':
            reason = 'it is compiled: attach first, compile afterwards'
        raise ValueError(f'LinFusion cannot be attached to {kind}: {reason}; it knows {known}')
    layers = softmax_layers(model)
    if not layers:
        raise ValueError(f'LinFusion cannot be attached to this {kind}: it has no self-attention layers named attn1')
    for name, layer in layers.items():
        reason = why_not(layer)
        if reason:
            raise ValueError(f'LinFusion cannot replace {name}: {reason}')
    return layers


# --------------------------------------------------------------------------------------------------------------------
# The container


class LinFusion(ModelMixin, ConfigMixin):
    """The linear layers of one model, as the published files hold them.

    `save_pretrained` and `from_pretrained` write and read the published layout; `parameters()` is what distillation
    trains.

    Args:
        modules_list: per layer `module_name`, `dim_n`, `heads`, `projection_mid_dim`; or the older [name, dim, heads].
    """

    @register_to_config
    def __init__(self, modules_list: list):
        super().__init__()
        entries = normalised(modules_list)
        # the decorator takes what came by position for a default, which from_config leaves out
        self.register_to_config(modules_list=entries, _use_default_values=[])
        for i, entry in enumerate(entries):
            options = {key: entry[key] for key in ('bias', 'out_bias') if key in entry}
            mid_dim = middle_width(entry['dim_n'], entry['projection_mid_dim'])
            self.add_module(str(i), LinearSelfAttention(entry['dim_n'], entry['heads'], mid_dim, **options))

    @property
    def layers(self) -> dict[str, LinearSelfAttention]:
        """The linear layers by the name that they have in the model, in the order of the file."""
        return {entry['module_name']: m for entry, m in zip(self.config.modules_list, self.children())}

    @classmethod
    def attach(
        cls,
        model,
        weights: str | PathLike | Mapping[str, Tensor] | None = None,
        projection_mid_dim: int | str | None = None,
        init: str = 'teacher',
        keep_teacher: bool = True,
    ) -> LinFusion:
        """Replace the self-attention of a model, in place.

        A ControlNet has softmax attention of its own: `ControlNetModel.from_unet` takes its weights from a UNet
        before it is attached, or between `detach` and another `attach`.

        Args:
            model: a UNet2DConditionModel, PixArtTransformer2DModel, DiTTransformer2DModel or a pipeline that has one.
            weights: hub name or folder of a published or saved LinFusion, file with its tensors, or state dict;
                `auto` for the published ones that fit; None for none.
            projection_mid_dim: the width of the MLPs: None for that of the layer, an integer, `div:16` for a part of it
                (as the published SDXL has it), -1 for none. Weights have theirs: None takes it, others must agree.
            init: without weights, `teacher` for the projections of the softmax layers and MLPs that add nothing yet,
                `random` as the published training starts.
            keep_teacher: whether `detach` and `teacher` will be wanted: the softmax layers stay in memory.

        Returns:
            The container of the new layers, with their weights on the model's device and in its dtype.

        Raises:
            ValueError: if the model has no self-attention that can be replaced, or the weights are for another one;
                nothing has changed then.
        """
        target = _denoiser(model)
        layers = _checked_layers(target)
        if init not in ('teacher', 'random'):
            raise ValueError(f'init must be teacher or random, got {init!r}')
        wanted = describe(layers, projection_mid_dim)
        if weights is None:
            found = cls(wanted)
        else:
            found = cls._with_weights(layers, weights)
            if projection_mid_dim is not None:
                _same_widths(found.config.modules_list, wanted)
        found.mount(model, keep_teacher)
        if weights is None and init == 'teacher':
            for name, layer in found.layers.items():
                layer.adopt(layers[name])
        return found

    @classmethod
    def _with_weights(cls, layers: Mapping[str, Attention], weights) -> LinFusion:
        ours = describe(layers, None)
        if isinstance(weights, str) and weights == 'auto':
            signature = len(ours), tuple(sorted({(e['dim_n'], e['heads']) for e in ours}))
            if signature not in PUBLISHED:
                known = ', '.join(PUBLISHED.values())
                raise ValueError(f'no published LinFusion weights fit this model (there are {known}): name a file')
            weights = PUBLISHED[signature]
        if isinstance(weights, Mapping):
            return cls._from_tensors(ours, weights, 'the state dict')
        if Path(weights).is_file():
            return cls._from_tensors(ours, _read_tensors(Path(weights)), str(weights))
        if not Path(weights).is_dir() and not re.fullmatch(r'[\w.-]+/[\w.-]+', str(weights)):
            raise ValueError(f'weights: {weights} is no folder, no file and no name of a hub repository')
        try:
            config = cls.load_config(str(weights))
        except OSError as error:
            what = 'the folder' if Path(weights).is_dir() else 'no folder of that name here, and the hub repository'
            raise OSError(f'weights {weights}: {what} cannot be read: {str(error).strip().splitlines()[0]}') from error
        kind = config.get('_class_name')
        if kind in [linear.__name__ for pair in _LINEAR.items() for linear in pair]:
            raise ValueError(f'{weights} is a whole model: load it with {kind}.from_pretrained, not as weights for one')
        entries = normalised(config.get('modules_list') or [])
        difference = differences(ours, entries)
        if difference:
            raise ValueError(f'the weights {weights} are not for this model: {difference}')
        found, info = cls.from_pretrained(str(weights), output_loading_info=True)
        wrong = [f'{key.removesuffix("_keys")} {names[0]}' for key, names in info.items() if names]
        if wrong:
            raise ValueError(f'the weights {weights} are damaged: {", ".join(map(str, wrong))}')
        return found

    @classmethod
    def _from_tensors(cls, entries: list[dict], tensors: Mapping[str, Tensor], source: str) -> LinFusion:
        indices = {key.split('.')[0] for key in tensors}
        if indices != {str(i) for i in range(len(entries))}:
            raise ValueError(
                f'{source} is not for this model: expected tensors 0.to_q.weight to {len(entries) - 1}.to_q.weight, '
                f'found {len(indices)} layers such as {sorted(tensors)[:1]}'
            )
        for i, entry in enumerate(entries):
            first = tensors.get(f'{i}.to_q_.0.weight')
            mid_dim = -1 if first is None else int(first.shape[0])
            entry['projection_mid_dim'] = None if mid_dim == entry['dim_n'] else mid_dim
        found = cls(entries)
        try:
            found.load_state_dict(tensors)
        except RuntimeError as error:
            line = str(error).strip().splitlines()[1].strip()
            raise ValueError(f'{source} is not for this model: {line}') from error
        return found

    def mount(self, model, keep_teacher: bool = True) -> None:
        """Put these layers into a model, in place of its softmax layers; `attach` does it with new ones.

        Args:
            model: a model or pipeline.
            keep_teacher: whether the softmax layers stay in memory for `detach` and `teacher`.

        Raises:
            ValueError: if the layers are for another model or in one already.
        """
        if self.model is not None:
            raise ValueError('these layers are in a model already: detach() them, or load them a second time')
        target = _denoiser(model)
        layers = _checked_layers(target)
        difference = differences(describe(layers, None), self.config.modules_list)
        if difference:
            raise ValueError(f'these layers are not for this model: {difference}')
        for name, layer in self.layers.items():
            weight = layers[name].to_q.weight
            layer.to(weight.device, weight.dtype).train(layers[name].training)
            layer.set_processor(layers[name].processor)
        _place(target, self.layers)
        # Outside the module tree: neither the model's parameters nor its state dict are to hold anything twice.
        self.__dict__['_mounted'] = target, layers if keep_teacher else None
        target.__dict__['_linfusion'] = self
        target.__class__ = _LINEAR.get(type(target), type(target))
        _set_config(target, {**target.config, 'modules_list': self.config.modules_list})
        if model is not target:
            self.__dict__['_pipeline'] = weakref.ref(model)
            self._tell_pipeline()

    @property
    def model(self) -> nn.Module | None:
        """The model that these layers are in."""
        return self.__dict__.get('_mounted', (None, None))[0]

    @staticmethod
    def of(model) -> LinFusion | None:
        """The container of the linear layers of a model or pipeline, None if it has none."""
        return _denoiser(model).__dict__.get('_linfusion')

    def detach(self) -> None:
        """Put the softmax layers back: the model is what it was, on the device and in the dtype that it has now.

        Raises:
            ValueError: if they were not kept, or LoRAs would be lost.
        """
        model, teachers = self._teachers()
        if any(hasattr(m, 'base_layer') for m in self.modules()):
            raise ValueError('the linear layers carry LoRA layers, which would be lost: unload them first')
        _follow(teachers, self.layers, model.dtype)
        _place(model, teachers)
        model.__class__ = type(model)._base
        config = {k: v for k, v in model.config.items() if k not in _OWN_CONFIG}
        if '_class_name' in config:  # saving left it there
            config['_class_name'] = type(model).__name__
        _set_config(model, config)
        del model.__dict__['_linfusion'], self.__dict__['_mounted']
        self._tell_pipeline(model)
        self.__dict__.pop('_pipeline', None)

    def fuse(self) -> None:
        """Fold the weights of the linear layers for inference: fewer and smaller matrix products, the same results.

        `fuse_qkv_projections()` of the model does it for its other attention layers too; another processor ends it.
        """
        for layer in self.layers.values():
            layer.fuse_projections()
            layer.set_processor(processors.FusedAttnProcessor2_0())

    @contextmanager
    def teacher(self) -> Iterator[nn.Module]:
        """Inside, the model computes with its softmax layers: one model in memory is both teacher and student.

        Raises:
            ValueError: if they were not kept.
        """
        model, teachers = self._teachers()
        _follow(teachers, self.layers, model.dtype)
        _place(model, teachers)
        try:
            yield model
        finally:
            _place(model, self.layers)

    def save_pretrained(self, save_directory: str | PathLike, **kwargs) -> None:
        """Write the published layout: `config.json` and `diffusion_pytorch_model.safetensors`.

        Args:
            save_directory: folder.
            kwargs: of diffusers' ModelMixin.

        Raises:
            ValueError: if LoRA layers are among the tensors.
        """
        if any(hasattr(m, 'base_layer') for m in self.modules()):
            raise ValueError('the linear layers carry LoRA layers: unload them before save_pretrained')
        super().save_pretrained(save_directory, **kwargs)

    def _teachers(self) -> tuple[nn.Module, dict[str, Attention]]:
        if self.model is None:
            raise ValueError('these layers are in no model')
        model, teachers = self.__dict__['_mounted']
        if teachers is None:
            raise ValueError('the softmax layers were not kept (keep_teacher=False, or a model that never had them)')
        return model, teachers

    def _tell_pipeline(self, model: nn.Module | None = None) -> None:
        """Pipelines note the class of their parts when they get them, and write the note when they are saved."""
        pipeline = self.__dict__.get('_pipeline', lambda: None)()
        model = self.model if model is None else model
        for name in _PARTS:
            if pipeline is not None and getattr(pipeline, name, None) is model:
                pipeline.register_modules(**{name: model})

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != '_pipeline'}  # weak references are not copied


_PARTS = ('unet', 'transformer')  # of pipelines
_OWN_CONFIG = ('modules_list', 'projection_mid_dim')


def _denoiser(model) -> nn.Module:
    """The model itself, or that of a pipeline."""
    if not hasattr(model, 'register_modules'):
        return model
    part = next((part for name in _PARTS if (part := getattr(model, name, None)) is not None), None)
    if part is None:
        raise ValueError(f'{type(model).__name__} has neither a unet nor a transformer')
    return part


def _place(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition('.')
        setattr(model.get_submodule(parent), leaf, layer)


def _set_config(model: nn.Module, config: dict) -> None:
    """Give a model another config; entries that were set as attributes alone stay, as IP-Adapters set theirs."""
    former, model._internal_dict = model.config, FrozenDict(config)
    for key, value in vars(former).items():
        if key in config and key in former and value is not former[key]:
            setattr(model.config, key, value)


def _follow(teachers: Mapping[str, Attention], layers: Mapping[str, LinearSelfAttention], dtype: torch.dtype) -> None:
    """Bring softmax layers to where the model has gone; linear ones may have a dtype of their own."""
    for name, layer in layers.items():
        teacher = teachers[name]
        teacher.to(layer.to_q.weight.device, dtype).train(layer.training)
        if layer.processor is not teacher.processor:
            teacher.set_processor(layer.processor)
            if isinstance(layer.processor, processors.FusedAttnProcessor2_0) and not teacher.fused_projections:
                teacher.fuse_projections()


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    try:
        found = load_file(path) if path.suffix == '.safetensors' else torch.load(path, 'cpu', weights_only=True)
    except Exception as error:  # of a damaged file torch's reader raises a dozen types
        raise ValueError(f'cannot read weights from {path}: {type(error).__name__}: {error}') from error
    if not isinstance(found, Mapping):
        raise ValueError(f'{path} holds no tensors by name but a {type(found).__name__}')
    return found


def _same_widths(theirs: Iterable[Mapping], asked: Iterable[Mapping]) -> None:
    for a, b in zip(theirs, asked):
        found, wanted = (middle_width(e['dim_n'], e['projection_mid_dim']) or e['dim_n'] for e in (a, b))
        if found != wanted:
            raise ValueError(f'the weights have projection_mid_dim {found} in {a["module_name"]}, not {wanted}')


# --------------------------------------------------------------------------------------------------------------------
# Models that are linear by their config

_NOTE = ' (but the self-attention of this model is linear: import zoo.diffusion and load it with '


class _LinearModel:
    """What makes a diffusers class linear; it stands before that class among the bases."""

    _base: type
    # An entry of the config that the plain class checks. In files it carries a note, so that the plain class stops with
    # that note where it would otherwise drop the linear weights and compute something else.
    _guard: str

    def __init__(self, *args, modules_list: list | None = None, projection_mid_dim: int | str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        entries = modules_list or describe(_checked_layers(self), projection_mid_dim)
        LinFusion(entries).mount(self, keep_teacher=False)

    @staticmethod
    def _get_init_keys(input_class) -> set[str]:
        base = getattr(input_class, '_base', input_class)
        return {*inspect.signature(base.__init__).parameters, *(_OWN_CONFIG if base is not input_class else ())}

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        value = config_dict.get(cls._guard)
        if isinstance(value, str) and _NOTE in value:
            value = value.split(_NOTE)[0]
            config_dict = {**config_dict, cls._guard: None if value == 'None' else value}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load what an attached or linear model saved.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            kwargs: of diffusers' ModelMixin.

        Raises:
            ValueError: for a model with softmax layers.
        """
        places = ('cache_dir', 'force_download', 'local_files_only', 'proxies', 'revision', 'subfolder', 'token')
        hub = {key: kwargs[key] for key in places if key in kwargs}
        if 'modules_list' not in cls.load_config(pretrained_model_name_or_path, **hub):
            raise ValueError(
                f'{pretrained_model_name_or_path} holds softmax layers: load it with {cls._base.__name__} and use '
                'LinFusion.attach'
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike, **kwargs) -> None:
        """Write a folder that from_pretrained reads.

        Args:
            save_directory: folder.
            kwargs: of diffusers' ModelMixin.

        Raises:
            ValueError: while the softmax layers are in place.
        """
        linear = LinFusion.of(self)
        if any(self.get_submodule(name) is not layer for name, layer in linear.layers.items()):
            raise ValueError('the softmax layers are in place: save outside of teacher(), or detach() first')
        super().save_pretrained(save_directory, **kwargs)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config[self._guard] = f'{config[self._guard]}{_NOTE}{type(self).__name__})'
        return json.dumps(config, indent=2, sort_keys=True) + '\n'


class LinearUNet2DConditionModel(_LinearModel, UNet2DConditionModel):
    """A UNet with linear self-attention.

    Args: those of UNet2DConditionModel, and
        modules_list: the linear layers, as in LinFusion; None for all, with
        projection_mid_dim: the width of their MLPs, as in LinFusion.attach.
    """

    _base, _guard = UNet2DConditionModel, 'mid_block_type'


class LinearPixArtTransformer2DModel(_LinearModel, PixArtTransformer2DModel):
    """A PixArt transformer with linear self-attention; arguments as LinearUNet2DConditionModel."""

    _base, _guard = PixArtTransformer2DModel, 'norm_type'


class LinearDiTTransformer2DModel(_LinearModel, DiTTransformer2DModel):
    """A DiT with linear self-attention; arguments as LinearUNet2DConditionModel."""

    _base, _guard = DiTTransformer2DModel, 'norm_type'


_LINEAR = {
    UNet2DConditionModel: LinearUNet2DConditionModel,
    PixArtTransformer2DModel: LinearPixArtTransformer2DModel,
    DiTTransformer2DModel: LinearDiTTransformer2DModel,
}
