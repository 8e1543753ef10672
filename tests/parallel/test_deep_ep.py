"""DeepEP's dispatcher gives what one process gives, and what our all_to_all does; by a stand-in for DeepEP.

The stand-in (fake_deep_ep.py) has the interface and meaning that DeepEP documents. On a machine with DeepEP
and two GPUs ``pytest -m gpu`` runs the same comparison with the library itself.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.common.errors import Failure, UserError
from dsv3.parallel import deep_ep
from tests.parallel import fake_deep_ep, test_weights
from tests.parallel.ranks import run_ranks

WIDTH, EXPERTS, CHOSEN = 128, 8, 3
TOKENS = (13, 6)  # of each rank

# What each token's experts are drawn from.
ROUTINGS = {
    "any": [range(EXPERTS)] * 2,
    "own rank's only": [range(EXPERTS // 2), range(EXPERTS // 2, EXPERTS)],
    "one rank gets nothing": [range(EXPERTS // 2)] * 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "bf16 idle": {"bf16": True, "idle": True},
    "bf16 recompute layer": {"bf16": True, "recompute": "layer"},
    "fp8": {"fp8": True},
}


def drawn(routing: str, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A rank's tokens, gates, choices, and what the loss multiplies its results with."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS[rank], WIDTH, generator=generator).bfloat16()
    gates = torch.rand(TOKENS[rank], CHOSEN, generator=generator)
    allowed = torch.tensor(ROUTINGS[routing][rank])
    choices = [allowed[torch.randperm(len(allowed), generator=generator)[:CHOSEN]] for _ in x]
    return x, gates, torch.stack(choices), torch.randn(x.shape, generator=generator)


def expert_weights() -> torch.Tensor:
    """An expert multiplies by its numbers; powers of two, so that BF16 rounds only sums and gates."""
    generator = torch.Generator().manual_seed(9)
    return 2.0 ** torch.randint(-1, 2, (EXPERTS, WIDTH), generator=generator)


def by_hand(routing: str, rank: int) -> list[torch.Tensor]:
    """Token by token in float64: results, gradients of tokens, of gates, and of all experts' numbers."""
    w = expert_weights().double()
    grad_w = torch.zeros_like(w)
    for other in (0, 1):
        x, gates, choices, factor = (t.double() for t in drawn(routing, other))
        y, grad_x, grad_gates = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(gates)
        for n in range(len(x)):
            for k in range(CHOSEN):
                e = int(choices[n, k])
                y[n] += gates[n, k] * w[e] * x[n]
                grad_x[n] += gates[n, k] * w[e] * factor[n]
                grad_gates[n, k] = (w[e] * x[n] * factor[n]).sum()
                grad_w[e] += gates[n, k] * x[n] * factor[n]
        if other == rank:
            own = [y, grad_x, grad_gates]
    return [*own, grad_w.chunk(2)[rank]]


def passed(dispatcher: Any, routing: str, rank: int, device: torch.device) -> list[torch.Tensor]:
    """The same by a dispatcher."""
    from dsv3.model.moe import Routing

    x, gates, choices, factor = (t.to(device) for t in drawn(routing, rank))
    x, gates = x.requires_grad_(), gates.requires_grad_()
    w = expert_weights().chunk(2)[rank].to(device).requires_grad_()
    given_ = Routing(choices, gates, torch.zeros(len(x), EXPERTS, device=device))
    rows, counts, handle = dispatcher.dispatch(x, given_, choices.flatten().bincount(minlength=EXPERTS))
    rows = dispatcher.arrive(rows, handle)
    assert len(rows) == int(counts.sum())
    y = rows * w.repeat_interleave(counts, dim=0).to(rows.dtype)
    out = dispatcher.settle(dispatcher.combine(y, given_, handle), given_, handle)
    (out * factor.to(out.dtype)).sum().backward()
    assert w.grad is not None and x.grad is not None and gates.grad is not None
    return [out.detach(), x.grad, gates.grad, w.grad]


