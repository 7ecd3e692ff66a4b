"""Weights and inputs of the recorded cases, regenerated from names.

A case is NAME.json and NAME.npz: what the published implementation computes for weights that follow from each key's
name and shape alone, so that no checkpoint has to be kept. numpy's legacy RandomState gives the same stream everywhere.
The JSON lists keys (name, shape, dtype), inputs (shape, seed), where the outputs lie in the NPZ and `suggested_atol`.
"""

import zlib

import numpy as np
import torch


def values(key, shape):
    """Values of one tensor: a standard normal stream seeded by the key's CRC-32, scaled by the tensor's role."""
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(size=tuple(shape)).astype(np.float32)
    leaf = key.rsplit('.', 1)[-1]
    if leaf == 'running_var':
        return 1.0 + 0.2 * np.abs(noise)
    if leaf == 'running_mean':
        return 0.1 * noise
    # Matrices and kernels keep the scale of their input; kernels with an axis of size 1 count as gains (rule 1).
    if noise.ndim == 2 or (noise.ndim > 2 and min(noise.shape) > 1):
        return noise / np.float32(np.sqrt(max(int(np.prod(noise.shape[1:])), 1)))
    is_gain = leaf in ('weight', 'scale', 'D') or 'gamma' in leaf
    return 1.0 + 0.1 * noise if is_gain else 0.1 * noise


def state_dict(manifest, arrays):
    """The checkpoint of a case, under the published key names; entries given as `const/KEY` arrays win."""
    assert manifest.get('rule', 1) == 1, 'these cases follow rule 1'
    out = {}
    for key, spec in manifest['keys'].items():
        const = f'const/{key}'
        value = arrays[const] if const in arrays else values(key, spec['shape'])
        out[key] = torch.from_numpy(np.array(value)).to(getattr(torch, spec['dtype']))
    return out


def image_batch(spec):
    """The recorded input: float32 (B, C, H, W)."""
    noise = np.random.RandomState(spec['seed']).standard_normal(size=tuple(spec['shape']))
    return torch.from_numpy(noise.astype(np.float32))
