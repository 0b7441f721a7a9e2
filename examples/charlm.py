"""A language model of characters: a small transformer that reads the standard library's sources.

    p2p-launch run examples/charlm.py --peers 4 --kill 2@60

The text is that of some fifty modules of Python itself, so it is on every machine, the same for the
same version of Python whatever is installed beside. The last tenth of each module is held out and
never trained on; `bits_per_byte` is what the trained model needs, on average, to tell the next byte
of it. The frequencies of the bytes alone give about 4.5.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import Dataset

from p2p import Task

MODULES = """
    abc argparse ast base64 bisect calendar cmd codecs colorsys configparser contextlib copy csv
    dataclasses difflib enum fileinput fnmatch fractions functools getopt glob gzip heapq io keyword
    linecache mimetypes numbers operator os pickle pprint queue random reprlib sched shelve shlex
    shutil statistics string subprocess textwrap threading timeit tokenize traceback types typing
    uuid warnings weakref
"""
BYTES = 128
"""The vocabulary: ASCII. Other bytes, which are rare in these sources, are read as 127."""


def read_text() -> tuple[Tensor, Tensor]:
    """What is trained on and what is held out, as bytes."""
    train, held_out = [], []
    for module in MODULES.split():
        source = Path(sysconfig.get_path("stdlib"), f"{module}.py").read_bytes()
        text = torch.frombuffer(bytearray(source), dtype=torch.uint8).clamp(max=BYTES - 1).long()
        train.append(text[: len(text) * 9 // 10])
        held_out.append(text[len(text) * 9 // 10 :])
    return torch.cat(train), torch.cat(held_out)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Stretches of the text that overlap by half; the target is the input, one byte later."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context, self.stride = text, context, max(1, context // 2)

    def __len__(self) -> int:
        return (len(self.text) - self.context - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.stride
        window = self.text[start : start + self.context + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    """Causal attention, then a perceptron; each adds to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(self.norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        seen = scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.perceptron(x)


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.byte = nn.Embedding(BYTES, width)
        self.place = nn.Parameter(torch.zeros(context, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.next = nn.Linear(width, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        x = self.byte(text) + self.place[: text.shape[1]]
        return self.next(self.norm(self.blocks(self.dropout(x))))


def loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean over all bytes of the batch, in nats."""
    return cross_entropy(output.flatten(0, 1), target.flatten())


def task(
    steps: int = 300,
    batch_size: int = 96,
    learning_rate: float = 0.01,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    context: int = 32,
    dropout: float = 0.1,
    seed: int = 0,
) -> Task:
    train, held_out = read_text()

    def schedule(step: int) -> float:
        """Up in the first tenth of the steps, then down along half a cosine."""
        warmup = max(1, steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    def evaluate(model: nn.Module) -> dict[str, float]:
        length = len(held_out) // (context + 1) * (context + 1)
        windows = held_out[:length].view(-1, context + 1)
        nats = [loss(model(part[:, :-1]), part[:, 1:]) * len(part) for part in windows.split(64)]
        return {"bits_per_byte": float(sum(nats)) / len(windows) / math.log(2)}

    return Task(
        model=Transformer(width, depth, heads, context, dropout),
        dataset=Windows(train, context),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        batch_size=batch_size,
        steps=steps,
        seed=seed,
        evaluate=evaluate,
    )