def compare(kind: str) -> dict[str, Any]:
    """In a rank: every case; errors against a loop, or one process, beside those of our all_to_all."""
    import torch.distributed as dist

    from dsv3.parallel.clock import Clock
    from dsv3.parallel.experts import ExpertParallel
    from dsv3.parallel.layout import Layout, make_meshes
    from dsv3.parallel.traffic import Traffic

    rank = int(os.environ["RANK"])
    device = torch.device("cpu")
    if kind == "real":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        sys.modules["deep_ep"] = fake_deep_ep
    dist.init_process_group("nccl" if kind == "real" else "gloo")
    group = dist.group.WORLD
    assert group is not None
    buffer = deep_ep.make_buffer(group, WIDTH)
    found: dict[str, Any] = {}
    for routing in ROUTINGS:
        wanted = by_hand(routing, rank)
        for fp8 in (False, True):
            for name in ("DeepEP", "all_to_all"):
                node_E = torch.arange(EXPERTS, device=device) // (EXPERTS // 2)
                traffic, clock = Traffic(node_E, rank, 1, name == "DeepEP", name), Clock()
                ours: Any = ExpertParallel(group, traffic, clock, fp8)
                if name == "DeepEP":
                    ours = deep_ep.DeepEP(buffer, EXPERTS, traffic, clock, fp8)
                got = passed(ours, routing, rank, device)
                errors = [
                    float((a.cpu().double() - b).norm() / b.norm().clamp_min(1e-9))
                    for a, b in zip(got, wanted)
                ]
                away, least = (int(count) for count in traffic.bytes_between_nodes())
                found[f"{routing} {name}{' fp8' if fp8 else ''}"] = [errors, away, least, clock.seconds]
    if kind == "fake":
        meshes = make_meshes(Layout(1, 1, 2, 2), "cpu")
        found["log"] = overlapped(meshes)
        found["agreed"] = [
            deep_ep.agreed(why, group, device) for why in (None, "no", None if rank else "mine", "mine")
        ]
        found |= models(meshes)
    return found


def overlapped(meshes: Any) -> list[str]:
    """What the buffer was asked and waited for in a pass, and when the shared experts worked."""
    from unittest.mock import patch

    from dsv3.parallel.world import World

    options = {"bf16": True, "hidden_size": WIDTH, "num_nextn_predict_layers": 0}
    model, batch, _ = test_weights.build(options)
    with patch.object(deep_ep, "missing", lambda *_: None):
        World(meshes.layout, meshes).spread(model)
    (moe,) = model.moe_layers().values()
    log = moe.dispatcher.buffer.log
    moe.shared_experts.register_forward_hook(lambda *_: log.append("shared"))
    moe.shared_experts.down_proj.weight.register_hook(lambda _: log.append("shared's gradients"))
    test_weights.gradients(model, batch, 0.0, range(2), 2)
    return list(log)


