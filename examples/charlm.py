"""A small transformer that learns to write Python, byte by byte, on text that is on every machine.

    p2p-launch run examples/charlm.py --peers 4

The text is the standard library's own sources. Every step draws dropout masks: these, too, are the
same whoever computes a shard.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2p import Task

MODULES = (
    "argparse ast bisect calendar cmd code codecs collections/__init__ configparser "
    "contextlib copy csv datetime decimal difflib dis doctest enum fileinput fnmatch "
    "fractions functools gettext glob heapq inspect ipaddress json/decoder json/encoder "
    "locale mailbox mimetypes optparse pathlib pdb pickle platform pprint queue random sched "
    "selectors shelve shlex shutil socket statistics string subprocess tarfile tempfile "
    "textwrap threading timeit tokenize trace traceback types typing unittest/case "
    "unittest/mock urllib/parse uuid warnings weakref zipfile"
)
HELD_OUT = 10
"""Of so many stretches of the text, one is kept for the evaluation."""


def text() -> Tensor:
    """The sources, one after another, as bytes; what a version of Python lacks is left out."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in MODULES.split()]
    sources = [file.read_bytes() for file in files if file.is_file()]
    return torch.frombuffer(bytearray(b"\n".join(sources)), dtype=torch.uint8)


class Windows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Stretches of the text, each with the same stretch one byte further on."""

    def __init__(self, source: Tensor, starts: list[int], length: int) -> None:
        self.source, self.starts, self.length = source, starts, length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self.starts[index]
        stretch = self.source[start : start + self.length + 1].long()
        return stretch[:-1], stretch[1:]


class Block(nn.Module):
    """Causal self-attention and a small network, each on top of what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        mixed = self.attention(self.before_attention(x))
        query, key, value = mixed.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.joined(found.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.network(self.before_network(x)))


class Transformer(nn.Module):
    """Bytes in, the next byte's logits out."""

    def __init__(self, width: int, depth: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads, dropout) for _ in range(depth)])
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places.weight[: x.shape[1]]
        return self.out(self.norm(self.blocks(self.dropout(self.bytes(x) + places))))


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def task(
    steps: int = 300,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    context: int = 64,
    dropout: float = 0.1,
    seed: int = 0,
) -> Task:
    source = text()
    starts = list(range(0, len(source) - context - 1, context))
    held_out = Windows(source, starts[::HELD_OUT][:64], context)
    rest = [start for number, start in enumerate(starts) if number % HELD_OUT]

    def evaluate(model: nn.Module) -> dict[str, float]:
        stretches = [held_out[index] for index in range(len(held_out))]
        inputs, targets = (torch.stack(each) for each in zip(*stretches, strict=True))
        return {"bits_per_byte": loss(model(inputs), targets).item() / math.log(2)}

    def warm_up_and_decay(step: int) -> float:
        warm_up = max(1, steps // 10)
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))

    return Task(
        model=Transformer(width, depth, heads, context, dropout),
        dataset=Windows(source, rest, context),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_decay),
        batch_size=batch_size,
        steps=steps,
        seed=seed,
        evaluate=evaluate,
    )
