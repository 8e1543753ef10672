"""Where the model's list is cut into pipeline stages, so that ranks have equal work.

Pieces: 0 the embedding, 1 to L the layers, L + 1 the end: final norm, head and MTP modules, which stay
together because the modules need the final state and the head. Stages are consecutive pieces; a rank has one
stage (1f1b) or two: r and r + P (interleaved), or, in a V, r and 2P - 1 - r (zbv, dualpipev), so that the
first and the last stage share rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise

from torch import nn

from dsv3.common.errors import UserError, nearest
from dsv3.config.model import ModelConfig
from dsv3.model import DeepSeekV3

SCHEDULES = ("1f1b", "interleaved", "zbv", "dualpipev")
V_SHAPED = ("zbv", "dualpipev")


def stages_of(schedule: str, rank: int, ranks: int) -> tuple[int, ...]:
    """The stages a rank has, in the order of the model. :class:`UserError` for an unknown schedule."""
    if schedule not in SCHEDULES:
        raise UserError(
            f"schedule ({schedule}) is unknown{nearest(schedule, SCHEDULES)}; "
            f"there are {', '.join(SCHEDULES)}"
        )
    if schedule == "1f1b":
        return (rank,)
    return (rank, 2 * ranks - 1 - rank if schedule in V_SHAPED else rank + ranks)


def costs(model: DeepSeekV3, length: int, mtp: bool = True) -> list[int]:
    """FLOPs a token of each piece, forward and backward, in sequences of ``length``.

    6 for each matrix parameter a token meets (K of the routed experts), and attention's two products as far
    as the causal mask lets them go; the embedding is a lookup. The end has a head for the main model and for
    each MTP module.
    """
    config = model.config
    layers = [_layer_cost(layer, config, length) for layer in model.model.layers]
    main, modules = layers[: config.num_hidden_layers], layers[config.num_hidden_layers :] if mtp else []
    head = 6 * model.lm_head.weight.numel()
    return [0, *main, head * (1 + len(modules)) + sum(modules)]


def _layer_cost(layer: nn.Module, config: ModelConfig, length: int) -> int:
    met = 0
    for parameter in layer.parameters():
        if parameter.dim() == 3:  # stacked experts
            met += parameter.numel() // config.n_routed_experts * config.num_experts_per_tok
        elif parameter.dim() == 2:
            met += parameter.numel()
    scores = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * (length + 1)
    return 6 * met + 3 * scores


def cut(cost: list[int], schedule: str, ranks: int) -> list[range]:
    """The pieces of each stage: the slowest rank as fast as can be, and then the slowest stage.

    Every stage has a piece at least. Raises :class:`UserError` when there are fewer pieces than stages.
    """
    mine = [stages_of(schedule, rank, ranks) for rank in range(ranks)]
    stages = sum(map(len, mine))
    if stages > len(cost):
        raise UserError(
            f"pipeline ({ranks}) with schedule {schedule} needs {stages} stages, the model has "
            f"{len(cost)} pieces (embedding, {len(cost) - 2} layers, end); use fewer ranks"
        )
    sums = [0, *accumulate(cost)]
    v_shaped = schedule in V_SHAPED

    def found(rank_bound: int, stage_bound: int) -> list[range] | None:
        return (_fold if v_shaped else _line)(sums, stages, rank_bound, stage_bound)

    total = sums[-1]
    if v_shaped:
        rank_bound = _least(total, lambda bound: found(bound, total) is not None)
    else:
        rank_bound = total
    stage_bound = _least(total, lambda bound: found(rank_bound, bound) is not None)
    ranges = found(rank_bound, stage_bound)
    assert ranges is not None
    return ranges


def _least(highest: int, holds: Callable[[int], bool]) -> int:
    """The least number from 0 to ``highest`` for which ``holds``, which holds from there on."""
    low, high = 0, highest
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _line(sums: list[int], stages: int, rank_bound: int, stage_bound: int) -> list[range] | None:
    """Stages one after the other, none above ``stage_bound``: each takes all it can, from the front."""
    pieces, first, ranges = len(sums) - 1, 0, []
    for stage in range(stages):
        limit = pieces - (stages - 1 - stage)  # one piece at least for each that follows
        last = _farthest(sums, first, limit, stage_bound)
        if last <= first:
            return None
        ranges.append(range(first, last))
        first = last
    return ranges if first == pieces else None


def _farthest(sums: list[int], first: int, limit: int, bound: int) -> int:
    last = first
    while last < limit and sums[last + 1] - sums[first] <= bound:
        last += 1
    return last


def _fold(sums: list[int], stages: int, rank_bound: int, stage_bound: int) -> list[range] | None:
    """Stages in a V, peeled off both ends: rank r takes pieces from the left and from the right.

    For each number of pieces taken from the left only the most that can be taken from the right is followed:
    what is left over for the other ranks is then least.
    """
    pieces, ranks = len(sums) - 1, stages // 2
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]  # left taken: (right taken, left taken before)
    for rank in range(ranks):
        within = pieces - 2 * (ranks - 1 - rank)  # the ranks that follow keep a piece a stage
        reached: dict[int, tuple[int, int]] = {}
        for before, (right, _) in best[-1].items():
            for left, taken in _choices(sums, before, right, within, rank_bound, stage_bound):
                if taken > reached.get(left, (0, 0))[0]:
                    reached[left] = (taken, before)
        best.append(reached)
    meets = [left for left, (right, _) in best[-1].items() if left + right == pieces]
    if not meets:
        return None
    lefts = [meets[0]]
    for reached in reversed(best[1:]):
        lefts.append(reached[lefts[-1]][1])
    lefts.reverse()
    rights = [reached[left][0] for reached, left in zip(best, lefts)]
    down = [range(a, b) for a, b in pairwise(lefts)]
    up = [range(pieces - b, pieces - a) for a, b in pairwise(rights)]
    return [*down, *reversed(up)]


def _choices(
    sums: list[int], left: int, right: int, within: int, rank_bound: int, stage_bound: int
) -> Iterator[tuple[int, int]]:
    """``(left taken, most right taken)`` after one more rank, a piece at least on both sides."""
    pieces = len(sums) - 1
    for until in range(left + 1, within - right):
        down = sums[until] - sums[left]
        if down > min(stage_bound, rank_bound):
            return
        most, bound = right, min(stage_bound, rank_bound - down)
        while until + most < within and sums[pieces - right] - sums[pieces - most - 1] <= bound:
            most += 1
        if most > right:
            yield until, most
