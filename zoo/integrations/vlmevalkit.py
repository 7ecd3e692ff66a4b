"""VLMEvalKit runs HoVLE, mmMamba, linearised models and any other image-text model of transformers through one class.

VLMEvalKit finds models in a table instead of through entry points. Register one before its runner starts, in a script
beside its `run.py`:

    from functools import partial
    from vlmeval.config import supported_VLM
    from zoo.integrations.vlmevalkit import ZooVLM

    supported_VLM['mmMamba-linear'] = partial(ZooVLM, model_path='FOLDER')

    from run import load_env, main
    load_env()
    main()

and call that script as `run.py` is called: `--data MMBench_DEV_EN --model mmMamba-linear`. The interface is that of
docs/en/Development.md of github.com/open-compass/VLMEvalKit: `generate_inner(message, dataset)` with a list of
`{'type': 'image' or 'text', 'value': ...}`, and `chat_inner` for several turns. Without VLMEvalKit the class works
alone.
"""

from __future__ import annotations

from typing import Any

from zoo.errors import ZooError
from zoo.vlm.chat import Conversation, answer, load_vlm
from zoo.vlm.processing import IMAGE

try:
    from vlmeval.vlm.base import BaseModel
except ImportError:
    BaseModel = object


class ZooVLM(BaseModel):
    """Any image-text model of transformers, ours included, for VLMEvalKit.

    Args:
        model_path: Folder or hub name.
        device: A CUDA device where there is one by default.
        dtype: `auto` for that of the checkpoint, or the name of a torch dtype.
        max_new_tokens: Longest answer; greedy unless the arguments of `generate` say otherwise.
        generate_kwargs: For `model.generate`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ['text', 'image']

    def __init__(
        self,
        model_path: str,
        device: str | None = None,
        dtype: str = 'auto',
        max_new_tokens: int = 1024,
        **generate_kwargs: Any,
    ) -> None:
        super().__init__()
        self.model, self.processor = load_vlm(model_path, device, dtype)
        self.generate_kwargs = {'max_new_tokens': max_new_tokens, **generate_kwargs}

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to one message.

        Args:
            message: Images (`value`: path or URL) and texts in their order.
            dataset: Name of the benchmark; not needed.
        """
        return self.chat_inner([{'role': 'user', 'content': message}], dataset)

    def chat_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last of several turns.

        Args:
            message: Turns of user and assistant, the contents as in `generate_inner`.
            dataset: Name of the benchmark; not needed.

        Raises:
            ZooError: for contents that are neither images nor texts.
        """
        turns, images = [], []
        for turn in message:
            text = ''
            for part in turn['content']:
                if part['type'] == 'image':
                    text += f'{IMAGE}\n'
                    images.append(part['value'])
                elif part['type'] == 'text':
                    text += part['value'].replace(IMAGE, '(image)')  # a benchmark's words, not a placeholder of ours
                else:
                    raise ZooError(f'the benchmark shows a {part["type"]}: these models see images only')
            turns.append((turn['role'], text))
        return answer(self.model, self.processor, [Conversation(turns, images)], **self.generate_kwargs)[0]
