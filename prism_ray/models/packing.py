"""Which samples are computed together: bins of at most a budget of tokens, few of them and about equally full."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

Bins = list[list[int]]


def pack(lengths: Sequence[int], token_budget: int, bins: int | None = None) -> Bins:
    """Every index of `lengths` in exactly one bin; deterministic.

    No bin holds more than `token_budget` tokens, except that a longer sample has a bin of its own. Without `bins` they
    are as few as can be found; ranks that must make equally many forward passes agree on the greatest number and give
    it as `bins`. Bins are about equally full, the fullest first (ranks that go in step then compute alike), and hold
    their samples in the order given, so that those of one prompt lie side by side. Raises ValueError for a number of
    bins that cannot be had.
    """
    tight = _best_fit(lengths, token_budget)
    if bins is not None and not min(1, len(lengths)) <= bins <= len(lengths):
        raise ValueError(f"{len(lengths)} samples cannot fill {bins} bins; ask for one to {len(lengths)}")
    least = max(1, -(-sum(lengths) // token_budget))
    for count in range(least, len(tight) + 1) if bins is None else (bins,):
        packed = balance(lengths, count)
        if _fits(packed, lengths, token_budget):
            return packed
    if bins is not None and bins < len(tight):
        raise ValueError(f"{bins} bins of {token_budget} tokens do not hold the samples; ask for {len(tight)}")
    return _split(tight, lengths, bins or len(tight))


def pack_chain(lengths: Sequence[int], common: Sequence[int], token_budget: int, bins: int | None = None) -> Bins:
    """Like `pack`, where samples share tokens: the first `common[i]` of sample i are those of sample i - 1 and cost
    nothing beside it. Bins are runs of neighbours, so that they cost what their first sample does and what is new in
    the others; as few as runs can be, and the fullest as little full as it can be with so many.
    """
    fewest = len(_runs(lengths, common, token_budget))
    if bins is not None and not min(1, len(lengths)) <= bins <= len(lengths):
        raise ValueError(f"{len(lengths)} samples cannot fill {bins} bins; ask for one to {len(lengths)}")
    if bins is not None and bins < fewest:
        raise ValueError(f"{bins} bins of {token_budget} tokens do not hold the samples; ask for {fewest}")
    count = fewest if bins is None else bins
    capacities = range(1, token_budget + 1)
    least = bisect.bisect_left(capacities, True, key=lambda c: len(_runs(lengths, common, c)) <= count)
    runs = _runs(lengths, common, capacities[least])
    while len(runs) < count:
        widest = max((r for r in runs if len(r) > 1), key=lambda r: _run_load(r, lengths, common))
        runs.remove(widest)
        runs += _halves(widest, lengths, common)
    return [list(r) for r in sorted(runs, key=lambda r: (-_run_load(r, lengths, common), r.start))]


def balance(sizes: Sequence[int], parts: int) -> Bins:
    """Every index of `sizes` in one of `parts` parts of about equal sums, the fullest first; deterministic.

    The longest-first filling, then exchanges (or moves) of one between the fullest part and another that make the
    fuller of the two less full, until there is none. No part is empty if there are as many sizes as parts.
    """
    bins = _emptiest_first(sizes, parts)
    loads = [_load(b, sizes) for b in bins]
    improved = parts > 1
    while improved:
        top = loads.index(max(loads))
        emptiest = sorted(range(parts), key=loads.__getitem__)
        improved = any(_exchange(bins, loads, top, other, sizes) for other in emptiest)
    return _ordered(bins, sizes)


def efficiency(ranks: Sequence[Sequence[int]], tokens: int) -> float:
    """Share of the computed tokens that are of use: `tokens / (ranks x sum over steps of the largest bin)`.

    `ranks[r][s]` is what rank r computes in step s, padding included. Ranks go in step, so every rank pays for the
    largest bin of each step; a rank that has no bin left idles. It says what imbalance and padding cost; `fill` says
    how much of the memory set aside by the budget is used.
    """
    steps = max(len(sizes) for sizes in ranks)
    paid = sum(max(sizes[s] if s < len(sizes) else 0 for sizes in ranks) for s in range(steps))
    return tokens / (len(ranks) * paid)


def fill(tokens: int, bins: int, token_budget: int) -> float:
    """Share of the budget that holds real tokens: `tokens / (bins x token_budget)`."""
    return tokens / (bins * token_budget)


def _runs(lengths: Sequence[int], common: Sequence[int], capacity: int) -> list[range]:
    """Neighbours together as far as `capacity` goes: no division into runs has fewer of them."""
    runs: list[range] = []
    load = 0
    for i, length in enumerate(lengths):
        load += length - common[i]
        if runs and load <= capacity:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
            load = length
    return runs


def _halves(run: range, lengths: Sequence[int], common: Sequence[int]) -> list[range]:
    """The run cut in two where the fuller part is least full."""
    cuts = [[range(run.start, cut), range(cut, run.stop)] for cut in run[1:]]
    return min(cuts, key=lambda parts: max(_run_load(part, lengths, common) for part in parts))


def _run_load(run: range, lengths: Sequence[int], common: Sequence[int]) -> int:
    return sum(lengths[i] - common[i] for i in run) + common[run.start]


def _emptiest_first(lengths: Sequence[int], count: int) -> Bins:
    """Longest first, each to the emptiest of `count` bins: balanced to within the longest sample."""
    bins: Bins = [[] for _ in range(count)]
    heap = [(0, 0, b) for b in range(count)]
    for index in _longest_first(lengths):
        load, members, b = heapq.heappop(heap)
        bins[b].append(index)
        heapq.heappush(heap, (load + lengths[index], members + 1, b))
    return bins


def _exchange(bins: Bins, loads: list[int], top: int, other: int, sizes: Sequence[int]) -> bool:
    """Make the exchange that brings these two bins' loads closest to each other; whether there was one."""
    gap = loads[top] - loads[other]
    best = (gap, 0, -1, -1)
    for given in bins[top]:
        for taken in (-1, *bins[other]):
            change = sizes[given] - (sizes[taken] if taken >= 0 else 0)
            best = min(best, (abs(gap - 2 * change), change, given, taken))
    left, change, given, taken = best
    if left >= gap:
        return False
    bins[top].remove(given)
    bins[other].append(given)
    if taken >= 0:
        bins[other].remove(taken)
        bins[top].append(taken)
    loads[top] -= change
    loads[other] += change
    return True


