"""Kind, bytes, ranks and link of a collective -> seconds: latency per step plus bytes over bandwidth, per algorithm.

With n ranks, B bytes of the *full* (unsharded) tensor, a the latency of a step, r the rate of the group's rings and p that of
one rank:

- all_reduce: the faster of a ring, ``2(n-1) a + 2(n-1)/n B/r``, and a double binary tree, ``2 ceil(log2 n) a + 2 B/r``
- all_gather, reduce_scatter: a ring, ``(n-1) a + (n-1)/n B/r``
- all_to_all: every rank sends its B/n in n parts, in pairs, ``(n-1) a + (n-g)/n^2 B/p``; g ranks share a node if the group
  reaches over several (their parts stay inside, which is faster and at the same time), else g = 1
- ring: every rank's part visits all other ranks, one after the other: an all-gather of which no rank holds more than a part
- broadcast: a pipelined chain, ``(n-1) a + B/r``
- p2p: one message, ``a + B/p``
- halo: every rank sends B/n to its neighbours, in both directions at once, ``a + B/(n p)``
"""

from __future__ import annotations

import math

from autopar.errors import HardwareError

from .hardware import Link

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "p2p", "ring", "halo")


def collective_seconds(kind: str, nbytes: float, ranks: int, link: Link) -> float:
    """Seconds of one collective; 0 for a single rank.

    Args:
        kind: one of `KINDS`.
        nbytes: bytes of the full, unsharded tensor (for p2p, of the message; for halo, of what all ranks send).
        ranks: size of the group.
        link: what the group talks over, from `axis_link`.

    Raises HardwareError for an unknown kind, negative bytes or less than one rank.
    """
    if kind not in KINDS:
        raise HardwareError(f"no collective is called {kind!r}; known: {', '.join(KINDS)}")
    if nbytes < 0 or ranks < 1:
        raise HardwareError(f"{kind} of {nbytes} bytes over {ranks} ranks; bytes can't be negative and ranks must be 1 or more")
    if ranks == 1:
        return 0.0
    steps, share = ranks - 1, (ranks - 1) / ranks
    latency, ring_rate, rank_rate = link.latency_seconds, link.ring_bytes_per_s, link.rank_bytes_per_s
    if kind == "all_reduce":
        ring = 2 * steps * latency + 2 * share * nbytes / ring_rate
        tree = 2 * math.ceil(math.log2(ranks)) * latency + 2 * nbytes / ring_rate
        return min(ring, tree)
    if kind == "all_to_all":
        return steps * latency + (ranks - min(link.local_ranks, steps)) / ranks**2 * nbytes / rank_rate
    if kind == "broadcast":
        return steps * latency + nbytes / ring_rate
    if kind == "p2p":
        return latency + nbytes / rank_rate
    if kind == "halo":
        return latency + nbytes / ranks / rank_rate
    return steps * latency + share * nbytes / ring_rate
