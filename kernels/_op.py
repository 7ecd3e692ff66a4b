"""Entry points of kernels: a custom op for the compiler and for modes, cheaper ways in for everyone else.

A call of a `torch.library` custom op costs 30 to 70 us of Python, more than a small kernel takes. Plain eager tensors
need none of what it adds, so they go straight to the kernel's host code: without gradients as a function call, with
gradients through a `torch.autograd.Function` of the same two functions. Under `torch.compile`, export, fake tensors,
FLOP counters, meta tensors, functorch transforms and forward-mode AD the custom op is called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)
_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._functorch.peek_interpreter_stack


def plain_eager(x: Tensor) -> bool:
    """Whether nothing but autograd has to see a call with this tensor."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and not x.is_meta
        and not _modes()
        and _functorch() is None
        and forward_ad._current_level < 0
    )


class Op:
    """A kernel's host code as a function of tensors, differentiable where a backward pass is given.

    Args:
        name: qualified name of the custom op.
        forward: host code with a signature that `torch.library.infer_schema` understands; the first argument is a
            tensor. It returns fresh tensors, never views of its arguments, or None for a result that nobody needs.
        fake: shapes and dtypes of its results; what can be None is empty there, in the first argument's dtype.
        setup: `setup_context(ctx, inputs, output)` as autograd functions have it.
        backward: `backward(ctx, *grads)`; gradients of unused results are None.
        any_strides: whether the compiler may choose the strides of the arguments: the results' strides must not depend
            on them. Otherwise it copies what does not lie as it would in eager mode.
    """

    def __init__(
        self,
        name: str,
        forward: Callable,
        fake: Callable,
        setup: Callable | None = None,
        backward: Callable | None = None,
        any_strides: bool = False,
    ):
        self._forward = forward
        tags = (torch.Tag.flexible_layout,) if any_strides else ()

        @functools.wraps(forward)
        def full(*args):  # a custom op returns tensors only
            output = forward(*args)
            if type(output) is not tuple:
                return output
            return tuple(args[0].new_empty(0) if x is None else x for x in output)

        self.custom = torch.library.custom_op(name, full, mutates_args=(), tags=tags)
        self.custom.register_fake(fake)
        self._function = None
        if backward is not None:
            self.custom.register_autograd(backward, setup_context=setup)

            # The form with a separate `setup_context` method binds its arguments by signature at every call: 25 us.
            def forward_and_setup(ctx, *args):
                output = forward(*args)
                setup(ctx, args, output)
                return output

            parts = dict(forward=forward_and_setup, backward=backward)
            parts = {key: staticmethod(value) for key, value in parts.items()}
            self._function = type(name.split('::')[1], (torch.autograd.Function,), parts).apply

    def __call__(self, *args):
        if not plain_eager(args[0]):
            return self.custom(*args)
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    # A backward pass that is itself recorded: the custom op refuses to be differentiated.
                    return self.custom(*args) if self._function is None else self._function(*args)
        return self._forward(*args)


class InplaceOp:
    """A kernel's host code that overwrites some of its arguments and has no gradient.

    Args:
        name: qualified name of the custom op.
        forward: as for `Op`.
        fake: shapes and dtypes of its results.
        mutates: names of the arguments that are overwritten.
    """

    def __init__(self, name: str, forward: Callable, fake: Callable, *mutates: str):
        self._forward = forward
        self.custom = torch.library.custom_op(name, forward, mutates_args=mutates)
        self.custom.register_fake(fake)
        names = list(inspect.signature(forward).parameters)
        self._places = [names.index(name) for name in mutates]

    def __call__(self, *args):
        if not plain_eager(args[0]):
            return self.custom(*args)
        result = self._forward(*args)
        for place in self._places:  # a backward pass that has kept the old numbers must notice
            if not args[place].is_inference():
                increment_version(args[place])
        return result
