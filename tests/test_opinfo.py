"""torch's own database of operators: every sample of every pointwise activation, forward and backward.

The samples come with their arguments, in several dtypes; each is also run non-contiguous, empty and
0-dimensional. The number of samples that passed is in the summary of the test run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLES_PASSED
from helpers import oracle_factor
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import fewbit_fx.functional
from fewbit_fx.codebooks.fitting import bits_for
from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.torch_private.inductor import partition_only

NAMES = [
    "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "softsign", "tanh", "tanhshrink", "sigmoid",
    "logsigmoid", "hardswish", "hardsigmoid", "hardtanh", "relu", "relu6", "leaky_relu", "rrelu", "prelu", "hardshrink",
    "softshrink", "threshold",
]  # fmt: skip
OPS = {op.name.removeprefix("nn.functional."): op for op in op_db if not op.variant_test_name}
CODED = FewBitConfig(recipe="derivatives", min_numel=0, strict=True)
PLAIN = FewBitConfig(recipe="derivatives", min_numel=0, strict=True, derivatives=False, masks=False)


@dataclass(frozen=True)
class Sample:
    """An input with the other arguments of the operator."""

    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, function: Callable[..., Tensor], x: Tensor) -> Tensor:
        torch.manual_seed(0)  # for rrelu
        return function(x, *self.args, **self.kwargs)


def samples(name: str, dtype: torch.dtype, variants: bool = True) -> Iterator[Sample]:
    given = list(OPS[name].sample_inputs("cpu", dtype, requires_grad=True))
    for sample in given:
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in sample.args)
        x = sample.input.detach()
        yield Sample(x, args, sample.kwargs)
        if variants:
            spread = torch.stack((x, x), -1)[..., 0]
            yield Sample(spread, args, sample.kwargs)
    plain = () if name != "prelu" else (torch.tensor([0.25], dtype=dtype),)
    for x in (torch.empty(0, 3, dtype=dtype), torch.tensor(-0.7, dtype=dtype)) if variants else ():
        arguments = given[0].kwargs if name != "prelu" else {}
        yield Sample(x, tuple(given[0].args) if name == "threshold" else plain, arguments)


def nearest_level(sample: Sample, function: Callable[..., Tensor], levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The level nearest to the exact derivative, and where it is beyond doubt."""
    widened = tuple(a.double() if isinstance(a, Tensor) else a for a in sample.args)
    return oracle_factor(lambda x: function(x, *widened, **sample.kwargs), sample.x, levels)


def assert_coded(found: Tensor, direction: Tensor, factor: tuple[Tensor, Tensor]) -> None:
    levels, certain = factor
    expected = direction * levels
    tolerance = 2 * torch.finfo(found.dtype).eps * expected.abs() + 1e-6
    assert ((found - expected).abs() <= tolerance)[certain].all()
    assert certain.sum() >= 0.98 * certain.numel()


def supported(*dtypes: torch.dtype) -> list[tuple[str, torch.dtype]]:
    return [(name, dtype) for name in NAMES for dtype in dtypes if dtype in OPS[name].supported_dtypes("cpu")]


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("name", "dtype"), supported(torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_drop_ins(name: str, dtype: torch.dtype) -> None:
    torchs, ours = getattr(F, name), partial(getattr(fewbit_fx.functional, name), levels="typical")
    for sample in samples(name, dtype):
        x = sample.x.detach().requires_grad_()
        with torch.compiler.set_stance("force_eager"):
            y = sample(ours, x)
            direction = torch.randn(y.shape, dtype=torch.float32).to(dtype)
            (found,) = torch.autograd.grad(y, x, direction)
        expected = sample(torchs, x)
        assert torch.equal(y, expected)
        (exact,) = torch.autograd.grad(expected, x, direction)
        assert found.shape == x.shape
        assert found.dtype == dtype
        levels = drop_in_levels(name, sample)
        if levels is None or bits_for(levels) == 1:
            torch.testing.assert_close(found, exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
        else:
            assert_coded(found, direction, nearest_level(sample, torchs, levels))
        SAMPLES_PASSED["drop-ins"] += 1


def drop_in_levels(name: str, sample: Sample) -> tuple[float, ...] | None:
    """Levels of the drop-in's codebook, or None where it is exact."""
    if name in ("prelu", "rrelu"):
        return None
    try:
        return fewbit_fx.codebook(lambda x: getattr(F, name)(x, *sample.args, **sample.kwargs), 3, "typical").levels
    except fewbit_fx.NotCodableError:  # such as hardtanh of an empty interval
        return None


@pytest.mark.one_in(12)
@pytest.mark.parametrize(("name", "dtype"), supported(torch.float32, torch.bfloat16))
def test_backend(name: str, dtype: torch.dtype) -> None:
    """The backend's graphs in plain ATen; the forward and one-bit gradients equal those without fewbit."""
    function = getattr(F, name)
    for sample in samples(name, dtype, variants=dtype == torch.float32):
        results = []
        for config in (PLAIN, CODED):
            torch.compiler.reset()
            records: list[GraphRecord] = []
            partitioner = FewBitPartitioner(config, records.append)

            def compiler(gm: Any, inputs: Any, partitioner: FewBitPartitioner = partitioner) -> Any:
                return partition_only(gm, inputs, partitioner)

            def run(x: Tensor, sample: Sample = sample) -> Tensor:
                return function(x, *sample.args, **sample.kwargs)

            x = sample.x.detach().requires_grad_()
            torch.manual_seed(0)
            y = torch.compile(run, backend=compiler, dynamic=False)(x)
            direction = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
            results.append((y, torch.autograd.grad(y, x, direction)[0], direction, records))
        (expected, exact, _, _), (y, found, direction, records) = results
        assert torch.equal(y, expected)
        levels = [s.levels for r in records for s in r.sites if s.levels]
        if levels:
            assert_coded(found, direction, nearest_level(sample, function, levels[0]))
        else:
            assert torch.equal(found, exact)
        SAMPLES_PASSED["backend"] += 1
