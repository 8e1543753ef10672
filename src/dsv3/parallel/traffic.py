"""Where tokens go on their way to experts, counted: nodes a token visits, bytes between nodes (report 2.1.2).

Shapes: N tokens of this rank, K experts a token, E experts, X a number of nodes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Traffic:
    """Where tokens went since the last :meth:`clear`: kept as tensors, nothing waits for them.

    ``visits_X[n]``: tokens and layers whose experts lie on n nodes. ``away``: rows sent to another node.
    ``copies``: what ``away`` would be with one copy a token and node, as the report's kernels send.
    ``row_bytes``: of a row, there and back in both passes. ``once``: rows do travel with one copy a node.
    ``carrier``: what they travel by, for the log.
    """

    def __init__(self, node_E: Tensor, own_node: int, row_bytes: int, once: bool, carrier: str):
        self.node_E, self.own = node_E, own_node
        self.row_bytes, self.once, self.carrier = row_bytes, once, carrier
        self.nodes = int(node_E.max()) + 1
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.visits_X = torch.zeros(self.nodes + 1, dtype=torch.int64, device=self.node_E.device)
        self.away = torch.zeros((), dtype=torch.int64, device=self.node_E.device)
        self.copies = torch.zeros_like(self.away)

    @torch.no_grad()
    def count(self, indices_NK: Tensor) -> None:
        """Add the tokens of one dispatch."""
        node_NK = self.node_E[indices_NK]
        seen_NX = torch.zeros(len(indices_NK), self.nodes, dtype=torch.bool, device=node_NK.device)
        seen_NX.scatter_(1, node_NK, True)
        self.visits_X += torch.bincount(seen_NX.sum(dim=1), minlength=self.nodes + 1)
        self.away += (node_NK != self.own).sum()
        self.copies += seen_NX.sum() - seen_NX[:, self.own].sum()

    def bytes_between_nodes(self) -> tuple[Tensor, Tensor]:
        """Bytes of this rank's tokens between nodes, and what they would be with one copy a node."""
        least = self.copies * self.row_bytes
        return least if self.once else self.away * self.row_bytes, least


def node_of_experts(experts: int, group: dist.ProcessGroup, node_size: int) -> Tensor:
    """The node each expert lies on, numbered within the group: int64 ``[E]``."""
    ranks = dist.get_process_group_ranks(group)
    nodes = sorted({rank // node_size for rank in ranks})
    place = torch.tensor([nodes.index(rank // node_size) for rank in ranks])
    return place.repeat_interleave(experts // len(ranks))
