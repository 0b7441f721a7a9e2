from p2p.collectives.memory import Bytes, Vector

def pack(values: Vector, chances: Vector, noise: int, out: Bytes, summand: Bytes = ..., /) -> None:
    """Packs the values, or their sum with what is packed in `summand`.

    Of `chances` there is one for each noise of the period, and those of a block more.

    Raises ValueError when the lengths do not fit each other, or floats are not aligned.
    """

def unpack(payload: Bytes, out: Vector, /) -> None: ...
def add(payload: Bytes, to: Vector, /) -> None: ...
