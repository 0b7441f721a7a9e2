"""How a process comes by the memory of large messages and tensors.

By itself glibc maps each block from 128 KiB on anew and gives it back when it is freed, so every
segment would be written to fresh pages, which the kernel has to clear first: for 1 MiB that takes
as long as to receive it. Told so, glibc keeps them. Other C libraries are left alone.

Nor does it ask for huge pages by itself, where the kernel gives them to those who ask: a step's
tensors lie on thousands of small ones then, more than a core remembers the places of.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""The names' values in glibc's malloc.h; see mallopt(3)."""
LARGEST_BYTES = 32 << 20
"""Beyond this glibc maps in any case."""
KEPT_BYTES = 512 << 20
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""The environment in which a process has to start for glibc, from 2.35 on, to ask for them."""


def keep_large_blocks() -> None:
    """For this process, from now on."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        # what one thread frees is of use to another
        mallopt(_M_ARENA_MAX, 1)
