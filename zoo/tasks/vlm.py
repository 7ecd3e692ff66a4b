"""Training of vision-language models: any transformers model, cross-entropy on answers, exact match by type."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn

from zoo.data.chat import IGNORED, check_tokens, image_token_id, model_inputs, turn_numbers
from zoo.data.seeding import keyed_randomness, run_seed
from zoo.errors import RunError, ZooError
from zoo.tasks._vlm_report import AnswersReport
from zoo.tasks.classify import Ema, adapt_ema, build_ema
from zoo.tasks.fitting import FittingModule
from zoo.tasks.nonfinite import first_nonfinite
from zoo.tasks.optim import Optim, Schedule, as_dataclass, as_plain

MODEL = 'model'


@dataclass
class Lora:
    """Low-rank adapters (peft) in place of training the weights; the exported model has them merged in.

    Args:
        r: Rank.
        alpha: The update is scaled by alpha / r.
        dropout: On the adapters' input.
        targets: all-linear, or endings of the names of the layers that get one.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = 'all-linear'


class FinetuneVLM(FittingModule):
    """Trains a transformers vision-language model on conversations.

    Args:
        net: A transformers folder or hub name, or a config to build from scratch: model_type and its arguments. What
            only the data knows (vocabulary size, ids of image, padding and end tokens) is filled in.
        optim: Optimizer.
        schedule: Learning rate over time.
        ema: Weight averaging; null is off.
        lora: Low-rank adapters; null trains all weights.
        freeze: Patterns of parameter names that are not trained, such as *vision_tower*.
        max_new_tokens: Longest generated answer in test.
        gradient_checkpointing: Whether to recompute activations in the backward pass.
        check_finite: Whether to stop at a loss that is not finite, naming its origin.
    """

    def __init__(
        self,
        net: str | dict[str, Any],
        optim: Optim = Optim(),  # noqa: B008  jsonargparse takes the defaults of the fields from here
        schedule: Schedule = Schedule(),  # noqa: B008
        ema: Ema | None = None,
        lora: Lora | None = None,
        freeze: list[str] | None = None,
        max_new_tokens: int = 32,
        gradient_checkpointing: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        settings = {k: as_plain(v) for k, v in locals().items() if k not in ('self', '__class__')}
        self.save_hyperparameters(settings)
        self.source = net
        self.net_name = net if isinstance(net, str) else f'a new {net.get("model_type", "model")}'
        self.optim, self.schedule = as_dataclass(Optim, optim), as_dataclass(Schedule, schedule)
        self.ema_settings, self.lora = as_dataclass(Ema, ema), as_dataclass(Lora, lora)
        self.freeze, self.max_new_tokens = freeze or [], max_new_tokens
        self.gradient_checkpointing, self.check_finite = gradient_checkpointing, check_finite
        self.net: nn.Module | None = None
        self.ema: nn.Module | None = None
        self._tally = Tally()

    # building

    def configure_model(self) -> None:
        if self.net is not None:
            return
        data = self.trainer.datamodule
        if not hasattr(data, 'processor'):
            raise ZooError(f'{type(data).__name__} has no conversations: take data such as zoo.data.Conversations')
        net = build_vlm(self.source, data.processor)
        check_tokens(data.processor, net.config)
        for name, parameter in net.named_parameters():
            if any(fnmatch.fnmatch(name, pattern) for pattern in self.freeze):
                parameter.requires_grad_(False)
        if self.gradient_checkpointing:
            net.gradient_checkpointing_enable()
        self.net = add_lora(net, self.lora) if self.lora else net
        self.ema = build_ema(self.net, self.ema_settings)

    @property
    def eval_net(self) -> nn.Module:
        """The network that results are reported for: the average where there is one."""
        return self.ema.module if self.ema is not None else self.net

    # training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor | None:
        self.trainer.datamodule.count_unusable(batch, training=True)
        size = len(batch['name'])
        if not size:
            return None
        logits, target, _ = answer_logits(self.net, batch)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED)
        if self.check_finite and not torch.isfinite(loss):
            raise self._diverged(batch, batch_idx)
        self.log('train/loss', loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        return loss

    # evaluation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.trainer.datamodule.count_unusable(batch)
        if batch['name']:
            self._forced(batch)

    def _forced(self, batch: dict[str, Any], count: bool = True) -> None:
        """Adds the loss, and counts the turns whose true tokens are the most probable ones, each behind true ones."""
        logits, target, turns = answer_logits(self.eval_net, batch)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED, reduction='sum')
        self._tally.loss += float(losses)
        self._tally.tokens += int((target != IGNORED).sum())
        if not count:
            return
        wrong = (logits.argmax(-1) != target) & (turns >= 0)
        for row, kinds in enumerate(batch['question_type']):
            missed = set(turns[row][wrong[row]].tolist())
            for turn, kind in enumerate(kinds):
                self._tally.add(kind, turn not in missed)

    def on_validation_epoch_end(self) -> None:
        self._log_tally('val')

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[str, str, str, str, bool]] | None:
        """Answers by `generate`.

        Returns:
            Type, question, truth, answer and whether it is right, turn by turn.
        """
        self.trainer.datamodule.count_unusable(batch)
        if not batch['name']:
            return None
        self._forced(batch, count=False)
        said = generate_answers(
            self.eval_net, batch['prompts'], self.trainer.datamodule.processor.tokenizer, self.max_new_tokens
        )
        rows = []
        turns = zip(*(sum(batch[key], []) for key in ('question_type', 'question', 'answer')))
        for (kind, question, truth), answer in zip(turns, said):
            right = answer == truth.strip()
            self._tally.add(kind, right)
            rows.append((kind, question, truth, answer, right))
        return rows

    def on_test_epoch_end(self) -> None:
        self._log_tally('test')

    def _log_tally(self, split: str) -> None:
        tally = self._tally.gathered()
        self._tally = Tally()
        self.log(f'{split}/loss', tally.loss / max(tally.tokens, 1))
        self.log(f'{split}/exact', tally.exact(), prog_bar=split == 'val')
        for kind in tally.asked:
            self.log(f'{split}/exact_{kind}', tally.exact(kind))

    # what runs ask

    def headline(self, split: str, metrics: Any) -> str:
        """The line that people look for."""
        name = 'validation' if split == 'val' else split
        line = f'{name} exact match: {100 * float(metrics[f"{split}/exact"]):.2f} %'
        prefix = f'{split}/exact_'
        kinds = {k[len(prefix) :]: float(v) for k, v in metrics.items() if k.startswith(prefix)}
        if len(kinds) > 1:
            line += '  (' + ', '.join(f'{kind} {100 * value:.2f}' for kind, value in kinds.items()) + ')'
        return line

    def report_callback(self, folder: Path, samples: Path | None) -> Callback:
        return AnswersReport(folder)

    @property
    def accuracy_curves(self) -> tuple[str, dict[str, str]]:
        """Title, and label of each metric in the right half of curves.png."""
        kinds = self.trainer.datamodule.question_types
        by_kind = {f'val/exact_{kind}': kind for kind in kinds} if len(kinds) > 1 else {}
        return 'Exact match on validation questions', {'val/exact': 'all', **by_kind}

    def export(self, folder: Path) -> list[str]:
        """Writes a transformers folder with the processor: MODEL in the run's folder."""
        target = folder / MODEL
        save_folder(self.eval_net, self.trainer.datamodule.processor, target)
        return [f'model:   {target}/  (transformers folder with its processor)']

    # hooks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        theirs = checkpoint.get('hyper_parameters', {})
        if isinstance(self.source, dict) and theirs.get('net', self.source) != self.source:
            raise ZooError(f'the checkpoint holds model.net {theirs["net"]},\nthe config asks for {self.source}')
        if bool(theirs.get('lora')) != bool(self.lora):
            raise ZooError(f'the checkpoint was written with{"" if theirs.get("lora") else "out"} model.lora')
        self.check_checkpoint({}, theirs)
        adapt_ema(checkpoint['state_dict'], wanted=self.ema is not None)

    # helpers

    def _diverged(self, batch: dict[str, Any], batch_idx: int) -> RunError:
        inputs = model_inputs(batch)

        def run() -> Any:
            self.seed_step(batch_idx)
            return self.net(**inputs)

        pixels = inputs.get('pixel_values', torch.zeros(()))
        names = ', '.join(batch['name'][:4]) + (' ...' if len(batch['name']) > 4 else '')
        return RunError(
            f'the loss is not finite at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx})\n'
            f'first non-finite value: {first_nonfinite(self.net, run, pixels)}\n'
            f'batch: {names}\n'
            'What helps: a lower --model.optim.lr, --trainer.gradient_clip_val 1, a longer warm-up, or bf16-mixed '
            'instead of 16-mixed'
        )


