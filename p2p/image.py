"""The bytes of a training state: one msgpack tree and the raw memory of its tensors.

    "MAYFLY" 0 version | length of the tree: 8 bytes, little-endian | tree | tensors, one by one

The tree is [step, layout, table, optimizer, scheduler]. `table` has dtype, shape and strides of
each tensor; the first is the model's flat buffer, whose entries `layout` names. The rest are those
of the optimizer and the scheduler, in the order of their first mention. The same values give the
same bytes: mappings are sorted by key.

In a tree, lists are [tag, …]; everything else stands for itself. Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from math import prod
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import msgpack
import numpy as np
import torch
from torch import Tensor

from p2p.flat import is_dense

MAGIC = b"MAYFLY\x00\x01"
_HEADER = struct.Struct("<8sQ")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": Counter,
}
_MAPPING_TYPES: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter"}
_ATOMS = frozenset({type(None), bool, float, str, bytes})
_CONSTANT = _ATOMS | {int}
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)
_INTEGERS = range(-(1 << 63), 1 << 63)
Part = bytes | memoryview


class Unsupported(TypeError):
    """A value that an image cannot hold; `path` leads to it."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.path: list[str] = []

    def __str__(self) -> str:
        return f"{'.'.join(reversed(self.path))} is {self.what}"


class Branch(NamedTuple):
    """A value as it was last written.

    It is written so while its `objects` and their `forms` are the same, and its tensors would get
    the same numbers. `objects` keeps the tensors alive, so that their ids in `numbers` stay theirs.
    """

    objects: list[Any]
    forms: list[Any]
    numbers: dict[int, int]
    packed: bytes
    table: list[bytes]
    parts: list[Part]


