"""No extra kernels on a GPU: encode and decode ride in the kernels that run anyway."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit_fx.config import FewBitConfig
from fewbit_fx.reporting.words import action

pytest.importorskip("triton", reason="Triton, which generates a GPU's kernels, is not installed")
if not hasattr(torch._inductor.config, "loop_reindexing_after_fusion"):
    pytest.skip(
        "Inductor of this torch cannot reindex loops to fuse them: on a GPU the encode is a kernel of its own",
        allow_module_level=True,
    )
from bench.offline_triton import Generated, compile_offline, generate
from bench.transformer import Block, BlockConfig, plain_attention

PLAIN = FewBitConfig(recipe="derivatives", derivatives=False, masks=False, strict=True)


def both(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, bits: int = 3) -> tuple[Generated, Generated]:
    """The kernels without and with fewbit."""
    return tuple(
        generate(model, shape, dtype, c) for c in (PLAIN, FewBitConfig(recipe="derivatives", bits=bits, strict=True))
    )  # type: ignore[return-value]


def mlp(activation: Callable[[Tensor], Tensor], frozen: bool = False) -> nn.Module:
    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(256, 1024)
            self.down = nn.Linear(1024, 256).requires_grad_(not frozen)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(activation(self.up(x)))

    return MLP()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gelu_between_linear_layers(dtype: torch.dtype, bits: int) -> None:
    """Forward: x in, y and b planes out, in one kernel. Backward: g and b planes in.

    In float32, where x is not saved, Inductor takes the bias from the matrix product into that kernel.
    """
    plain, fewbit = both(mlp(F.gelu), (2048, 256), dtype, bits)
    assert [action(s) for s in fewbit.record.sites] == [f"coded in {bits} bit{'s' if bits > 1 else ''}"]
    assert fewbit.counts == plain.counts
    ((before,), (after,)) = plain.forward, fewbit.forward
    assert (before.loads, before.stores) == (1, 1)
    assert (after.loads, after.stores) == (2 if dtype == torch.float32 else 1, 1 + bits)
    assert any("erf" in kernel.source for kernel in plain.backward)
    (decoding,) = (kernel for kernel in fewbit.backward if "<<" in kernel.source)
    assert (decoding.loads, decoding.stores) == (1 + bits, 1)
    assert all("erf" not in kernel.source for kernel in fewbit.backward)


@pytest.mark.parametrize("activation", [F.gelu, F.elu], ids=["gelu", "elu"])
def test_levels_from_a_sample_take_four_small_kernels(activation: Callable[[Tensor], Tensor]) -> None:
    """The sample, sorted; the rises of f'; their sums; the levels. The rest is as with levels that are known before."""
    model, shape = mlp(activation, frozen=True), (2048, 256)
    typical, sampled = (
        generate(model, shape, torch.bfloat16, FewBitConfig(recipe="derivatives", levels=levels, strict=True))
        for levels in ("typical", "sampled")
    )
    assert len(sampled.forward) == len(typical.forward) + 4
    assert len(sampled.backward) == len(typical.backward)
    assert sampled.forward[-1].stores == 1 + 3


SURROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout after": lambda x: F.dropout(F.gelu(x), 0.1),
    "dropout before": lambda x: F.gelu(F.dropout(x, 0.1)),
    "bias and scale": lambda x: 0.5 * F.silu(x + torch.ones(1024, dtype=x.dtype)),
    "wider": lambda x: F.gelu(x.float()).to(x.dtype),
    "ReLU and dropout": lambda x: F.dropout(F.relu(x), 0.1),
    "two functions": lambda x: torch.tanh(x).sin(),
    "softplus": F.softplus,
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings(name: str, frozen: bool) -> None:
    plain, fewbit = both(mlp(SURROUNDINGS[name], frozen), (2048, 256), torch.bfloat16)
    assert all(not s.is_exact for s in fewbit.record.sites)
    assert fewbit.counts == plain.counts


@pytest.mark.one_in(8)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lora", [False, True])
def test_a_transformer_block(dtype: torch.dtype, dropout: float, lora: bool) -> None:
    """Layer norm, residual sums, dropout: the same number of kernels, forward and backward."""
    block = Block(BlockConfig(dropout=dropout, attention=plain_attention))
    if lora:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name.startswith("attention"))
    plain, fewbit = both(block, (8, 256, 256), dtype)
    assert [action(s) for s in fewbit.record.sites if s.function == "gelu"] == ["coded in 3 bits"]
    assert fewbit.record.fewbit_bytes < 0.9 * fewbit.record.plain_bytes
    assert fewbit.counts == plain.counts