class Tally:
    """Right answers and questions per type, and the summed loss of answer tokens."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.loss, self.tokens = 0.0, 0

    def add(self, kind: str, right: bool) -> None:
        self.asked[kind] += 1
        self.right[kind] += int(right)

    def exact(self, kind: str | None = None) -> float:
        """Share of right answers, of one type or of all."""
        right, asked = (
            (self.right.total(), self.asked.total()) if kind is None else (self.right[kind], self.asked[kind])
        )
        return right / asked if asked else math.nan

    def gathered(self) -> Tally:
        """The sum over all processes."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.right, self.asked, self.loss, self.tokens))
        whole = Tally()
        for right, asked, loss, tokens in parts:
            whole.right += right
            whole.asked += asked
            whole.loss += loss
            whole.tokens += tokens
        return whole


# models


def build_vlm(net: str | dict[str, Any], processor: Any) -> nn.Module:
    """A transformers vision-language model.

    Args:
        net: Folder or hub name, or model_type and the arguments of its config. A new model takes from the processor
            what the config leaves open: vocabulary size, ids of the image, padding and end tokens.
        processor: The data's processor.

    Raises:
        ZooError: There is no such model, or no such type.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import zoo.vlm  # noqa: F401  registers our models

    if isinstance(net, str):
        try:
            return AutoModelForImageTextToText.from_pretrained(net, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ZooError(f'cannot load a vision-language model from {net}: {error}') from error
    given = dict(net)
    kind = given.pop('model_type', None)
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=4, cutoff=0.4)
        raise ZooError(
            f'model.net.model_type {kind!r} is no model type of transformers'
            + f'; close: {", ".join(close)}' * bool(close)
        )
    tokenizer, image = processor.tokenizer, image_token_id(processor)
    ids = {'pad_token_id': tokenizer.pad_token_id, 'eos_token_id': tokenizer.eos_token_id}
    ids['bos_token_id'] = tokenizer.bos_token_id
    text = {'vocab_size': len(tokenizer), **ids, **(given.get('text_config') or {})}
    known = {'image_token_id': image, 'image_token_index': image, 'pad_token_id': tokenizer.pad_token_id}
    try:
        config = AutoConfig.for_model(kind, **{**known, **given, 'text_config': text})
        with keyed_randomness(run_seed()):
            model = AutoModelForImageTextToText.from_config(config)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ZooError(f'cannot build a {kind} model from model.net: {error}') from error
    for key, value in ids.items():
        setattr(model.generation_config, key, value)
    return model


def add_lora(net: nn.Module, lora: Lora) -> nn.Module:
    """The network with peft's adapters; only those are trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ZooError('model.lora needs the extra "vlm": pip install "linear-zoo[vlm]"') from error
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets)
    try:
        with keyed_randomness(run_seed()):
            return get_peft_model(net, config)
    except ValueError as error:
        raise ZooError(f'model.lora.targets {lora.targets}: {error}') from error


