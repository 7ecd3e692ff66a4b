"""Attention of a piece of a prompt: in one product, and averaged over blocks of the past."""

import pytest
import torch
from zoo.backbones import _pieces


def draw(pieces: int, length: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of the last of `pieces` pieces, keys and values of all of them in a longer buffer."""
    torch.manual_seed(pieces)
    q = torch.randn(2, length, 6, 16).transpose(1, 2)
    keys, values = (torch.randn(2, 3, 200, 16)[:, :, : pieces * length] for _ in range(2))
    return q, 3 * keys, values


def plain(q, keys, values, scale):
    length, total = q.shape[2], keys.shape[2]
    keys, values = (t.repeat_interleave(2, 1) for t in (keys, values))
    seen = torch.ones(length, total).tril(total - length).bool()
    return (scale * q @ keys.mT).masked_fill(~seen, float('-inf')).softmax(-1) @ values


def with_log_sums(q, keys, values, causal, scale):
    """What cuDNN's operator gives, with its shape of the sums."""
    keys, values = (t.repeat_interleave(2, 1) for t in (keys, values))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, causal, scale=scale)
    return found[0], found[1].unsqueeze(-1)


@pytest.mark.parametrize('pieces', [1, 2, 3, 4, 8, 14])
def test_blocks_give_what_one_product_gives(pieces, monkeypatch):
    q, keys, values = draw(pieces)
    monkeypatch.setattr(_pieces, 'LEAST', 12)
    monkeypatch.setattr(_pieces, '_cudnn_is_chosen', lambda *args: True)
    sizes = []
    monkeypatch.setattr(_pieces, '_attend', lambda *a: (sizes.append(a[1].shape[2] // 12), with_log_sums(*a))[1])
    torch.testing.assert_close(_pieces.attend_piece(q, keys, values, 0.3), plain(q, keys, values, 0.3))
    assert sum(sizes) == pieces and sizes == sorted(sizes, reverse=True)
    assert all(n & (n - 1) == 0 for n in sizes), sizes


@pytest.mark.parametrize('length', [1, 7, 12])
def test_one_product_aligns_the_triangle_at_the_lower_right(length):
    q, keys, values = draw(5)
    q = q[:, :, -length:]
    torch.testing.assert_close(_pieces.attend_piece(q, keys, values, 0.3), plain(q, keys, values, 0.3))
