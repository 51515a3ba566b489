"""Train with few-bit saved tensors on several processes, by DistributedDataParallel or FSDP2.

    torchrun --nproc-per-node 2 examples/distributed.py  # --mode fsdp: FSDP2, fully_shard

Processes talk by NCCL where each has a GPU, else by gloo. FSDP2 gathers the parameters before each block and frees them
behind it, so that each is compiled by itself; the bytes saved for the backward are then those of one block.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fewbit_fx


class Block(nn.Module):
    """A class of its own: under FSDP2 an nn.Sequential, whose forward is torch's, runs as if it were not compiled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


parser = argparse.ArgumentParser()
parser.add_argument("--mode", choices=("ddp", "fsdp"), default="ddp")
for name, default in (("width", 256), ("blocks", 4), ("batch", 64), ("steps", 10)):
    parser.add_argument(f"--{name}", type=int, default=default)
args = parser.parse_args()
on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # from torchrun
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None)
torch.manual_seed(0)  # the same parameters on each rank
model: nn.Module = nn.Sequential(*(Block(args.width) for _ in range(args.blocks))).to(device)
if args.mode == "fsdp":
    for block in model.children():
        block.compile(backend="fewbit")
        fully_shard(block)
    fully_shard(model)
else:
    model = DistributedDataParallel(torch.compile(model, backend="fewbit"))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(rank := dist.get_rank())  # and data of its own
x = torch.randn(args.batch, args.width, device=device)
for step in range(args.steps):
    (loss := (model(x) - x.roll(1)).square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"rank {rank}  step {step}  loss {loss.item():.4f}\n", end="", flush=True)
saved = fewbit_fx.last_report()
print(f"rank {rank}  saved: inductor {saved.plain_bytes:,}  fewbit {saved.fewbit_bytes:,} bytes\n", end="", flush=True)
dist.destroy_process_group()
