"""Kinds of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is a strided one: not nested, sparse or MKL-DNN's, nor a wrapper of others such as DTensor.

    ``is_traceable_wrapper_subclass`` of ``torch.utils._python_dispatch`` asks the tensor; traced by Dynamo, only
    its class has the answer.
    """
    return x.layout == torch.strided and not x.is_nested and not hasattr(type(x), "__tensor_flatten__")


def version(x: Tensor) -> int:
    """The number of times that a tensor was written to."""
    return x._version
