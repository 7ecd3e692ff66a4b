"""The cases of check_selective_scan.py under pytest: `pytest -m gpu tests/gpu` (mostly compilation; -n helps)."""

import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]
pytest.importorskip('triton')
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
@pytest.mark.parametrize('case', range(18))
def test_case(case, dtype):
    from check_selective_scan import CASES, check

    assert check(lambda **row: None, (case, len(CASES)), [getattr(torch, dtype)]) == 0
