"""lmms-eval runs HoVLE, mmMamba, linearised models and any other image-text model of transformers as its model `zoo`.

    pip install lmms-eval linear-zoo
    python -m lmms_eval --model zoo --model_args pretrained=FOLDER --tasks pope,textvqa --batch_size 8

lmms-eval finds this class through the entry-point group `lmms_eval.models` (its docs/guides/model_guide.md). The
interface is that of its chat models: requests bring messages, the class gives texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from zoo.errors import ZooError
from zoo.vlm.chat import Conversation, answer, load_vlm
from zoo.vlm.processing import IMAGE

_PASSED = ('max_new_tokens', 'num_beams', 'repetition_penalty', 'min_new_tokens', 'length_penalty')


def conversation(messages: list[dict[str, Any]], system_prompt: str | None = None) -> Conversation:
    """A conversation out of lmms-eval's messages.

    Args:
        messages: `role` and a list of contents with `type` `text` (`text`) or `image` (`url`: a Pillow image or path).
        system_prompt: Put in front, unless the messages begin with one of their own.

    Raises:
        ZooError: for videos and sounds.
    """
    turns, images = [], []
    if system_prompt and messages[0]['role'] != 'system':
        turns.append(('system', system_prompt))
    for message in messages:
        text = ''
        for part in message['content']:
            if part['type'] == 'text':
                text += part['text'].replace(IMAGE, '(image)')  # a task's words, not a placeholder of ours
            elif part['type'] == 'image':
                text += f'{IMAGE}\n'
                images.append(part['url'])
            else:
                raise ZooError(f'the task shows a {part["type"]}: these models see images only')
        turns.append((message['role'], text))
    return Conversation(turns, images)


def generation_options(asked: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` for a task's generation_kwargs: greedy unless it gives a temperature.

    Args:
        asked: The task's.
    """
    options = {key: asked[key] for key in _PASSED if asked.get(key) is not None}
    if (asked.get('temperature') or 0) > 0:
        options |= {'do_sample': True, 'temperature': asked['temperature'], 'top_p': asked.get('top_p')}
    return options


class ZooVLM(lmms):
    """Any image-text model of transformers, ours included, for lmms-eval.

    Args:
        pretrained: Folder or hub name.
        batch_size: Questions asked at once.
        device: Where the model goes; with several processes each takes its own GPU.
        dtype: `auto` for that of the checkpoint, or the name of a torch dtype.
        system_prompt: In place of the template's own.
        kwargs: Refused, to find misspelt names in --model_args.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = 'auto',
        system_prompt: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(kwargs) - {'max_batch_size'})
        if unknown:
            raise ZooError(f'model_args has no {", ".join(unknown)}: pretrained, device, dtype, system_prompt')
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            device = str(accelerator.device)
        self.accelerator = accelerator
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if device and device.startswith('cuda') and not torch.cuda.is_available():
            device = 'cpu'  # lmms-eval passes cuda:0 where nothing is said
        self._model, self.processor = load_vlm(pretrained, device, dtype)
        self.batch_size_per_gpu, self.system_prompt = int(batch_size), system_prompt

    @property
    def model(self) -> Any:
        return self._model

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not asked of chat models."""
        raise ZooError('lmms-eval asks chat models to generate; this task wants log-likelihoods')

    def _batches(self, requests: list[Instance]) -> Iterator[list[tuple[int, Conversation, dict[str, Any]]]]:
        """Requests with equal options, all with images or all without, in batches."""
        waiting: dict[str, list[tuple[int, Conversation, dict[str, Any]]]] = {}
        for index, request in enumerate(requests):
            _, to_messages, asked, document, task, split = request.args
            said = conversation(_plain(to_messages(self.task_dict[task][split][document])), self.system_prompt)
            queue = waiting.setdefault(f'{bool(said.images)} {sorted(asked.items(), key=str)}', [])
            queue.append((index, said, asked))
            if len(queue) == self.batch_size:
                yield list(queue)
                queue.clear()
        yield from (queue for queue in waiting.values() if queue)

    def _answer(self, conversations: list[Conversation], asked: dict[str, Any]) -> list[str]:
        said = answer(self._model, self.processor, conversations, **generation_options(asked))
        stops = asked.get('until') or []
        for stop in [stops] if isinstance(stops, str) else stops:
            said = [text.split(stop)[0] for text in said]
        return said

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests."""
        found = [''] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc='zoo') as bar:
            for batch in self._batches(requests):
                texts = self._answer([said for _, said, _ in batch], batch[0][2])
                for (index, _, asked), text in zip(batch, texts):
                    found[index] = text
                    self.cache_hook.add_partial('generate_until', (requests[index].args[0], asked), text)
                bar.update(len(batch))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The outputs of every round of tasks that ask again, one request after the other."""
        found = []
        for request in tqdm(requests, disable=self.rank != 0, desc='zoo'):
            _, to_messages, asked, document, task, split = request.args
            outputs: list[str] = []
            info: Any = None
            while True:
                row = self.task_dict[task][split][document]
                turn = to_messages(row, round_idx=len(outputs), previous_output=list(outputs), previous_round_info=info)
                messages, ended, _, info = turn
                if ended or messages is None:
                    break
                outputs += self._answer([conversation(_plain(messages), self.system_prompt)], asked)
            found.append(outputs)
        return found


def _plain(messages: list[Any]) -> list[dict[str, Any]]:
    """Messages as dicts with a list of contents, whichever form the task writes."""
    plain = []
    for message in messages:
        message = message if isinstance(message, dict) else message.model_dump()
        content = message['content']
        listed = [{'type': 'text', 'text': content}] if isinstance(content, str) else content
        plain.append({'role': message['role'], 'content': listed})
    return plain
