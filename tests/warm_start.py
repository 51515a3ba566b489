"""A process of its own that trains a small model, for tests of what is cached across processes.

    python tests/warm_start.py '{"kill": "..."}' '{"seeds": [0, 7], "rounding": "stochastic", ...}' ...

For each set of options it prints a line of JSON: losses and gradients, the report, and the counters of torch's caches.
With "kill" a child does the same and kills itself on its way.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_fx

CACHES = {
    "inductor": ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass"),
    "aot_autograd": ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass"),
}


class Small(nn.Module):
    """A GELU, dropout and the loss."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.up, self.act, self.drop, self.head = nn.Linear(32, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.drop(self.act(self.up(x)))), y)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(128, 32, generator=generator), torch.randint(8, (128,), generator=generator)


def model(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return Small(dropout)


def counters() -> dict[str, int]:
    return {name: torch._dynamo.utils.counters[group][name] for group, names in CACHES.items() for name in names}


def gradients(net: nn.Module, function: Callable[..., Tensor]) -> tuple[float, Tensor]:
    """The loss of one step, and all gradients as one vector."""
    loss = function(*data())
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def step(net: nn.Module, compiled: Callable[..., Tensor], seed: int) -> dict[str, Any]:
    """The loss of one step, a hash of its gradients, and their relative error if there is no dropout."""
    torch.manual_seed(seed)
    loss, found = gradients(net, compiled)
    _, exact = gradients(net, net)
    digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()
    return {"loss": loss, "gradients": digest, "error": float((found - exact).norm() / exact.norm())}


def kill_myself(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_compiling() -> None:
    """In Inductor, behind the partition."""
    from torch._inductor.graph import GraphLowering

    GraphLowering.compile_to_module = kill_myself  # type: ignore[method-assign]


def kill_while_writing_the_report() -> None:
    """With half of it written."""
    write = Path.write_text

    def write_half(self: Path, text: str) -> int:
        write(self, text[: len(text) // 2])
        return int(kill_myself())

    Path.write_text = write_half  # type: ignore[method-assign, assignment]


def run(options: dict[str, Any]) -> None:
    torch._dynamo.utils.counters.clear()
    torch.compiler.reset()
    if options.pop("garbage", False):
        for file in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "fewbit").iterdir():
            file.write_text('[{"sites":')
    net, seeds = model(options.pop("dropout", 0.1)), options.pop("seeds", [0])
    mine = fewbit_fx.backend(min_numel=0, strict=True, **options)
    compiled = torch.compile(net, backend=mine)
    steps = [step(net, compiled, seed) for seed in seeds]
    print(json.dumps({"steps": steps, "report": mine.last_report().to_dict(), "counters": counters()}), flush=True)


def main() -> None:
    for argument in sys.argv[1:]:
        options = json.loads(argument)
        kill = options.pop("kill", None)
        if kill is None:
            run(options)
        elif (child := os.fork()) == 0:
            {"compiling": kill_while_compiling, "report": kill_while_writing_the_report}[kill]()
            run(options)
            os._exit(0)
        else:
            _, status = os.waitpid(child, 0)
            print(json.dumps({"killed by": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None}), flush=True)


if __name__ == "__main__":
    main()