def models(meshes: Any) -> dict[str, Any]:
    """Whole models on two ranks, their experts dealt: gradients against one process, never in BF16."""
    from unittest.mock import patch

    from dsv3.parallel.world import World

    found: dict[str, Any] = {}
    for name, options in MODELS.items():
        options = {**options, "hidden_size": WIDTH}
        one, batch, mtp_weight = test_weights.build({**options, "bf16": False})
        sequences = test_weights.SEQUENCES
        loss = test_weights.gradients(one, batch, mtp_weight, range(sequences), 4)
        wanted = {n: p.grad for n, p in one.named_parameters()}
        for carrier, why in (("DeepEP", None), ("all_to_all", "not wanted")):
            model, _, _ = test_weights.build(options)
            world = World(meshes.layout, meshes)
            with patch.object(deep_ep, "missing", lambda *_, why=why: why):
                weights, traffic = world.spread(model, fp8=bool(options.get("fp8")))
            share = sequences // 2
            rows = range(meshes.rank * share, (meshes.rank + 1) * share)
            part = test_weights.gradients(model, batch, mtp_weight, rows, share // 2)
            weights.collect()
            total = float(world.add(torch.tensor(part, dtype=torch.float64)))
            errors = {}
            for parameter, piece in weights.pieces.items():
                if piece.local.grad is None:
                    continue
                whole = piece.distributed(piece.local.grad).full_tensor()  # type: ignore[attr-defined]
                goal = wanted[parameter]
                errors[parameter] = float((whole - goal).norm() / goal.norm().clamp_min(1e-12))
            found[f"{name} {carrier}"] = {
                "loss": abs(total - loss) / loss,
                "gradients": errors,
                "carriers": sorted({t.carrier for t in traffic.values()}),
                "row bytes": [t.row_bytes for t in traffic.values()],
            }
    return found


def in_a_pipeline(_: None) -> dict[str, Any]:
    """In one of four ranks: a DualPipeV step of two stages of two expert ranks."""
    from unittest.mock import patch

    import torch.distributed as dist

    from dsv3.parallel import experts
    from dsv3.parallel.layout import Layout, make_meshes
    from dsv3.parallel.pipeline import Pipeline
    from tests.model.build import tiny_model
    from tests.parallel.pipeline import test_pipeline as steps

    sys.modules["deep_ep"] = fake_deep_ep
    dist.init_process_group("gloo")
    meshes = make_meshes(Layout(2, 1, 2, 2), "cpu")
    place = meshes.place("data")
    every = [steps._batches(False, seed) for seed in range(2)]
    share = steps._share(every[0] + every[1], 1)

    def model() -> Any:
        made = tiny_model(num_hidden_layers=7, num_nextn_predict_layers=1, hidden_size=WIDTH)
        made.model.embed_tokens.compute_dtype = torch.bfloat16
        return made

    errors = []
    for why in ("not wanted", None):
        whole = model()
        pipeline = Pipeline(model(), "dualpipev", meshes.group("pipeline"), steps.LENGTH)
        with patch.object(deep_ep, "missing", lambda *_, why=why: why):
            experts.apply(whole, meshes, 4, dtype=torch.bfloat16)
            experts.apply(pipeline.part, meshes, 4, dtype=torch.bfloat16)
        steps._one_process(whole, every[place], share, 0.3)
        pipeline.accumulate(every[place], share, 0.3)
        wanted = {name: p.grad for name, p in whole.named_parameters()}
        errors.append(
            {
                name: float((p.grad - wanted[name]).norm() / wanted[name].norm())
                for name, p in pipeline.part.named_parameters()
            }
        )
    (buffer,) = {
        layer.mlp.dispatcher.buffer
        for layer in pipeline.part.modules()
        if isinstance(getattr(getattr(layer, "mlp", None), "dispatcher", None), deep_ep.DeepEP)
    }
    travelling = most = 0
    for line in buffer.log:
        travelling += -1 if line.startswith("wait") else 1
        most = max(most, travelling)
    theirs, ours = errors
    return {"ours": ours, "theirs": theirs, "most": most, "left": travelling}


@cache
def results() -> list[dict[str, Any]]:
    return run_ranks(2, "tests.parallel.test_deep_ep:compare", "fake")


def bound(routing: str, fp8: bool, what: int) -> float:
    """Tokens in FP8 are rounded to a sixteenth, gates and sums in BF16 to a 256th; both at worst."""
    return 0.05 if fp8 and what in (0, 2, 3) else 0.008


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_as_token_by_token(routing: str, fp8: bool) -> None:
    """Results and the gradients of tokens, gates and experts; nothing is further off than by all_to_all."""
    check(results(), routing, fp8)


def check(found: list[dict[str, Any]], routing: str, fp8: bool) -> None:
    end = " fp8" if fp8 else ""
    for rank in found:
        (errors, *_), (theirs, *_) = rank[f"{routing} DeepEP{end}"], rank[f"{routing} all_to_all{end}"]
        for what, (error, their) in enumerate(zip(errors, theirs, strict=True)):
            assert error < bound(routing, fp8, what), what
            assert error < 1.5 * their + 2e-3, what


def test_whole_models() -> None:
    """Gradients of two ranks together are one process's (FP32 or FP8), no further off than by all_to_all."""
    for found in results():
        for name in MODELS:
            ours, theirs = found[f"{name} DeepEP"], found[f"{name} all_to_all"]
            assert ours["carriers"] == ["DeepEP"]
            assert theirs["carriers"] == ["all_to_all_single (DeepEP not: not wanted)"]
            assert ours["loss"] < 1e-3
            errors, others = ours["gradients"], theirs["gradients"]
            assert errors.keys() == others.keys()
            fp8 = name == "fp8"  # where a tile of gradients spans other tokens than in one process
            assert sum(errors.values()) < (1.3 if fp8 else 1.05) * sum(others.values())
            for parameter, error in errors.items():
                assert error < (0.15 if fp8 else 2 * others[parameter] + 5e-3), (name, parameter)


def test_shared_experts_work_while_tokens_travel() -> None:
    """Forward: tokens out, the shared experts, wait. Backward: gradients home, theirs, wait."""
    for found in results():
        assert found["log"] == [
            "dispatch", "shared", "wait dispatch", "combine", "wait combine",
            "dispatch again", "wait dispatch again", "combine", "shared's gradients", "wait combine",
        ]  # fmt: skip


@pytest.mark.slow
def test_two_micro_batches_travel_at_once() -> None:
    """In DualPipeV: gradients are those of the same expert ranks without a pipeline, in BF16."""
    for found in run_ranks(4, "tests.parallel.test_deep_ep:in_a_pipeline"):
        assert found["most"] == 2 and found["left"] == 0
        ours, theirs = found["ours"], found["theirs"]
        assert ours.keys() == theirs.keys() and max(theirs.values()) < 0.05
        # Sums are rounded in another order where the graph is cut, which all_to_all shows too.
        assert sum(ours.values()) < 1.1 * sum(theirs.values())
        assert all(error < 2 * theirs[name] + 5e-3 for name, error in ours.items())


def test_a_rank_that_cannot_stops_the_others() -> None:
    first, second = (found["agreed"] for found in results())
    assert first == [None, "no", "mine", "mine"]
    assert second == [None, "no", "another rank cannot use it", "mine"]


def test_bytes_are_those_of_one_copy_a_node() -> None:
    """Two nodes of a rank: a token that has experts on the other one goes there once."""
    for rank, found in enumerate(results()):
        for routing in ROUTINGS:
            choices = drawn(routing, rank)[2] // (EXPERTS // 2)
            rows = int((choices != rank).sum())
            tokens = int((choices != rank).any(dim=1).sum())
            assert found[f"{routing} DeepEP"][1:3] == [tokens, tokens]
            assert found[f"{routing} all_to_all"][1:3] == [rows, tokens]
        full, less = 2 * WIDTH, WIDTH + 4 * WIDTH // 128
        assert set(found["bf16 DeepEP"]["row bytes"]) == {4 * full}
        assert set(found["fp8 DeepEP"]["row bytes"]) == {less + 3 * full}
        assert set(found["fp8 all_to_all"]["row bytes"]) == {2 * less + 2 * full}


@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 9), chosen=st.integers(1, 4))
def test_places_of_rows(seed: int, tokens: int, chosen: int) -> None:
    """Rows are sorted by expert, ties by arrival; sums are those of a loop, whatever is another rank's."""
    generator = torch.Generator().manual_seed(seed)
    local = torch.randint(-1, 4, (tokens, chosen), generator=generator)
    local[:, 0] = local[:, 0].clamp(min=0)  # who arrives has an expert here
    rows = int((local >= 0).sum())
    places = deep_ep.place(local, rows)
    pairs = sorted((int(local[n, k]), n, k) for n in range(tokens) for k in range(chosen) if local[n, k] >= 0)
    assert [(int(p) // chosen, int(p) % chosen) for p in places.order_M] == [(n, k) for _, n, k in pairs]
    y, gates = torch.randn(rows, 5, generator=generator), torch.rand(tokens, chosen, generator=generator)
    wanted = torch.zeros(tokens, 5)
    for m, (_, n, k) in enumerate(pairs):
        wanted[n] += gates[n, k] * y[m]
    torch.testing.assert_close(deep_ep._Sum.apply(y, gates, places), wanted)


class Group:
    """A process group's ranks, for who asks torch.distributed about it."""

    def __init__(self, ranks: range):
        self.ranks = ranks


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Any:
    """:func:`deep_ep.missing` where the stand-in is installed, for a case that fits but for the changes."""
    monkeypatch.setitem(sys.modules, "deep_ep", fake_deep_ep)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(deep_ep.dist, "get_world_size", lambda group: len(group.ranks))
    monkeypatch.setattr(deep_ep.dist, "get_process_group_ranks", lambda group: list(group.ranks))
    monkeypatch.delenv(deep_ep.VARIABLE, raising=False)

    def missing(**changes: Any) -> str | None:
        fits = {
            "group": Group(range(8, 16)), "node_size": 8, "width": 7168, "chosen": 8, "dtype": torch.bfloat16,
            "fp8": False, "device": torch.device("cuda"),
        }  # fmt: skip
        return deep_ep.missing(**{**fits, **changes})  # type: ignore[arg-type]

    return missing


def test_it_says_why_not(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask() is None
    assert ask(group=Group(range(64))) is None
    assert ask(dtype=torch.float32, fp8=True) is None
    assert ask(device=torch.device("cpu")) == "no CUDA device"
    assert ask(dtype=torch.float32) == "it takes BF16, activations are float32"
    assert ask(width=100) == "it takes multiples of 128 up to 8064 as hidden_size, not 100"
    assert ask(width=8192) == "it takes multiples of 128 up to 8064 as hidden_size, not 8192"
    assert ask(chosen=33) == "it takes up to 32 experts a token, not 33"
    assert ask(group=Group(range(4, 12))) == "8 expert ranks in a row must share a node of 8"
    assert ask(group=Group(range(4)), node_size=2) == "4 expert ranks in a row must share a node of 2"
    assert ask(group=Group(range(6))) == "it has no settings for 6 ranks"
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    assert ask().startswith("deep_ep cannot be used: ModuleNotFoundError")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ask() == "deep_ep is not installed"
    monkeypatch.setenv(deep_ep.VARIABLE, "all_to_all")
    assert ask() == "DSV3_EXPERT_DISPATCH is all_to_all"
    monkeypatch.setenv(deep_ep.VARIABLE, "all-to-all")
    with pytest.raises(UserError, match="did you mean all_to_all"):
        ask()


def test_a_buffer_that_cannot_be_made(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs without NVLink: one line with the way out. It is never asked for RDMA on one node."""
    with pytest.raises(Failure, match=r"AssertionError .*DSV3_EXPERT_DISPATCH=all_to_all does without"):
        deep_ep.make_buffer(Group(range(8)), 7168)  # type: ignore[arg-type]
    with pytest.raises(Failure, match="NVSHMEM is disabled"):
        deep_ep.make_buffer(Group(range(16)), 7168)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_with_the_library() -> None:
    """DeepEP itself between two GPUs, against the loop and beside all_to_all over NCCL."""
    pytest.importorskip("deep_ep")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs with NVLink between them")
    found = run_ranks(2, "tests.parallel.test_deep_ep:compare", "real")
    for routing in ROUTINGS:
        for fp8 in (False, True):
            check(found, routing, fp8)
