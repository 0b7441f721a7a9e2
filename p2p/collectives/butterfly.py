"""Butterfly allreduce: recursive halving, then recursive doubling, for any number of nodes.

Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH"
(2005). With 2^k + r nodes, the last node of each of the first r pairs first hands its whole vector
to the other, and gets the totals back at the end. The others exchange halves with the nodes at
distance 1, 2, 4, …, so every chunk is summed in one and the same binary tree over neighbours:
((x[0] + x[1]) + (x[2] + x[3])) + … for r = 0.
"""

from __future__ import annotations

from p2p.collectives.hops import Hop


def butterfly_hops(nodes: int) -> tuple[int, list[Hop]]:
    """The number of chunks, a power of two, and the hops."""
    depth = nodes.bit_length() - 1
    chunks = 1 << depth
    extra = nodes - chunks
    # core[i] is the node at place i of the power-of-two butterfly
    core = [2 * place if place < extra else place + extra for place in range(chunks)]
    hops: list[Hop] = []
    for pair in range(extra):
        first, second = 2 * pair, 2 * pair + 1
        for chunk in range(chunks):
            hops.append(Hop(0, chunk, second, first, adds=True))
            hops.append(Hop(2 * depth + 1, chunk, first, second, adds=False))
    for level in range(depth):
        distance = 1 << level
        for place in range(chunks):
            partner = place ^ distance
            # a place still holds the chunks that agree with it in the bits of earlier levels
            for chunk in range(chunks):
                same_before = (chunk ^ place) & (distance - 1) == 0
                if not same_before:
                    continue
                if (chunk ^ place) & distance:
                    hops.append(Hop(1 + level, chunk, core[place], core[partner], adds=True))
                else:
                    round = 2 * depth - level
                    hops.append(Hop(round, chunk, core[place], core[partner], adds=False))
    return chunks, hops
