"""Set-up that must happen before torch's and the hub's modules read the environment."""

import os
import random

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported: its kernels then run on CPU tensors, one program after the other.
    os.environ.setdefault('TRITON_INTERPRET', '1')


def pytest_configure(config):
    if 'net' not in (config.getoption('markexpr') or '').replace('not net', ''):
        os.environ['HF_HUB_OFFLINE'] = '1'  # a default run never waits for a network
    torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings, above all on busy machines


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
