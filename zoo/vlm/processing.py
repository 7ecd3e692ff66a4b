"""Images and text of HoVLE and mmMamba: dynamic tiling with a thumbnail, image tokens, the chat template.

Tiling, as in InternVL 1.5 and later (arXiv 2404.16821, section 3.3): of all grids with at most 12 tiles take the one
whose aspect is closest to the image's; on a tie a larger one only if the image has more than half its area; resize,
cut in reading order, append the whole image as a thumbnail when there are several tiles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, GotOcr2ImageProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, load_image
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessorKwargs
from transformers.utils import cached_file

from zoo.data.sampling import UNREADABLE
from zoo.errors import ZooError
from zoo.vlm.tokenizer import InternLM2Tokenizer

IMAGE = '<image>'  # what stands for one image in a prompt
CONTEXT = '<IMG_CONTEXT>'  # the token of (a part of) an image; once in a prompt, it stands for an image too
_PLACEHOLDER = re.compile(f'{IMAGE}|{CONTEXT}')
SYSTEM_MESSAGE = (
    '你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。'
)
_CONTENT = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for item in content -%}
{%- if item.type == 'text' -%}{{ item.text }}{%- else -%}{{ '<IMG_CONTEXT>\\n' }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""
# Chat templates by the name that config.json has under `template`. `generation` marks what an assistant says, for
# `apply_chat_template(return_assistant_tokens_mask=True)`.
CHAT_TEMPLATES = {
    'internlm2-chat': _CONTENT
    + """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nSYSTEM_MESSAGE<|im_end|>' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ render(message.content) + '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}{{ render(message.content) + '<|im_end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
""".replace('SYSTEM_MESSAGE', SYSTEM_MESSAGE)
}


def _download(url: str) -> Image.Image:
    try:
        return load_image(url)
    except Exception as error:  # the client behind it has a dozen types of its own
        raise OSError(f'{type(error).__name__}: {error}') from error


def read_image(source: Any) -> Image.Image:
    """An image in RGB, decoded completely, upright as its EXIF data say.

    Args:
        source: Path, URL (`data:` too), bytes, or a Pillow image.

    Raises:
        ZooError: if it cannot be read.
    """
    if not isinstance(source, (str, Path, bytes, bytearray, Image.Image)) and not hasattr(source, 'read'):
        raise ZooError(f'cannot read image: a path, URL, bytes or Pillow image is wanted, not {type(source).__name__}')
    try:
        if isinstance(source, str) and source.startswith(('http://', 'https://', 'data:image/')):
            return _download(source)
        opened = BytesIO(source) if isinstance(source, (bytes, bytearray)) else source
        image = opened if isinstance(opened, Image.Image) else Image.open(opened)
        return ImageOps.exif_transpose(image).convert('RGB')
    except UNREADABLE as error:
        shown = str(source)[:200] if isinstance(source, (str, Path)) else f'({type(source).__name__})'
        raise ZooError(f'cannot read image {shown}: {str(error)[:200]}') from error


class HoVLEImageProcessorKwargs(GotOcr2ImageProcessorKwargs, total=False):
    """Settings of HoVLEImageProcessor that transformers' tiling does not have."""

    use_thumbnail: bool


class HoVLEImageProcessor(GotOcr2ImageProcessor):
    """Images to tiles (T, 3, 448, 448), float32, normalised with ImageNet's statistics, and their number per image.

    The tiling is transformers' own (that of GOT-OCR 2 and InternVL); images of one size are resized and normalised
    together by torchvision, on the device that `device=` names.

    Args:
        kwargs: `size` (height and width of a tile), `min_patches` and `max_patches` (1 and 12 tiles beside the
            thumbnail), `crop_to_patches` (False: the whole image as one tile), `use_thumbnail`, `image_mean`,
            `image_std`, `resample` and the other settings of transformers' image processors.
    """

    valid_kwargs = HoVLEImageProcessorKwargs
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {'height': 448, 'width': 448}
    crop_to_patches = True
    use_thumbnail = True

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths, URLs, bytes and Pillow images as RGB images, arrays and tensors as they are; lists keep their form.

        Raises:
            ZooError: if an image cannot be read.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, Path, bytes, bytearray, Image.Image)):
            return read_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def crop_image_to_patches(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs['use_thumbnail'] = self.use_thumbnail
        return super().crop_image_to_patches(*args, **kwargs)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Tiles of an image of that size, the thumbnail included."""
        number = super().get_number_of_image_patches(height, width, images_kwargs)
        return number - (number > 1 and not self.use_thumbnail)


class HoVLEProcessor(ProcessorMixin):
    """Prompts with `<image>` and images to what HoVLE and mmMamba take.

    `processor(images=..., text=..., return_tensors='pt', padding=True)` gives `input_ids`, `attention_mask` (B, L) and
    `pixel_values` (tiles of all images, 3, 448, 448); `<image>` becomes `<img>`, 256 `<IMG_CONTEXT>` a tile, `</img>`.
    Padding is on the left, for generation; `padding_side='right'` changes it for a call.

    Args:
        image_processor: Tiles images.
        tokenizer: Of InternLM2, with the image tokens.
        chat_template: Jinja text; that of `internlm2-chat` by default.
        image_seq_length: Tokens of a tile: (size / patch)^2 times the squared downsampling ratio.
        max_length: Longest sequence in tokens; a longer one is an error. None for any length.
    """

    def __init__(
        self,
        image_processor: HoVLEImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        image_seq_length: int = 256,
        max_length: int | None = None,
    ) -> None:
        self.image_seq_length, self.max_length = image_seq_length, max_length
        self.start_token, self.image_token, self.end_token = '<img>', CONTEXT, '</img>'
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        known = tokenizer.get_vocab()
        for token in (self.start_token, self.image_token, self.end_token):
            if token not in known:
                raise ZooError(f'the tokenizer has no token {token}: is it that of another model?')
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATES['internlm2-chat'])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> HoVLEProcessor:
        """Loads a saved processor, or makes one from the config.json and tokenizer.model of a published folder.

        Args:
            pretrained_model_name_or_path: Folder or hub name.
            kwargs: Those of transformers, and attributes to change (`max_length`, `image_seq_length`,
                `chat_template`).

        Raises:
            ZooError: if the files are missing or of another model.
        """
        name = str(pretrained_model_name_or_path)
        keys = ('cache_dir', 'force_download', 'token', 'revision', 'local_files_only', 'subfolder')
        where = {key: kwargs[key] for key in keys if key in kwargs}

        def read(file: str) -> dict[str, Any] | str | None:
            path = cached_file(name, file, **where, _raise_exceptions_for_missing_entries=False)
            if path is None:
                return None
            text = Path(path).read_text(encoding='utf-8')
            return json.loads(text) if file.endswith('.json') else text

        saved = read('processor_config.json')
        if saved is not None:
            settings = dict(saved.get('image_processor') or read('preprocessor_config.json') or {})
            options = {key: saved[key] for key in ('image_seq_length', 'max_length') if key in saved}
            options['chat_template'] = read('chat_template.jinja')
        else:
            config = read('config.json')
            if config is None:
                raise ZooError(f'{name} has neither processor_config.json nor config.json')
            settings, options = settings_from_config(config, name)
        options |= {key: kwargs[key] for key in ('image_seq_length', 'max_length', 'chat_template') if key in kwargs}
        for key in ('image_processor_type', 'processor_class', 'feature_extractor_type'):
            settings.pop(key, None)
        tokenizer = InternLM2Tokenizer.from_pretrained(name, **where)
        return cls(HoVLEImageProcessor(**settings), tokenizer, **options)

    @property
    def model_input_names(self) -> list[str]:
        return ['input_ids', 'attention_mask', 'pixel_values']

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer: the template's end of message and the tokenizer's end of text."""
        return [self.tokenizer.convert_tokens_to_ids('<|im_end|>'), self.tokenizer.eos_token_id]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Processes a batch.

        Args:
            images: One image, a list in the order of `<image>` over all texts, or one list per text. An image is a
                path, URL, bytes, Pillow image, array or tensor.
            text: One prompt or a list.
            return_tensors: `pt` for tensors; lists of ids otherwise.
            kwargs: `padding`, `padding_side`, `max_length`, `truncation`, `add_special_tokens` and others of the
                tokenizer; `max_patches`, `min_patches`, `device` and others of the image processor.

        Raises:
            ZooError: for an unreadable image, a number of `<image>` that is not that of the images, a sequence that is
                longer than `max_length`.
        """
        for group in ('text_kwargs', 'images_kwargs', 'common_kwargs'):
            kwargs |= kwargs.pop(group, None) or {}
        return_tensors = kwargs.pop('return_tensors', return_tensors)
        for_images = {k: kwargs.pop(k) for k in list(kwargs) if k in (*HoVLEImageProcessorKwargs.__annotations__,)}
        texts = [text] if isinstance(text, str) else list(text) if text is not None else None
        flat = self._flatten(images, texts)
        data: dict[str, Any] = {}
        tiles: list[int] = []
        if flat:
            seen = self.image_processor(flat, return_tensors='pt', **for_images)
            tiles, data['pixel_values'] = [int(n) for n in seen['num_patches']], seen['pixel_values']
        if texts is not None:
            data = {**self._tokenize(texts, tiles, **kwargs), **data}
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=['text_replacement_offsets'])

    def _flatten(self, images: Any, texts: list[str] | None) -> list[Any]:
        """The images in the order of their placeholders, after counting both."""
        listed = images is not None and isinstance(images, (list, tuple))
        nested = listed and any(isinstance(image, (list, tuple)) for image in images)
        if nested:
            groups = [[i for i in g if i is not None] if isinstance(g, (list, tuple)) else [g] for g in images]
        else:
            groups = [[i for i in images if i is not None] if listed else [images] if images is not None else []]
        flat = [image for group in groups for image in group]
        if texts is None:
            return flat
        if nested and len(groups) != len(texts):
            raise ZooError(f'{len(groups)} lists of images for {len(texts)} texts: give one list, empty or not, a text')
        wanted = [len(_PLACEHOLDER.findall(text)) for text in texts]
        hint = f'write {IMAGE} once for an image: its {CONTEXT} are put in here'
        for sample, count in enumerate(wanted):
            if nested and count != len(groups[sample]):
                raise ZooError(f'text {sample} has {count} {IMAGE}, but {len(groups[sample])} images are given; {hint}')
        if sum(wanted) != len(flat):
            raise ZooError(f'the texts have {sum(wanted)} {IMAGE}, but {len(flat)} images are given; {hint}')
        return flat

    def _tokenize(self, texts: list[str], tiles: list[int], **kwargs: Any) -> dict[str, Any]:
        """Ids and mask of the texts, image tokens put in; lengths checked."""
        limit = kwargs.pop('max_length', None) or self.max_length
        cut = bool(kwargs.pop('truncation', False))
        with_offsets = kwargs.pop('return_text_replacement_offsets', False)
        kwargs.pop('return_mm_token_type_ids', None)
        padding = kwargs.pop('padding', False)
        padding_side = kwargs.pop('padding_side', self.tokenizer.padding_side)
        bos = self.tokenizer.bos_token
        if bos and texts and all(text.startswith(bos) for text in texts):
            kwargs['add_special_tokens'] = False
        left = iter(tiles)
        expanded, offsets = zip(*(self._expand(text, left) for text in texts)) if texts else ((), ())
        encoded = self.tokenizer(list(expanded), padding=False, truncation=False, **kwargs)
        for sample, ids in enumerate(encoded['input_ids']):
            if limit is None or len(ids) <= limit:
                continue
            pictures = ids.count(self.image_token_id)
            if not cut or ids[:limit].count(self.image_token_id) != pictures:
                raise ZooError(
                    f'text {sample} has {len(ids)} tokens, {pictures} of them of images, and max_length is {limit}: '
                    f'shorten it, lower max_patches ({self.image_processor.max_patches}) or raise max_length'
                )
            for key in encoded:
                encoded[key][sample] = encoded[key][sample][:limit]
        if padding:
            target = limit if padding == 'max_length' else None
            extra = {key: encoded.pop(key) for key in list(encoded) if key not in ('input_ids', 'attention_mask')}
            encoded = self.tokenizer.pad(
                encoded, padding=padding, max_length=target, padding_side=padding_side, return_tensors=None
            )
            encoded.update(_pad_offsets(extra, encoded['attention_mask'], padding_side))
        found = dict(encoded)
        if with_offsets:
            found['text_replacement_offsets'] = list(offsets)
        return found

    def _expand(self, text: str, tiles: Any) -> tuple[str, list[dict[str, Any]]]:
        """A text with its image tokens, and where they were put in."""
        pieces, offsets, done, grown = [], [], 0, 0
        for match in _PLACEHOLDER.finditer(text):
            tokens = self.start_token + self.image_token * (self.image_seq_length * next(tiles)) + self.end_token
            new_start = match.start() + grown
            new_span = (new_start, new_start + len(tokens))
            offsets.append(
                {'type': 'image', 'span': match.span(), 'new_span': new_span, 'text': match[0], 'replacement': tokens}
            )
            pieces += [text[done : match.start()], tokens]
            done, grown = match.end(), grown + len(tokens) - len(match[0])
        return ''.join([*pieces, text[done:]]), offsets


def _pad_offsets(extra: dict[str, list], masks: list[list[int]], side: str) -> dict[str, list]:
    """Offset mappings padded as the ids were."""
    padded: dict[str, list] = {}
    for key, rows in extra.items():
        filler = (0, 0) if key == 'offset_mapping' else 0
        missing = [[filler] * (len(mask) - len(row)) for mask, row in zip(masks, rows)]
        padded[key] = [m + list(row) if side == 'left' else list(row) + m for m, row in zip(missing, rows)]
    return padded


def settings_from_config(config: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the image processor and of the processor out of a published config.json.

    Args:
        config: Contents of config.json, of model type `internvl_chat` (HoVLE) or `mmMamba_chat`.
        name: What to call the folder in errors.

    Raises:
        ZooError: if the config is not of these models or names an unknown template.
    """
    vision = config.get('embedding_config')
    if not isinstance(vision, dict):
        raise ZooError(f'{name}: config.json has no embedding_config, so it is not of HoVLE or mmMamba')
    template = config.get('template') or 'internlm2-chat'
    if template not in CHAT_TEMPLATES:
        raise ZooError(f'{name}: unknown chat template {template!r}; known: {", ".join(CHAT_TEMPLATES)}')
    side = config.get('force_image_size') or vision.get('image_size', 448)
    ratio = config.get('downsample_ratio', vision.get('downsample_ratio', 0.5))
    images = {
        'size': {'height': side, 'width': side},
        'crop_to_patches': config.get('dynamic_image_size', True),
        'use_thumbnail': config.get('use_thumbnail', True),
        'min_patches': config.get('min_dynamic_patch', 1),
        'max_patches': config.get('max_dynamic_patch', 12),
    }
    tokens = int((side // vision.get('patch_size', 14)) ** 2 * ratio**2)
    return images, {'image_seq_length': tokens, 'chat_template': CHAT_TEMPLATES[template]}


def register(*config_classes: type) -> None:
    """Makes AutoTokenizer, AutoImageProcessor and AutoProcessor load these classes for the models of some configs.

    Args:
        config_classes: Config classes of HoVLE and mmMamba.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    for config in config_classes:
        AutoTokenizer.register(config, fast_tokenizer_class=InternLM2Tokenizer, exist_ok=True)
        AutoImageProcessor.register(config, fast_image_processor_class=HoVLEImageProcessor, exist_ok=True)
        AutoProcessor.register(config, HoVLEProcessor, exist_ok=True)
