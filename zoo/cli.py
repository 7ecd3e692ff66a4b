"""The command `zoo`. Everything heavy is imported by the sub-command that needs it."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path

from zoo.errors import ZooError

RUN_VERBS = ('fit', 'validate', 'test', 'predict')
TOOLS = {
    'list': ('zoo.tools.models', 'cli_list'),
    'info': ('zoo.tools.models', 'cli_info'),
    'configs': ('zoo.tools.models', 'cli_configs'),
    'doctor': ('zoo.tools.doctor', 'cli_doctor'),
    'export': ('zoo.tools.export', 'cli_export'),
    'bench': ('zoo.tools.bench', 'cli_bench'),
    'chat': ('zoo.tools.chat', 'cli_chat'),
    'eval-vlm': ('zoo.tools.eval_vlm', 'cli_eval_vlm'),
    'generate-image': ('zoo.tools.generate_image', 'cli_generate_image'),
    'probe': ('zoo.tools.probe', 'cli_probe'),
    'cache-latents': ('zoo.tools.cache_latents', 'cli_cache_latents'),
}

OVERVIEW = """\
usage: {program} COMMAND ...

Train and use
  fit       --config NAME [--trainer.max_epochs 10 ...]   train; NAME is a YAML file or a packaged config
            --config NAME --ckpt_path last                go on with the newest run of that config
  test      --ckpt_path FILE                              test a trained checkpoint
  validate  --ckpt_path FILE                              the same on the validation split
  predict   --ckpt_path FILE --images FILE_OR_FOLDER ...  write predictions.csv and contact_sheet.png
  probe     CKPT_OR_NAME [--config NAME]                  linear, moment, Matryoshka and neighbour probes in one table

Vision-language models
  chat MODEL --image FILE "QUESTION"                      ask one; MODEL is a folder or hub name
  eval-vlm MODEL --data FILE                              exact match, VQA accuracy, perplexity

Diffusion models
  generate-image MODEL --prompt TEXT [--size 4096x2048]   linear attention, also far beyond the trained size
  cache-latents --pipeline NAME --data DATA --output DIR  encode images and captions once, before training

Look around
  list [FILTER]              models                       info NAME      parameters, MACs, weights, licence
  configs                    packaged configs             doctor         versions, devices, kernel paths

Measure and ship
  validate NAME --data DIR   top-1 of published weights   bench ...      speed beside timm's models
  export NAME ...            ONNX, torch.export, safetensors

More about one: {program} COMMAND --help; every setting of a run: {program} fit --config NAME --print_config
Start here: {program} fit --config quickstart
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit code: 0, 1 for a run that stopped, 2 for a mistake in the arguments, 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(argv)
    except ZooError as error:
        print(f'error: {error_text(error)}', file=sys.stderr)
        return error.exit_code


def dispatch(argv: list[str]) -> int:
    """Hands the arguments to the sub-command they name."""
    if not argv or argv[0] in ('-h', '--help', 'help'):
        print(OVERVIEW.format(program=program()), end='')
        return 0
    if argv[0] in ('-V', '--version'):
        import zoo

        print(zoo.__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb == 'validate' and rest and not rest[0].startswith('-'):
        return call_tool('zoo.tools.validate', 'cli_validate', rest)
    if verb in TOOLS:
        return call_tool(*TOOLS[verb], rest)
    if verb not in RUN_VERBS:
        close = difflib.get_close_matches(verb, [*RUN_VERBS, *TOOLS], n=1)
        raise ZooError(
            f'no command {verb!r}' + (f', did you mean {close[0]}?' if close else f'; see {program()} --help')
        )
    from zoo.runs import run

    return run(verb, rest)


def call_tool(module: str, function: str, argv: list[str]) -> int:
    return getattr(importlib.import_module(module), function)(argv) or 0


def program() -> str:
    """How the user called this program."""
    name = Path(sys.argv[0]).name
    return f'python {name}' if name.endswith('.py') and name != '__main__.py' else 'zoo'


def error_text(error: ZooError) -> str:
    """The message; loader workers wrap it in a traceback."""
    text = str(error)
    for marker in ('zoo.errors.ZooError: ', 'zoo.errors.RunError: '):
        text = text.rsplit(marker, 1)[-1] if text.startswith('Caught ') else text
    return text.strip()
