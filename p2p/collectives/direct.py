"""Direct allreduce: every node owns a chunk, gets it from all others, and sends its sum to all.

Rabenseifner's two phases without intermediaries: everything that is sent to be added is on its way
at once, and so are the totals, so it takes two times a message's way, however many nodes there are.
Chunk c is summed at node c, as ((x[c] + x[c+1]) + x[c+2]) + … (mod nodes): the ring's order, so the
two give the same bits. A round of an add is its place in that order, and nobody waits for it.
"""

from __future__ import annotations

from p2p.collectives.hops import Hop


def direct_hops(nodes: int) -> tuple[int, list[Hop]]:
    """The number of chunks, and the hops."""
    hops = []
    for owner in range(nodes):
        for round in range(nodes - 1):
            other = (owner + 1 + round) % nodes
            hops.append(Hop(round, owner, other, owner, adds=True))
            hops.append(Hop(nodes - 1, owner, owner, other, adds=False))
    return nodes, hops
