"""Which samples are computed together: bins of at most a budget of tokens, few of them and about equally full."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from itertools import pairwise

Bins = list[list[int]]


def pack_chain(lengths: Sequence[int], common: Sequence[int], token_budget: int, bins: int | None = None) -> Bins:
    """Every index of `lengths` in exactly one bin; deterministic. The first `common[i]` tokens of sample i are those of
    sample i - 1; what samples of a bin begin with in common costs once.

    None costs more than `token_budget` tokens, except that a longer sample has a bin of its own. Samples that follow
    each other with something in common (those of a prompt) lie together as far as they fit. Without `bins` they are as
    few as can be found, and no more than runs of neighbours would be; ranks that must make equally many forward passes
    agree on the greatest number and give it as `bins`. The fullest is no fuller than runs of neighbours would leave it,
    and comes first (ranks that go in step then compute alike). Raises ValueError for a number of bins that cannot be
    had.
    """
    fewest = len(_fill(lengths, common, token_budget))
    if bins is not None and not min(1, len(lengths)) <= bins <= len(lengths):
        raise ValueError(f"{len(lengths)} samples cannot fill {bins} bins; ask for one to {len(lengths)}")
    if bins is not None and bins < fewest:
        raise ValueError(f"{bins} bins of {token_budget} tokens do not hold the samples; ask for {fewest}")
    count = fewest if bins is None else bins
    capacities = range(1, token_budget + 1)
    least = bisect.bisect_left(capacities, True, key=lambda c: len(_fill(lengths, common, c)) <= count)
    packed = _fill(lengths, common, capacities[least])
    while len(packed) < count:
        widest = max((b for b in packed if len(b) > 1), key=lambda b: _cost(b, lengths, common))
        packed.remove(widest)
        packed += _halves(widest, lengths, common)
    return sorted(packed, key=lambda b: (-_cost(b, lengths, common), b))


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


def _fill(lengths: Sequence[int], common: Sequence[int], capacity: int) -> Bins:
    """The better of two ways: fewer bins, and of equally many those that cost less."""
    ways = _choose(lengths, common, capacity), _runs(lengths, common, capacity)
    return min(ways, key=lambda bins: (len(bins), sum(_cost(b, lengths, common) for b in bins)))


def _runs(lengths: Sequence[int], common: Sequence[int], capacity: int) -> Bins:
    """Neighbours together as far as `capacity` goes: no division into runs has fewer of them."""
    runs: Bins = []
    load = 0
    for i, length in enumerate(lengths):
        load += length - common[i]
        if runs and load <= capacity:
            runs[-1].append(i)
        else:
            runs.append([i])
            load = length
    return runs


def _choose(lengths: Sequence[int], common: Sequence[int], capacity: int) -> Bins:
    """Prompt by prompt, and of its samples always the longest that the bin has room for; a new bin where none fits."""
    bins: Bins = []
    load = 0
    for group in _groups(common):
        left = sorted(group, key=lambda i: (-lengths[i], i))
        own: list[int] = []  # those of the group in the last bin: with no other is anything in common
        while left:
            fitting = (i for i in left if bins and load + _new(i, own, lengths, common) <= capacity)
            chosen = next(fitting, None)
            if chosen is None:
                chosen, own, load = left[0], [], 0
                bins.append([])
            load += _new(chosen, own, lengths, common)
            bins[-1].append(chosen)
            bisect.insort(own, chosen)
            left.remove(chosen)
    return [sorted(b) for b in bins]


def _groups(common: Sequence[int]) -> list[range]:
    """Samples that follow each other with something in common."""
    starts = [i for i, tokens in enumerate(common) if i == 0 or not tokens]
    return [range(start, stop) for start, stop in pairwise([*starts, len(common)])]


def _new(index: int, own: Sequence[int], lengths: Sequence[int], common: Sequence[int]) -> int:
    """What a sample adds to the cost of these (ascending)."""
    at = bisect.bisect_left(own, index)
    shared = [_in_common(before, index, common) for before in own[max(0, at - 1) : at]]
    shared += [_in_common(index, after, common) for after in own[at : at + 1]]
    return lengths[index] - max(shared, default=0)


def _in_common(before: int, after: int, common: Sequence[int]) -> int:
    return min(common[before + 1 : after + 1])


def _cost(members: Sequence[int], lengths: Sequence[int], common: Sequence[int]) -> int:
    """Tokens that these samples (ascending) are if what they begin with in common counts once."""
    return _load(members, lengths) - sum(_in_common(one, other, common) for one, other in pairwise(members))


def _halves(members: list[int], lengths: Sequence[int], common: Sequence[int]) -> Bins:
    """The bin cut in two where the fuller part is least full."""
    cuts = [[members[:cut], members[cut:]] for cut in range(1, len(members))]
    return min(cuts, key=lambda parts: max(_cost(part, lengths, common) for part in parts))


def _emptiest_first(lengths: Sequence[int], count: int) -> Bins:
    """Longest first, each to the emptiest of `count` bins: balanced to within the longest sample."""
    bins: Bins = [[] for _ in range(count)]
    heap = [(0, 0, b) for b in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
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


def _ordered(bins: Bins, lengths: Sequence[int]) -> Bins:
    return sorted((sorted(b) for b in bins), key=lambda b: (-_load(b, lengths), b))


def _load(members: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in members)