class TreeWriter:
    """Turns values into trees and collects the tensors in them."""

    def __init__(
        self, foreign: range = range(0), remembered: Mapping[Any, Branch] | None = None
    ) -> None:
        """`foreign`: addresses that no tensor may lie at, since its bond to them would be lost;
        `remembered` are the `branches` of the last writer with the same ones, which save time."""
        self.table: list[bytes] = []
        self.parts: list[Part] = []
        self.branches: dict[Any, Branch] = {}
        self._foreign = foreign
        self._remembered = remembered or {}
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []
        self._copies = 0

    def packed(self, owner: str, value: Any) -> bytes:
        """The tree of `value`, of whose entries `branches` will have those that can be remembered.

        Raises Unsupported.
        """
        if type(value) is not dict:
            return _packb(self.tree(value))
        name, *trees = self._mapping("dict", value, partial(self._branch, owner))
        keys, entries = map(_packb, trees[0::2]), trees[1::2]
        return array([_packb(name), *chain.from_iterable(zip(keys, entries, strict=True))])

    def _branch(self, owner: str, key: Any, value: Any) -> bytes:
        if type(value) in _CONSTANT:
            return _packb(self.tree(value))
        objects: list[Any] = []
        tensors: list[Tensor] = []
        is_constant = _take_stock(value, objects, tensors)
        known = self._remembered.get((owner, key))
        first, first_part, copies = len(self.table), len(self.parts), self._copies
        if (
            known is not None
            and is_constant
            and _are_same(objects, known.objects)
            and _forms(tensors) == known.forms
            and self._would_number(known)
        ):
            self._numbers |= known.numbers
            self._kept += tensors
            self.table += known.table
            self.parts += known.parts
            self.branches[owner, key] = known
            return known.packed
        packed = _packb(self.tree(value))
        table = self.table[first:]
        numbers = {id(tensor): self._numbers[id(tensor)] for tensor in tensors}
        if is_constant and len(numbers) == len(table) and self._copies == copies:
            self.branches[owner, key] = Branch(
                objects, _forms(tensors), numbers, packed, table, self.parts[first_part:]
            )
        return packed

    def _would_number(self, branch: Branch) -> bool:
        """Whether its tensors would get the numbers that they had."""
        first = len(self.table)
        starts_there = min(branch.numbers.values(), default=first) == first
        return starts_there and self._numbers.keys().isdisjoint(branch.numbers)

    def tree(self, value: Any) -> Any:
        """Raises Unsupported."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is int:
            return value if value in _INTEGERS else ["integer", str(value)]
        if isinstance(value, Tensor):
            return ["tensor", self._number(value)]
        if kind is list or kind is tuple:
            return [kind.__name__, *self._items(value)]
        if kind in _MAPPING_TYPES:
            return self._mapping(_MAPPING_TYPES[kind], value, lambda key, entry: self.tree(entry))
        if kind is set:
            return ["set", *self._items(sorted(value, key=_order))]
        if isinstance(value, np.generic):
            return ["scalar", value.dtype.str, value.tobytes()]
        if isinstance(value, _FUNCTIONS):
            # training does not change it; a fresh object has its own
            return ["function"]
        raise Unsupported(f"of type {kind.__name__}, which cannot be carried from peer to peer")

    def _items(self, values: Sequence[Any]) -> list[Any]:
        trees = []
        for place, value in enumerate(values):
            try:
                trees.append(self.tree(value))
            except Unsupported as error:
                error.path.append(str(place))
                raise
        return trees

    def _mapping(
        self, name: str, value: dict[Any, Any], write: Callable[[Any, Any], Any]
    ) -> list[Any]:
        trees: list[Any] = [name]
        for key in sorted(value, key=_order):
            try:
                trees.append(self.tree(key))
                trees.append(write(key, value[key]))
            except Unsupported as error:
                error.path.append(str(key))
                raise
        return trees

    def _number(self, tensor: Tensor) -> int:
        # one object mentioned twice (a learning rate that groups share) is one when read, too
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._numbers[id(tensor)] = len(self.table)
            self._kept.append(tensor)
            self._add(tensor)
        return number

    def _add(self, tensor: Tensor) -> None:
        name = _DTYPE_NAMES.get(tensor.dtype)
        if name is None or tensor.layout != torch.strided or not tensor.is_cpu:
            raise Unsupported(f"a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}")
        elements = tensor.numel()
        if elements and tensor.data_ptr() in self._foreign:
            raise Unsupported("a tensor in the model's own memory; it must be a copy")
        if tensor.requires_grad:
            tensor = tensor.detach()
        is_contiguous = tensor.is_contiguous()
        if not is_contiguous and not is_dense(tensor):
            tensor, is_contiguous = tensor.contiguous(), True
            self._copies += 1
        self.table.append(row(name, tensor.size(), tensor.stride()))
        if not elements:
            return
        if is_contiguous and name != "bfloat16":
            part = tensor.numpy().data
        else:
            in_memory = tensor.as_strided((elements,), (1,))
            part = in_memory.view(torch.uint8).numpy().data
        self.parts.append(part)


def _take_stock(value: Any, objects: list[Any], tensors: list[Tensor]) -> bool:
    """Lists all on which the tree of `value` depends but what is in its tensors, and them.

    False if it depends on more: where an object that can change is no container that is known.
    """
    kind = type(value)
    if kind in _MAPPING_TYPES:
        objects += (kind, len(value), *value)
        if not _CONSTANT.issuperset(map(type, value)):
            return False
        entries = value.values()
    elif kind is list or kind is tuple:
        objects += (kind, len(value))
        entries = value
    else:
        objects.append(value)
        return kind in _CONSTANT
    for entry in entries:
        if isinstance(entry, Tensor):
            objects.append(entry)
            tensors.append(entry)
        elif not _take_stock(entry, objects, tensors):
            return False
    return True


def _are_same(objects: list[Any], others: list[Any]) -> bool:
    """Integers are compared by value: those above 256 are new objects each time."""
    if len(objects) != len(others):
        return False
    return all(map(is_, objects, others)) or all(
        one is other or (type(one) is int is type(other) and one == other)
        for one, other in zip(objects, others, strict=True)
    )


def _forms(tensors: list[Tensor]) -> list[Any]:
    return [(each.data_ptr(), each.shape, each.stride(), each.dtype) for each in tensors]


class TreeReader:
    """Turns trees back into values, with tensors of their own memory. Raises ValueError."""

    def __init__(self, table: list[Any], body: memoryview) -> None:
        self._tensors: list[Tensor] = []
        start = 0
        for name, shape, strides in table:
            dtype = _DTYPES[name]
            size = prod(shape) * dtype.itemsize
            if start + size > len(body):
                raise ValueError("tensors are missing")
            tensor = torch.empty(shape, dtype=dtype)
            if size:
                elements = tensor.view(-1)
                elements.view(torch.uint8).numpy()[:] = np.frombuffer(
                    body[start : start + size], dtype=np.uint8
                )
                tensor = elements.as_strided(shape, strides)
                if not is_dense(tensor):
                    raise ValueError("strides that do not fit the shape")
            self._tensors.append(tensor)
            start += size
        if start != len(body):
            raise ValueError("bytes without a tensor")

    def value(self, tree: Any, like: Any) -> Any:
        """`like` is what a fresh object has in this place: functions are taken from there."""
        if not isinstance(tree, list):
            return tree
        tag, *rest = tree
        if tag in _MAPPINGS:
            keys = [self.value(each, None) for each in rest[0::2]]
            known = like if isinstance(like, dict) else {}
            values = [
                self.value(each, known.get(key)) for key, each in zip(keys, rest[1::2], strict=True)
            ]
            return _MAPPINGS[tag](dict(zip(keys, values, strict=True)))
        if tag in ("list", "tuple", "set"):
            alike = like if isinstance(like, list | tuple) else ()
            items = [
                self.value(each, alike[place] if place < len(alike) else None)
                for place, each in enumerate(rest)
            ]
            return {"list": list, "tuple": tuple, "set": set}[tag](items)
        if tag == "tensor":
            return self._tensors[rest[0]]
        if tag == "integer":
            return int(rest[0])
        if tag == "scalar":
            return np.frombuffer(rest[1], dtype=np.dtype(rest[0]))[0]
        if tag == "function" and isinstance(like, _FUNCTIONS):
            return like
        raise ValueError(f"no value for {tag!r}")


def header(*fields: bytes) -> bytes:
    """The start of an image, up to its first tensor, of the fields of its tree, packed."""
    tree = array(fields)
    return _HEADER.pack(MAGIC, len(tree)) + tree


@lru_cache(maxsize=4096)
def row(name: str, shape: Sequence[int], strides: Sequence[int]) -> bytes:
    """A tensor's entry of the table, packed."""
    return _packb([name, list(shape), list(strides)])


def array(items: Sequence[bytes]) -> bytes:
    """What is packed, packed as one list."""
    start: bytes = msgpack.Packer().pack_array_header(len(items))
    return start + b"".join(items)


def _packb(tree: Any) -> bytes:
    packed: bytes = msgpack.packb(tree)
    return packed


def split(image: bytes | bytearray | memoryview) -> tuple[Any, memoryview]:
    """The tree and the tensors' bytes. Raises ValueError when these bytes are no image."""
    view = memoryview(image).cast("B")
    if len(view) < _HEADER.size:
        raise ValueError("too short")
    magic, length = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise ValueError("it does not start like a state of this version of Mayfly")
    if length > len(view) - _HEADER.size:
        raise ValueError("the tree is cut off")
    end = _HEADER.size + length
    try:
        tree = msgpack.unpackb(view[_HEADER.size : end], strict_map_key=False, use_list=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"the tree is damaged: {error}") from None
    return tree, view[end:]


def _order(key: Any) -> tuple[str, Any]:
    return type(key).__name__, key
