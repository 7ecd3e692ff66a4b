"""CUDA graphs: what a call enqueues, recorded once and replayed without the host's part."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar('Result')


def record(
    call: Callable[[], Result], warmup: int = 2, pool: tuple[int, int] | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture a call as a CUDA graph on the current device.

    Args:
        call: reads and writes tensors that stay where they are.
        warmup: calls before, on a side stream as capturing needs it: libraries set themselves up in them.
        pool: memory of another graph (`graph.pool()`) to share, for graphs that read nothing of each other.

    Returns:
        The graph, and what the captured call gave: replays write their results there.
    """
    if warmup:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                call()
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()
    return graph, result
