"""Messages to frames and back, checked field by field.

A message is one frame, the header, and for a kind with a `payload` field a second frame with the
payload's raw bytes, which are never copied here. The header is

    version: 1 byte | xxh3_64 of the body: 8 bytes, little-endian | body: a msgpack array

and the body is the kind's number, the fields in the order of the dataclass, and, where there is a
payload, its length and, unless its way is guarded otherwise, its xxh3_64. How a field is packed
follows from its annotation alone: int (64 bits, signed), float, str, bytes, bool, None, Literal,
`X | None`, tuples of these and frozen dataclasses of these. Nothing that is received is used before
it was checked, and nothing is ever unpickled.

Not here: what the messages mean (`p2p/messages.py`), and how they travel (`link.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgpack
from xxhash import xxh3_64_intdigest

VERSION = 1
HEADER_LIMIT_BYTES = 1 << 20
PAYLOAD_LIMIT_BYTES = 256 << 20
TEXT_LIMIT = 4096
"""Characters of one str field."""
BYTES_LIMIT = 1 << 16
"""Length of one bytes field; what is larger belongs into the payload."""
ITEMS_LIMIT = 1 << 16
"""Items of one tuple."""
INTEGER_MIN, INTEGER_MAX = -(1 << 63), (1 << 63) - 1

Frame = bytes | memoryview
M = TypeVar("M")
Check = Callable[[Any], Any]

NO_CHECKSUM = -1
"""In the place of one; an xxh3_64 is never negative."""
_PREFIX = struct.Struct("<BQ")
_PAYLOAD = "payload"
_PAYLOAD_TYPES = {bytes, bytearray, memoryview}
# a Packer is not safe to share between threads, and its default buffer of 256 KiB is mapped anew
# for every message; the buffer grows on demand
_PACKER_BYTES = 1024


class Malformed(ValueError):
    """Frames that are no message of this format, or a message that cannot be put into frames."""


class Damaged(Malformed):
    """The bytes that arrived are not those that were sent."""


class WireFormat(Generic[M]):
    """The codec of a fixed set of kinds; a kind's number is its place in `kinds`.

    Both ends must be built from the same sequence. Raises TypeError for a class that is no frozen
    dataclass, or for an annotation that the format does not know. Safe to share between threads.
    """

    def __init__(self, kinds: Sequence[type[M]]) -> None:
        self._decoders = [_Kind(kind, number) for number, kind in enumerate(kinds)]
        self._encoders = {kind.made: kind for kind in self._decoders}
        if len(self._encoders) != len(self._decoders):
            raise TypeError("a kind is registered twice")

    def encode(self, message: M, hashed: bool = True) -> list[Frame]:
        """One frame, or two with the payload, which is referred to and not copied.

        `hashed=False` spares a payload its checksum, whose way is guarded otherwise. Raises
        Malformed when a field does not fit its annotation or exceeds a limit.
        """
        kind = self._encoders.get(type(message))
        if kind is None:
            raise Malformed(f"{type(message).__name__} is no kind of this format")
        body = kind.pack(message)
        payload: Frame | None = None
        if kind.has_payload:
            payload = _flat(getattr(message, _PAYLOAD))
            body += (len(payload), xxh3_64_intdigest(payload) if hashed else NO_CHECKSUM)
        try:
            packed = cast(bytes, msgpack.Packer(buf_size=_PACKER_BYTES).pack(body))
        except ValueError as error:  # text that UTF-8 cannot express
            raise Malformed(f"{kind.name}: {error}") from None
        header = _PREFIX.pack(VERSION, xxh3_64_intdigest(packed)) + packed
        if len(header) > HEADER_LIMIT_BYTES:
            raise Malformed(f"{kind.name}: a header of {len(header)} bytes is too long")
        return [header] if payload is None else [header, payload]

    def decode(
        self, frames: Sequence[Frame], is_guarded: bool = False, is_to_come: bool = False
    ) -> M:
        """The message; a payload is a memoryview of the second frame, which it keeps alive.

        A payload without a checksum is taken only if its way `is_guarded`; one that `is_to_come`,
        so that only its length is right, only without. Raises Damaged when a checksum does not fit,
        Malformed for everything else that is wrong.
        """
        if not frames:
            raise Malformed("no frames")
        body = _body(frames[0])
        number = body[0]
        if type(number) is not int or not 0 <= number < len(self._decoders):
            raise Malformed("unknown kind of message")
        kind = self._decoders[number]
        if len(frames) != 1 + kind.has_payload:
            raise Malformed(f"{kind.name}: {len(frames)} frames")
        if len(body) != kind.body_length:
            raise Malformed(f"{kind.name}: {len(body)} fields")
        payload = None
        if kind.has_payload:
            if is_to_come and body[-1] != NO_CHECKSUM:
                raise Malformed(f"{kind.name}: a checksum of what is to come")
            payload = _verified(frames[1], body[-2], body[-1], is_guarded)
        return cast(M, kind.unpack(body, payload))


def _body(header: Frame) -> tuple[Any, ...]:
    """The header's body, whole and a non-empty array, its items not yet checked."""
    if not _PREFIX.size < len(header) <= HEADER_LIMIT_BYTES:
        raise Malformed(f"a header of {len(header)} bytes")
    if header[0] != VERSION:
        raise Malformed(f"version {header[0]} of the wire format, this is version {VERSION}")
    packed = header[_PREFIX.size :]
    if _PREFIX.unpack_from(header)[1] != xxh3_64_intdigest(packed):
        raise Damaged("a header that is not what was sent")
    try:
        body = msgpack.unpackb(
            packed,
            use_list=False,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=4 * TEXT_LIMIT,
            max_bin_len=BYTES_LIMIT,
            max_array_len=ITEMS_LIMIT,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise Malformed(f"a header that is no msgpack: {error}") from None
    if type(body) is not tuple or not body:
        raise Malformed("a header that is no array")
    return body


def _verified(frame: Frame, length: Any, checksum: Any, is_guarded: bool) -> memoryview:
    if type(length) is not int or type(checksum) is not int:
        raise Malformed("a payload without a length and a checksum")
    payload = memoryview(frame)
    if payload.nbytes > PAYLOAD_LIMIT_BYTES:
        raise Malformed(f"a payload of {payload.nbytes} bytes is too long")
    is_trusted = is_guarded and checksum == NO_CHECKSUM
    if payload.nbytes != length or (not is_trusted and xxh3_64_intdigest(payload) != checksum):
        raise Damaged(f"a payload of {payload.nbytes} bytes that is not what was sent")
    return payload


def _flat(payload: Any) -> Frame:
    """The payload as plain bytes, not copied, so that its length is its size."""
    if type(payload) not in _PAYLOAD_TYPES:
        raise Malformed(f"a payload of type {type(payload).__name__}")
    view = memoryview(payload)
    if not view.c_contiguous:
        raise Malformed("a payload with gaps")
    if view.nbytes > PAYLOAD_LIMIT_BYTES:
        raise Malformed(f"a payload of {view.nbytes} bytes is too long")
    if type(payload) is bytes:
        return payload
    return view.cast("B") if view.nbytes else b""


# --- one kind, from its annotations ----------------------------------------------------------


class _Kind:
    """How one dataclass is packed: a check per field, built once."""

    def __init__(self, made: type, number: int) -> None:
        hints = _hints(made)
        names = [field.name for field in fields(made)]
        self.made = made
        self.name = made.__name__
        self.number = number
        self.has_payload = _PAYLOAD in names
        if self.has_payload:
            if not set(get_args(hints[_PAYLOAD]) or [hints[_PAYLOAD]]) <= _PAYLOAD_TYPES:
                raise TypeError(f"{self.name}: `{_PAYLOAD}` must be bytes-like")
            # the constructor is called by position, and the payload is put last
            if names[-1] != _PAYLOAD:
                raise TypeError(f"{self.name}: `{_PAYLOAD}` must be the last field")
            names.pop()
        checks = [_checks(hints[name], f"{self.name}.{name}") for name in names]
        self._packers = [(name, pack) for name, (pack, _) in zip(names, checks, strict=True)]
        self._unpackers = [unpack for _, unpack in checks]
        self.body_length = 1 + len(names) + 2 * self.has_payload

    def pack(self, message: Any) -> tuple[Any, ...]:
        try:
            return (self.number, *[pack(getattr(message, name)) for name, pack in self._packers])
        except Malformed as error:
            raise Malformed(f"{self.name}: {error}") from None

    def unpack(self, body: tuple[Any, ...], payload: memoryview | None) -> Any:
        try:
            # body[0] is the number, and a payload's length and checksum come after the fields
            values = [check(value) for check, value in zip(self._unpackers, body[1:], strict=False)]
            return self.made(*values) if payload is None else self.made(*values, payload)
        except ValueError as error:  # of a check, or of the dataclass's own __post_init__
            raise Malformed(f"{self.name}: {error}") from None


def _hints(made: type) -> dict[str, Any]:
    if not is_dataclass(made) or not made.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{made.__name__} is no frozen dataclass")
    return get_type_hints(made)


def _checks(annotation: Any, where: str) -> tuple[Check, Check]:
    """The check when packing and the check when unpacking; each returns the converted value."""
    simple = _SIMPLE.get(annotation)
    if simple is not None:
        return simple, simple
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        check = _one_of(arguments)
        return check, check
    if origin in (Union, UnionType) and len(arguments) == 2 and NoneType in arguments:
        present = arguments[0] if arguments[1] is NoneType else arguments[1]
        pack, unpack = _checks(present, where)
        return _optional(pack), _optional(unpack)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        pack, unpack = _checks(arguments[0], where)
        return _many(pack), _many(unpack)
    if origin is tuple:
        pairs = [_checks(argument, where) for argument in arguments]
        return _row([pack for pack, _ in pairs]), _row([unpack for _, unpack in pairs])
    if isinstance(annotation, type) and is_dataclass(annotation):
        return _record(annotation, where)
    raise TypeError(f"{where}: the wire format knows no {annotation}")


def _wrong(expected: str, value: Any) -> Malformed:
    # the value itself may be long, or hostile to a terminal
    return Malformed(f"expected {expected}, not {type(value).__name__}")


def _integer(value: Any) -> Any:
    if type(value) is not int or not INTEGER_MIN <= value <= INTEGER_MAX:
        raise _wrong("an int of 64 bits", value)
    return value


def _text(value: Any) -> Any:
    if type(value) is not str or len(value) > TEXT_LIMIT:
        raise _wrong(f"a str of up to {TEXT_LIMIT} characters", value)
    return value


def _octets(value: Any) -> Any:
    if type(value) is not bytes or len(value) > BYTES_LIMIT:
        raise _wrong(f"up to {BYTES_LIMIT} bytes", value)
    return value


def _exactly(wanted: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not wanted:
            raise _wrong(wanted.__name__, value)
        return value

    return check


def _one_of(allowed: tuple[Any, ...]) -> Check:
    # with the type, since True == 1
    exact = {(type(item), item) for item in allowed}
    types = {type(item) for item in allowed}

    def check(value: Any) -> Any:
        # the type first: a value of another may not be hashable
        if type(value) not in types or (type(value), value) not in exact:
            raise _wrong(f"one of {allowed}", value)
        return value

    return check


def _optional(present: Check) -> Check:
    return lambda value: None if value is None else present(value)


def _many(item: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not tuple or len(value) > ITEMS_LIMIT:
            raise _wrong(f"a tuple of up to {ITEMS_LIMIT} items", value)
        return tuple([item(each) for each in value])

    return check


def _row(items: list[Check]) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(items):
            raise _wrong(f"a tuple of {len(items)} items", value)
        return tuple([item(each) for item, each in zip(items, value, strict=True)])

    return check


def _record(made: type, where: str) -> tuple[Check, Check]:
    hints = _hints(made)
    names = [field.name for field in fields(made)]
    pairs = [_checks(hints[name], f"{where}.{name}") for name in names]
    pack_row, unpack_row = _row([pack for pack, _ in pairs]), _row([check for _, check in pairs])

    def pack(value: Any) -> Any:
        if type(value) is not made:
            raise _wrong(made.__name__, value)
        return pack_row(tuple([getattr(value, name) for name in names]))

    return pack, lambda value: made(*unpack_row(value))


_SIMPLE: dict[Any, Check] = {
    int: _integer,
    str: _text,
    bytes: _octets,
    float: _exactly(float),
    bool: _exactly(bool),
    None: _exactly(NoneType),
    NoneType: _exactly(NoneType),
}
