"""Where the model's list is cut into pipeline stages, so that ranks have equal work.

Pieces: 0 the embedding, 1 to L the layers, L + 1 the end: final norm, head and MTP modules, which stay
together because the modules need the final state and the head. Stages are consecutive pieces; a rank has one
stage (1f1b) or two: r and r + P (interleaved), or, in a V, r and 2P - 1 - r (zbv, dualpipev), so that the
first and the last stage share rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """The pieces of each stage: the slowest rank (in a V) or stage as fast as can be.

    In a V stages are then as equal as can be (least sum of squares), since a forward of one is overlapped
    with a backward of the other. Every stage has a piece at least. Raises :class:`UserError` when there are
    fewer pieces than stages.
    """
    stages = sum(len(stages_of(schedule, rank, ranks)) for rank in range(ranks))
    if stages > len(cost):
        raise UserError(
            f"pipeline ({ranks}) with schedule {schedule} needs {stages} stages, the model has "
            f"{len(cost)} pieces (embedding, {len(cost) - 2} layers, end); use fewer ranks"
        )
    sums = [0, *accumulate(cost)]
    if schedule in V_SHAPED:
        return _fold(sums, ranks, _least(sums[-1], lambda bound: _folds(sums, ranks, bound)))
    bound = _least(sums[-1], lambda bound: _line(sums, stages, bound) is not None)
    ranges = _line(sums, stages, bound)
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


def _line(sums: list[int], stages: int, bound: int) -> list[range] | None:
    """Stages one after the other, none above ``bound``: each takes all it can, from the front."""
    pieces, first, ranges = len(sums) - 1, 0, []
    for stage in range(stages):
        last, limit = first, pieces - (stages - 1 - stage)  # one piece at least for each that follows
        while last < limit and sums[last + 1] - sums[first] <= bound:
            last += 1
        if last == first:
            return None
        ranges.append(range(first, last))
        first = last
    return ranges if first == pieces else None


def _folds(sums: list[int], ranks: int, bound: int) -> bool:
    """Whether a V with no rank above ``bound`` exists: rank r takes pieces from the left and from the right.

    For each number of pieces taken from the left only the most that can be taken from the right is followed:
    what is left over for the other ranks is then least.
    """
    pieces = len(sums) - 1
    best = {0: 0}  # left taken: right taken
    for rank in range(ranks):
        within = pieces - 2 * (ranks - 1 - rank)  # the ranks that follow keep a piece a stage
        reached: dict[int, int] = {}
        for before, right in best.items():
            most = within - before
            for left in range(before + 1, within - right):
                room = bound - (sums[left] - sums[before])
                most = min(most, within - left)
                while most > right and sums[pieces - right] - sums[pieces - most] > room:
                    most -= 1
                if most == right:
                    break
                reached[left] = max(most, reached.get(left, 0))
        best = reached
    return any(left + right == pieces for left, right in best.items())


def _fold(sums: list[int], ranks: int, bound: int) -> list[range]:
    """Of the Vs with no rank above ``bound`` the one with the least sum of squares of its stages."""
    pieces = len(sums) - 1
    start: tuple[int, tuple[int, int] | None] = (0, None)
    best = [{(0, 0): start}]  # (left taken, right taken): (squares, taken before)
    for rank in range(ranks):
        within = pieces - 2 * (ranks - 1 - rank)
        reached: dict[tuple[int, int], tuple[int, tuple[int, int] | None]] = {}
        for (left, right), (squares, _) in best[-1].items():
            for until in range(left + 1, within - right):
                down = sums[until] - sums[left]
                for most in range(right + 1, within - until + 1):
                    up = sums[pieces - right] - sums[pieces - most]
                    if down + up > bound:
                        break
                    found = squares + down**2 + up**2, (left, right)
                    if (until, most) not in reached or found < reached[until, most]:
                        reached[until, most] = found
                if down > bound:
                    break
        best.append(reached)
    state = min((found[0], at) for at, found in best[-1].items() if sum(at) == pieces)[1]
    path = [state]
    for reached in reversed(best[1:]):
        before = reached[path[-1]][1]
        assert before is not None
        path.append(before)
    path.reverse()
    lefts = [range(a, b) for (a, _), (b, _) in pairwise(path)]
    rights = [range(pieces - b, pieces - a) for (_, a), (_, b) in pairwise(path)]
    return [*lefts, *reversed(rights)]
