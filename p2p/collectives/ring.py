"""Ring allreduce: reduce-scatter, then all-gather, each in nodes - 1 rounds.

Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
Chunk c is summed along the chain c, c+1, …, c-1 (mod nodes), so its sum is
((x[c] + x[c+1]) + x[c+2]) + …; every node sends 2 (nodes - 1) / nodes of the vector.
"""

from __future__ import annotations

from p2p.collectives.hops import Hop


def ring_hops(nodes: int) -> tuple[int, list[Hop]]:
    """The number of chunks, and the hops."""
    hops = []
    for round in range(nodes - 1):
        for node in range(nodes):
            after = (node + 1) % nodes
            hops.append(Hop(round, (node - round) % nodes, node, after, adds=True))
            hops.append(Hop(nodes - 1 + round, (node + 1 - round) % nodes, node, after, adds=False))
    return nodes, hops