PASSED_OVER = 16  # bytes spilled by a configuration, above which Inductor takes another


@pytest.mark.one_in(3)
@pytest.mark.parametrize("bits", [1, 3, 4])
@pytest.mark.parametrize("activation", [F.gelu, F.silu])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_kernel_spills_on_sm90(dtype: torch.dtype, activation: Callable[[Tensor], Tensor], bits: int) -> None:
    """In none of the configurations that Inductor would try but the largest, which it passes over where it spills.

    The largest holds the words of all planes in registers, and those of what
    is not finite beside them.
    """
    generated = generate(
        mlp(activation), (2048, 256), dtype, FewBitConfig(recipe="derivatives", bits=bits, strict=True)
    )
    assert all(not site.is_exact for site in generated.record.sites)
    for kernel in (*generated.forward, *generated.backward):
        *smaller, largest = compile_offline(kernel)
        assert all(r.spilled <= PASSED_OVER for r in smaller or [largest]), kernel.name


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(256, 896, bias=False), nn.Linear(256, 896, bias=False)
        self.down = nn.Linear(896, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("bits", range(3, 9))
def test_a_gated_mlp_with_codes_of_values(bits: int) -> None:
    """Gate and up are coded in the kernel that multiplies them, and decoded in the one that differentiates that."""
    own = FewBitConfig(recipe="exact", recompute=False, strict=True)
    coded = FewBitConfig(value_bits=bits, strict=True, skip=("linear_input",))  # x, which is an argument here
    plain, fewbit = (generate(GatedMLP(), (2048, 256), torch.bfloat16, c) for c in (own, coded))
    assert [s.bits for s in fewbit.record.sites if s.form == "values"] == [bits, bits]
    assert plain.counts == (1, 1)
    assert len(fewbit.forward) == 1
    (kernel,) = fewbit.forward
    words = 1 if bits == 8 else bits
    assert (kernel.loads, kernel.stores) == (2, 1 + 2 * (words + 1))
    (kernel,) = fewbit.backward
    assert kernel.stores == 3  # the gradients of gate and up, and the product for the last weight
    assert " % " not in kernel.source  # remainders, of an element's place in its row, are most of a decode's time


class Attention(nn.Module):
    """In plain operations; of scores that no pass of Inductor's takes for those of a fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.last = (nn.Linear(256, 256, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(8, 256, 4, 64).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = torch.tanh(q @ k.mT / 8).softmax(-1) @ v
        return self.last(y.transpose(1, 2).reshape(2048, 256))  # type: ignore[no-any-return]


def test_a_softmax_with_codes_of_its_probabilities() -> None:
    """The sum of a row of decoded probabilities rides with that of its gradient; their encode has blocks, not rows."""
    own = FewBitConfig(recipe="exact", recompute=False, strict=True)
    coded = own.updated({"softmax_bits": 8})
    plain, fewbit = (generate(Attention(), (2048, 256), torch.bfloat16, c) for c in (own, coded))
    assert [s.bits for s in fewbit.record.sites if s.form == "values"] == [8]
    assert len(fewbit.backward) == len(plain.backward)
    assert len(fewbit.forward) == len(plain.forward) + 1


class Loss(nn.Module):
    """Of classes of which a GPU's kernels go through in a loop."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(256, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits, labels = self.head(x), torch.arange(len(x), device=x.device)
        return F.cross_entropy(logits.float(), labels) * 2  # what it is itself shares memory with a view of it


@pytest.mark.parametrize("classes", [32000, 50257])
def test_decoded_probabilities_of_a_loss_are_not_written(classes: int) -> None:
    """A decode of more than some thirty operations would be: float32 of all tokens and classes, the peak of a step."""
    own = FewBitConfig(recipe="exact", recompute=False, strict=True)
    plain, fewbit = (
        generate(Loss(classes), (1024, 256), torch.bfloat16, c) for c in (own, own.updated({"softmax_bits": 8}))
    )
    assert [s.bits for s in fewbit.record.sites if s.form == "values"] == [8]
    assert [k.stores for k in fewbit.backward] == [k.stores for k in plain.backward] == [1]