def answer_logits(net: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits where some row of the batch has an answer token next.

    Returns:
        Logits (B, K, V), the token that follows each (B, K) with -100 where it is no answer, and the number of its turn
        (B, K) with -1 there.
    """
    labels, turns = batch['labels'][:, 1:], turn_numbers(batch['labels'])[:, 1:]
    keep = (labels != IGNORED).any(0).nonzero().flatten()
    inner = net.get_base_model() if hasattr(net, 'get_base_model') else net
    # the vocabulary is the widest layer of a model, and questions and images need none of it
    if 'logits_to_keep' in inspect.signature(inner.forward).parameters:
        logits = net(**model_inputs(batch), logits_to_keep=keep).logits
    else:
        logits = net(**model_inputs(batch)).logits[:, keep]
    return logits, labels[:, keep], turns[:, keep]


@torch.no_grad()
def generate_answers(
    net: nn.Module, prompts: dict[str, torch.Tensor], tokenizer: Any, max_new_tokens: int
) -> list[str]:
    """Greedy answers to left-padded prompts, as text."""
    config = net.generation_config
    out = net.generate(
        **prompts,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id,
        eos_token_id=tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id,
    )
    new = out[:, prompts['input_ids'].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def save_folder(net: nn.Module, processor: Any, target: Path) -> None:
    """A transformers folder, written beside its place and then renamed; adapters are merged into a copy."""
    staged = target.with_name(f'.{target.name}.tmp')
    shutil.rmtree(staged, ignore_errors=True)
    if hasattr(net, 'merge_and_unload'):
        import copy

        net = copy.deepcopy(net).merge_and_unload()
    try:
        net.save_pretrained(staged)
        processor.save_pretrained(staged)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise RunError(f'cannot write {target}: {error}') from error
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
