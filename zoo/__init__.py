"""linear-zoo: vision and vision-language models on linear-complexity token mixers.

`import zoo` registers every model of the zoo with timm's registry; nothing heavier than timm is imported until it is
used. `zoo.kernel_backend` chooses which implementation of the kernels runs.
"""

from __future__ import annotations

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent
if not (_root / 'kernels').is_dir():
    # A checkout keeps kernels/, backbones/, heads/ and configs/ beside zoo/ rather than inside it.
    __path__.append(str(_root.parent))

from zoo.kernels._dispatch import kernel_backend  # noqa: E402
from zoo.registry import create_model, list_models  # noqa: E402

__version__ = '0.1.0'
__all__ = ['create_model', 'kernel_backend', 'linearize', 'list_models', '__version__']


def __getattr__(name: str):
    # Looked up on first use; transformers is imported when the function is called.
    if name == 'linearize':
        from zoo.linearizer import linearize

        return linearize
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
