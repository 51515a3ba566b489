"""What one part of a model saves for the backward: bits for each token and feature, without and with fewbit.

python -m bench.patterns

Each part stands between frozen linear layers, which save nothing themselves, so that what is counted is the part's own.
Nothing is compiled to kernels: the graphs are cut and rewritten, and run by plain ATen operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import fewbit_fx
from bench.backends import BUDGET, saved_bytes_within_budget
from bench.command import Command, parser_of
from bench.result_file import File, markdown, measured_with

BATCH, TOKENS, WIDTH, INNER, HEADS, VOCABULARY = 4, 128, 256, 1024, 4, 512
RECIPES = ("exact", "derivatives", "default", "lean")
INDUCTOR, BUDGETED = "torch.compile", f"budget {BUDGET}"


class Gated(nn.Module):
    """A gated MLP, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Causal attention with its four projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(BATCH, TOKENS, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter in float32, as PEFT makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        adapted = self.adapter(x.to(self.adapter[0].weight.dtype))
        return self.base(x) + adapted.to(x.dtype)  # type: ignore[no-any-return]


class Picture(nn.Module):
    """A convolution with batch norm and ReLU, of the tokens as a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        picture = x.view(BATCH, 8, -1, WIDTH).permute(0, 3, 1, 2)
        return F.relu(self.norm(self.conv(picture))).permute(0, 2, 3, 1).reshape(x.shape)


class Head(nn.Module):
    """Logits and the cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).flatten(0, 1).float(), torch.arange(BATCH * TOKENS) % VOCABULARY)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))


def _frozen(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().requires_grad_(False)


PATTERNS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    f"linear, GELU, linear ({INNER // WIDTH} times as wide)": _mlp,
    "linear, GELU, linear, frozen (LoRA elsewhere)": _frozen(_mlp),
    f"gated MLP, SwiGLU ({INNER // WIDTH} times as wide)": Gated,
    "gated MLP, frozen": _frozen(Gated),
    "LayerNorm, linear": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
    "RMSNorm, linear": lambda: nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
    "attention": Attention,
    "attention, frozen": _frozen(Attention),
    "LoRA adapter in float32": Adapted,
    "ReLU, dropout": lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.1)),
    "convolution, batch norm, ReLU": Picture,
    f"logits ({VOCABULARY // WIDTH} times as many), cross entropy": Head,
}


class Between(nn.Module):
    """A part between frozen linear layers."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.part = nn.Linear(WIDTH, WIDTH).requires_grad_(False), part
        self.last = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(self.first(x))
        return self.last(y).sum() if y.dim() else y


def measure(name: str) -> dict[str, float]:
    """The bits of one part by what they are saved with, for each token and feature."""
    torch.manual_seed(0)
    model = Between(PATTERNS[name]()).to(torch.bfloat16)
    if isinstance(model.part, Adapted):
        model.part.adapter.float()
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    reports = {recipe: _explained(model, x, recipe) for recipe in RECIPES}
    saved = {
        INDUCTOR: reports[RECIPES[0]].plain_bytes,
        BUDGETED: saved_bytes_within_budget(model, [x]),
        **{recipe: report.fewbit_bytes for recipe, report in reports.items()},
    }
    return {column: 8 * count / x.numel() for column, count in saved.items()}


def _explained(model: nn.Module, x: Tensor, recipe: str) -> fewbit_fx.Report:
    return fewbit_fx.explain(model, x, fewbit_config=fewbit_fx.FewBitConfig(recipe=recipe))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, and show."""
    flags = parser_of("patterns", __doc__).parse_args(arguments)
    notes = ["dtype bfloat16", f"batch {BATCH} x {TOKENS} x {WIDTH}"]
    command = Command.started("patterns", arguments, flags, notes)
    found = {}
    with command.progress(len(PATTERNS)) as show:
        for i, name in enumerate(PATTERNS):
            show(name, i)
            found[name] = measure(name)
    table = Table("", INDUCTOR, BUDGETED, *RECIPES, title="bits saved for each token and feature")
    for name, bits in found.items():
        table.add_row(name, *(f"{value:.1f}" for value in bits.values()))
    command.finish(table, {"patterns": found})


def lines(files: Sequence[File]) -> Iterator[str]:
    """The table of a text, from a file of results."""
    (file,) = files
    columns = (INDUCTOR, BUDGETED, *RECIPES)
    head = ("bits for each token and feature", *columns[:2], *(f'"{recipe}"' for recipe in RECIPES))
    rows = file.data["patterns"].items()
    yield from markdown(head, *([name, *(f"{bits[column]:.1f}" for column in columns)] for name, bits in rows))
    yield f"\n<sub>{measured_with(files)}; bfloat16. `{file.command}`</sub>"


if __name__ == "__main__":
    main()