def _split(bins: Bins, lengths: Sequence[int], count: int) -> Bins:
    """These bins, the fullest halved until there are `count`."""
    bins = list(bins)
    while len(bins) < count:
        fullest = max((b for b in bins if len(b) > 1), key=lambda b: _load(b, lengths))
        bins.remove(fullest)
        bins += [[fullest[i] for i in half] for half in balance([lengths[i] for i in fullest], 2)]
    return _ordered(bins, lengths)


def _best_fit(lengths: Sequence[int], token_budget: int) -> Bins:
    """Longest first, each to the bin that it leaves least room in (best-fit decreasing)."""
    bins: Bins = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), ascending
    for index in _longest_first(lengths):
        at = bisect.bisect_left(rooms, (lengths[index], 0))
        room, b = rooms.pop(at) if at < len(rooms) else (token_budget, len(bins))
        if b == len(bins):
            bins.append([])
        bins[b].append(index)
        bisect.insort(rooms, (room - lengths[index], b))
    return bins


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _ordered(bins: Bins, lengths: Sequence[int]) -> Bins:
    return sorted((sorted(b) for b in bins), key=lambda b: (-_load(b, lengths), b))


def _fits(bins: Bins, lengths: Sequence[int], token_budget: int) -> bool:
    return all(len(b) == 1 or _load(b, lengths) <= token_budget for b in bins)


def _load(members: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in members)
