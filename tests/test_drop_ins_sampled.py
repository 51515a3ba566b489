"""Drop-ins with levels fitted to a sample of each tensor: right at every size and stride, never more than is said.

What they give is compared with ``SampledScheme.coded`` of the whole tensor, in plain eager PyTorch without planes. Most
tests run the kernels' operations eagerly, by which both are equal bit for bit; the last ones compile them.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close_to_oracle, derivative, sampled_factor, sampled_scheme
from test_drop_ins import ONE_BIT, pair, saved_bytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacrev, vjp, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fewbit_fx
import fewbit_fx.functional
import fewbit_fx.nn
from fewbit_fx.codec.sampled_levels import SampledScheme
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.torch_private.inductor import partition_only

# One of each axis on which levels lie.
FUNCTIONS = {"GELU": F.gelu, "SiLU": F.silu, "Tanh": torch.tanh, "Mish": F.mish, "Hardswish": F.hardswish}
LEVELS = {"GELU": 4, "SiLU": 4, "Tanh": 8, "Mish": 8, "Hardswish": 8}  # that are saved at 3 bits
SIZES = [(1,), (31,), (33,), (4097,), (64, 512), (3, 5, 7, 4), ()]


@pytest.fixture
def eager_kernels() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def module(name: str, **options: Any) -> nn.Module:
    made: nn.Module = getattr(fewbit_fx.nn, name)(**options)
    return made


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(function(x), x, direction)
    return found


def expected_gradient(name: str, x: Tensor, direction: Tensor, bits: int = 3) -> Tensor:
    factor = sampled_factor(FUNCTIONS[name], x, bits)
    return (direction.to(factor.dtype) * factor).to(x.dtype)


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_has_the_levels_of_a_sample_of_the_whole_tensor(name: str, dtype: torch.dtype) -> None:
    for shape in SIZES:
        for spread in (0.01, 2.0):
            x, direction = (spread * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
            found = gradient(module(name), x, direction)
            assert (found.dtype, found.shape) == (x.dtype, x.shape)
            assert torch.equal(found, expected_gradient(name, x, direction)), (shape, spread)


@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_other_numbers_of_bits(bits: int) -> None:
    for name in ("GELU", "Mish"):
        x, direction = torch.randn(70, 70), torch.randn(70, 70)
        found = gradient(module(name, bits=bits), x, direction)
        assert torch.equal(found, expected_gradient(name, x, direction, bits))


@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(9, 80).t(),
        torch.randn(3, 5, 70)[:, ::2],
        torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last),
        torch.randn(4, 1, 6).expand(4, 300, 6),
        torch.randn(6, 5, 40).permute(1, 2, 0),
    ],
    ids=["transposed", "with gaps", "channels last", "expanded", "permuted"],
)
def test_strides(x: Tensor) -> None:
    """The sample is drawn by the shape, and the codes lie in the order in memory."""
    direction = torch.randn(x.shape)
    for name in FUNCTIONS:
        found = gradient(module(name), x, direction)
        assert torch.equal(found, expected_gradient(name, x, direction)), name
    if x.dim() == 4:
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize("name", ["GELU", "SiLU", "Tanh"])
def test_errors_are_within_8_percent_however_narrow_or_wide_x_is(name: str) -> None:
    errors = {}
    for spread in (0.01, 0.1, 1.0, 10.0):
        squared, power = 0.0, 0.0
        for _ in range(8):  # tensors, each with levels of its own
            x = spread * torch.randn(64, 512)
            exact = derivative(FUNCTIONS[name], x)
            squared += (gradient(module(name), x, torch.ones(64, 512)) - exact).square().sum().item()
            power += exact.square().sum().item()
        errors[spread] = (squared / power) ** 0.5
    assert max(errors.values()) <= 0.08
    assert errors[0.01] <= 0.006
    x = 0.01 * torch.randn(64, 512)
    exact = derivative(FUNCTIONS[name], x)
    typical = gradient(module(name, levels="typical"), x, torch.ones(64, 512)) - exact
    assert typical.norm() / exact.norm() > 4 * errors[0.01], "what sampling is for"


def words_and_levels(name: str, bits: int, x: Tensor) -> int:
    """Bytes of words and levels."""
    scheme = sampled_scheme(FUNCTIONS[name], bits)
    assert scheme.table_numel == 2**bits // (2 if scheme.mirrored else 1)
    return 4 * bits * -(-x.numel() // 32) + scheme.table_numel * max(x.element_size(), 4)


@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["GELU", "Mish"])
def test_saved_bytes(name: str, bits: int) -> None:
    for shape in ((64, 512), (4097,), (33,), (1,), ()):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.randn(shape, dtype=dtype, requires_grad=True)
            _, total = saved_bytes(lambda x=x: module(name, bits=bits)(x))
            assert total == words_and_levels(name, bits, x)


@pytest.mark.usefixtures("eager_kernels")
def test_an_empty_tensor_has_no_sample() -> None:
    x = torch.randn(0, 4, requires_grad=True)
    y, total = saved_bytes(lambda: module("GELU")(x))
    assert total == 0
    assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 4)


@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize(
    ("name", "bits"), [*((name, 3) for name in ONE_BIT if name not in ("PReLU", "RReLU")), ("GELU", 5)]
)
def test_levels_that_are_exact_and_more_than_4_bits_are_as_without_a_sample(name: str, bits: int) -> None:
    x, direction = 0.3 * torch.randn(40, 70), torch.randn(40, 70)
    results = []
    for levels in ("sampled", "typical"):
        ours, _ = pair(name, bits, levels)
        leaf = x.clone().requires_grad_()
        y, total = saved_bytes(lambda leaf=leaf, ours=ours: ours(leaf))
        results.append((total, torch.autograd.grad(y, leaf, direction)[0]))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize("name", ["GELU", "Tanh", "Hardswish"])
def test_what_is_not_finite(name: str) -> None:
    """It spoils no level, and among the finite ones only those in its own word, by the code beside their own."""
    ours, torchs = pair(name) if name != "GELU" else (module("GELU"), nn.GELU())
    x = torch.randn(64, 256)
    bad = torch.randperm(x.numel())[:40]
    x.view(-1)[bad] = torch.tensor([float("nan"), float("inf"), float("-inf"), -float("nan")]).repeat(10)
    direction = torch.randn(64, 256)
    found, exact = gradient(ours, x, direction), gradient(torchs, x, direction)
    assert torch.equal(found.isfinite(), exact.isfinite())
    expected = expected_gradient(name, x, direction)
    assert (found != expected)[exact.isfinite()].sum() <= 31 * 40


@pytest.mark.usefixtures("eager_kernels")
def test_under_vmap_each_sample_has_levels_of_its_own() -> None:
    x = torch.tensor([0.01, 1.0, 10.0])[:, None] * torch.randn(3, 700)
    found = vmap(grad(lambda v: fewbit_fx.functional.silu(v).sum()))(x)
    for row, values in zip(found, x, strict=True):
        assert torch.equal(row, sampled_factor(F.silu, values, 3))


silu = fewbit_fx.functional.silu


@pytest.mark.usefixtures("eager_kernels")
def test_transforms() -> None:
    x = torch.randn(70)
    expected = sampled_factor(F.silu, x, 3)
    _, pullback = vjp(silu, x)
    assert torch.equal(vmap(pullback)(torch.eye(70))[0], torch.diag(expected))
    assert torch.equal(jacrev(silu)(x), torch.diag(expected))
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad(lambda v: grad(lambda w: silu(w).sum())(v).sum())(x)


def test_dispatch_modes_see_single_operations() -> None:
    x = torch.randn(12, 70, requires_grad=True)
    with FlopCounterMode(display=False):
        (found,) = torch.autograd.grad(silu(x).sum(), x)
    assert torch.equal(found, sampled_factor(F.silu, x, 3))


@pytest.mark.usefixtures("eager_kernels")
def test_selective_checkpointing() -> None:
    model, x = nn.Sequential(nn.Linear(70, 30), module("SiLU"), nn.Linear(30, 5)), torch.randn(12, 70)
    (expected,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    assert torch.equal(torch.autograd.grad(y.square().sum(), model[0].weight)[0], expected)


@pytest.mark.usefixtures("eager_kernels")
def test_nothing_of_fake_tensors_stays_behind() -> None:
    """The positions of a sample are kept for each shape, those of real tensors only."""
    shape = (8, 101)
    with FakeTensorMode() as mode:
        fake = torch.randn(shape, requires_grad=True)
        silu(fake).sum().backward()
        assert fake.grad is not None
        assert (fake.grad.shape, fake.grad.fake_mode) == (fake.shape, mode)
    meta = torch.randn(shape, device="meta", requires_grad=True)
    silu(meta).sum().backward()
    assert meta.grad is not None
    assert meta.grad.device.type == "meta"
    x = torch.randn(shape)
    assert torch.equal(gradient(silu, x, torch.ones(shape)), sampled_factor(F.silu, x, 3))


# Options.


@pytest.mark.parametrize("levels", ["x", 3, None])
def test_bad_levels(levels: Any) -> None:
    x = torch.ones(3, requires_grad=True)
    attempts: list[Callable[[], Any]] = [
        lambda: fewbit_fx.nn.GELU(levels=levels),
        lambda: fewbit_fx.nn.Pointwise(torch.atan, levels=levels),
        lambda: fewbit_fx.functional.gelu(x, levels=levels),
        lambda: fewbit_fx.functional.pointwise(torch.atan, x, levels=levels),
        lambda: fewbit_fx.functional.prelu(x, torch.ones(1), levels=levels),
        lambda: fewbit_fx.functional.rrelu(x, training=True, levels=levels),
    ]
    if levels is not None:  # to convert, that is as the recipe says
        attempts.append(lambda: fewbit_fx.convert(nn.Sequential(), levels=levels))
    for attempt in attempts:
        with pytest.raises((TypeError, ValueError), match=r"'levels' is .* 'sampled', 'typical'"):
            attempt()


def test_modules_say_their_levels_and_travel() -> None:
    made = [fewbit_fx.nn.GELU(levels="typical"), fewbit_fx.nn.Pointwise(torch.atan, 2, "typical"), fewbit_fx.nn.SiLU()]
    model = nn.Sequential(*made)
    assert "GELU(approximate='none', bits=3, levels='typical')" in repr(model)
    assert "Pointwise(bits=2, levels='typical')" in repr(model)
    assert "SiLU(bits=3)" in repr(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(other) == repr(model)
        assert [m.levels for m in other] == ["typical", "typical", "sampled"]
        assert other[1]._coded.scheme == made[1]._coded.scheme
    made[1].levels = "sampled"
    assert isinstance(made[1]._coded.scheme, SampledScheme)
    assert not model.state_dict()


@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, "sampled"),
        ({"levels": "typical"}, "typical"),
        ({"recipe": "derivatives"}, "typical"),
        ({"recipe": "derivatives", "levels": "sampled"}, "sampled"),
    ],
)
def test_convert(options: dict[str, str], levels: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu)
    model = nn.Sequential(nn.GELU(), nn.SiLU(), layer)
    assert fewbit_fx.convert(model, **options).keys() == {"0", "1", "2.activation"}
    assert (model[0].levels, model[1].levels) == (levels, levels)
    x, direction = 0.01 * torch.randn(40, 70), torch.randn(40, 70)
    expected = gradient(module("GELU", levels=levels), x, direction)
    for converted in (model[0], layer.activation):
        assert torch.equal(gradient(converted, x, direction), expected)
    assert torch.equal(expected, expected_gradient("GELU", x, direction)) == (levels == "sampled")


def test_convert_hugging_faces_activations() -> None:
    activations = pytest.importorskip("transformers.activations", reason="Hugging Face transformers is not installed")
    for levels in ("sampled", "typical"):
        model = nn.Sequential(copy.deepcopy(activations.ACT2FN["gelu_new"]))
        fewbit_fx.convert(model, levels=levels)
        assert model[0].levels == levels


# Within torch.compile.


def network(scale: float = 0.02) -> nn.Sequential:
    """Frozen: all that is saved are codes."""
    model = nn.Sequential(
        nn.Linear(32, 64),
        fewbit_fx.nn.GELU(),
        nn.Linear(64, 64),
        fewbit_fx.nn.Pointwise(torch.tanh),
        nn.Linear(64, 64),
        fewbit_fx.nn.GELU(),
        nn.Linear(64, 8),
    )
    model.requires_grad_(False)[0].weight.mul_(scale)
    return model


@pytest.mark.slow
def test_within_torch_compile_with_dynamic_shapes() -> None:
    model, x = network(), torch.randn(128, 32, requires_grad=True)
    y = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)(x)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    with torch.compiler.set_stance("force_eager"):
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    assert close_to_oracle([found], [expected])


@pytest.mark.slow
def test_the_backend_leaves_their_codes_as_they_are() -> None:
    model, records = network(), []
    config = fewbit_fx.FewBitConfig(min_numel=0, strict=True)
    partitioner = FewBitPartitioner(config, records.append)

    def backend(gm: Any, inputs: Any) -> Any:
        return partition_only(gm, inputs, partitioner)

    x = torch.randn(128, 32, requires_grad=True)
    y = torch.compile(model, backend=backend, fullgraph=True)(x)
    (record,) = records
    codes = 3 * 128 * 64 * 3 // 8 + 4 * (2 * LEVELS["GELU"] + LEVELS["Tanh"])
    assert not [site for site in record.sites if not site.is_exact]
    assert record.plain_bytes == record.fewbit_bytes == codes
    (found,) = torch.autograd.grad(y.square().sum(), x)
    with torch.compiler.set_stance("force_eager"):
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    assert close_to_oracle([found], [expected])


def test_what_may_be_empty_is_left_exact_within_torch_compile() -> None:
    x = torch.randn(100, requires_grad=True)
    (exact,) = torch.autograd.grad(F.gelu(x[x > 0]).sum(), x)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(lambda v: fewbit_fx.functional.gelu(v[v > 0]).sum(), backend="aot_eager", fullgraph=True)
        (found,) = torch.autograd.grad(run(x), x)
    assert torch.equal(found, exact)
    run = torch.compile(lambda v: fewbit_fx.functional.gelu(v * 1), backend="aot_eager", fullgraph=True, dynamic=False)
    empty = torch.randn(0, 3, requires_grad=True)
    assert torch.autograd.grad(run(empty).sum(), empty)[0].shape == (0, 3)


# Compiled kernels.


def test_compiled_kernels() -> None:
    """Of a tensor with whole blocks and a rest, and of a small one; where all is rounding, codes may differ."""
    for shape, spread in (((33, 700), 1.0), ((31,), 1.0), ((33, 700), 0.1)):
        x, direction = spread * torch.randn(shape), torch.randn(shape)
        leaf = x.clone().requires_grad_()
        y, total = saved_bytes(lambda leaf=leaf: module("GELU")(leaf))
        assert total == words_and_levels("GELU", 3, x)
        (found,) = torch.autograd.grad(y, leaf, direction)
        assert close_to_oracle([found], [expected_gradient("GELU", x, direction)])
