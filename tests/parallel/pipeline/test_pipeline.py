"""Every schedule in real processes against the step of one process: losses, gradients, loads, GEMMs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from dsv3.plan import schedules as planned
from tests.parallel.ranks import run_ranks

LENGTH, MICRO, SEQUENCES = 8, 6, 2
TIMEOUT = 500  # seconds; alone on two cores a few
SCHEDULES = ("1f1b", "interleaved", "zbv", "dualpipev")
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": (SCHEDULES, {}),
    "documents, two MTP modules": (("interleaved", "dualpipev"), {"documents": True, "depth": 2}),
    "fp8": (("zbv", "dualpipev"), {"fp8": True}),
    "recompute report, MTP weight 0": (
        ("1f1b", "dualpipev"),
        {"recompute": "report", "mtp_weight": 0.0},
    ),
    "recompute layer, no MTP module": (("zbv", "dualpipev"), {"recompute": "layer", "depth": 0}),
}


# What follows until the tests runs in the ranks' own processes, where torch is imported late.


def _model(depth: int = 1, fp8: bool = False, recompute: str = "none") -> Any:
    from dsv3.config.fp8 import FP8Section
    from dsv3.quant import fp8 as eight
    from dsv3.train import recompute as again
    from tests.model.build import tiny_model

    model = tiny_model(num_hidden_layers=7, num_nextn_predict_layers=depth, aux_loss_alpha=0.01)
    if fp8:
        eight.apply(model, FP8Section())
    again.apply(model, recompute)  # type: ignore[arg-type]
    return model


def _batches(documents: bool, seed: int = 3, count: int = MICRO) -> list[Any]:
    import torch

    from dsv3.data.loader import Batch

    generator, width = torch.Generator().manual_seed(seed), LENGTH + 3
    rows = [torch.randint(61, (SEQUENCES, width), generator=generator) for _ in range(count)]
    starts = torch.rand(SEQUENCES, width, generator=generator) < 0.2
    return [Batch(row, starts.cumsum(1).int() if documents else None) for row in rows]


def _one_process(model: Any, batches: list[Any], share: Any, mtp_weight: float) -> tuple[list[float], dict]:
    """Losses (main, MTP, balance) and loads; gradients stay in the model."""
    import torch

    from dsv3.train.objective import language_loss

    losses, loads = torch.zeros(3), {}
    for batch in batches:
        loss, parts = language_loss(model, batch, LENGTH, share, mtp_weight)
        loss.backward()
        losses += torch.stack((parts.main, sum(parts.mtp, torch.zeros(())), parts.balance))
        for layer, stats in parts.router.items():
            loads[layer] = loads.get(layer, 0) + stats.load_E
    return losses.tolist(), {layer: load_E.tolist() for layer, load_E in loads.items()}


def _share(batches: list[Any], depth: int) -> Any:
    from dsv3.data.targets import labels
    from dsv3.model.loss import Share

    counts = [sum(int((labels(b, LENGTH, k) >= 0).sum()) for b in batches) for k in range(1 + depth)]
    return Share(counts, SEQUENCES * len(batches))


@contextmanager
def _products(counted: Counter[str], native: bool) -> Iterator[None]:
    """Counts matrix products in FP8 and native ones, which takes a profiler and so seconds."""
    from unittest.mock import patch

    from torch.profiler import ProfilerActivity, profile

    from dsv3.ops import fp8

    def counting(name: str) -> Any:
        function = getattr(fp8, name)

        def call(*arguments: Any) -> Any:
            counted[name] += 1
            return function(*arguments)

        return patch.object(fp8, name, call)

    recorder = profile(activities=[ProfilerActivity.CPU]) if native else nullcontext()
    with counting("linear"), counting("dgrad"), counting("wgrad"), recorder as found:
        yield
    if found is None:
        return
    for event in found.profiler.kineto_results.events():  # profile.events() takes seconds to name them
        if event.name() in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
            counted["native"] += 1


def _error(found: Any, wanted: Any) -> float:
    assert found is not None
    return (found - wanted).norm().item() / max(1e-12, wanted.norm().item())


def two_or_four(names: list[str]) -> list[dict]:
    """In a rank: the named variants under their schedules (plain ones twice); what the last step made."""
    import torch.distributed as dist

    from dsv3.parallel.pipeline import Pipeline
    from dsv3.parallel.pipeline.cut import V_SHAPED

    dist.init_process_group("gloo")
    group = dist.group.WORLD
    micro = MICRO if dist.get_world_size() == 2 else 8  # DualPipeV: one a stage at least
    found = []
    for name in names:
        schedules, variant = VARIANTS[name][0], dict(VARIANTS[name][1])
        mtp_weight, documents = variant.pop("mtp_weight", 0.3), variant.pop("documents", False)
        model, batches = _model(**variant), _batches(documents, count=micro)
        share = _share(batches, variant.get("depth", 1))
        counted: Counter[str] = Counter()
        with _products(counted, name == "plain"):
            losses, loads = _one_process(model, batches, share, mtp_weight)
        wanted = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        for schedule in schedules:
            own = _model(**variant)
            pipeline = Pipeline(own, schedule, group, LENGTH)
            mine: Counter[str] = Counter()
            with _products(mine, name == "plain"):
                made = pipeline.accumulate(batches, share, mtp_weight)
            if name == "plain":
                pipeline.part.zero_grad()
                pipeline.trace.on = True
                made = pipeline.accumulate(batches, share, mtp_weight)
            errors = {
                key: _error(p.grad, wanted[key])
                for key, p in pipeline.part.named_parameters()
                if key in wanted
            }
            shared = own.model.embed_tokens if schedule in V_SHAPED else None
            found.append(
                {
                    "name": name,
                    "schedule": schedule,
                    "losses": [float(made.main), float(sum(made.mtp)), float(made.balance)],
                    "wanted losses": losses,
                    "error": max(errors.values()),
                    "seen": sorted(errors),
                    "wanted": sorted(wanted),
                    "loads right": all(
                        loads[layer] == stats.load_E.tolist() for layer, stats in made.router.items()
                    ),
                    "layers": sorted(made.router),
                    "wanted layers": sorted(loads),
                    "products": mine,
                    "wanted products": counted,
                    "ran": [jobs for jobs, _, _ in pipeline.trace.ran],
                    "repeated": sorted(pipeline.repeated),
                    "one embedding": shared is not None
                    and all(each.embedding is shared for each in pipeline.slices if each.begins or each.ends),
                }
            )
    return found


def with_experts(_: None) -> list[dict]:
    """In a rank of 2 pipeline x 2 expert ranks: every schedule, each data rank with rows of its own."""
    from unittest.mock import patch

    import torch
    import torch.distributed as dist

    from dsv3.model.loss import Share
    from dsv3.parallel import experts
    from dsv3.parallel.experts import Trip
    from dsv3.parallel.layout import Layout, make_meshes
    from dsv3.parallel.pipeline import Pipeline

    dist.init_process_group("gloo")
    meshes = make_meshes(Layout(2, 1, 2, 2), "cpu")
    data, place = meshes.group("data"), dist.get_rank(meshes.group("data"))
    every = [_batches(False, seed) for seed in range(2)]
    one = _share(every[0] + every[1], 1)
    share = Share(one.tokens, one.sequences)
    reference = _model()
    losses, loads = _one_process(reference, every[0] + every[1], share, 0.3)
    wanted = {key: p.grad for key, p in reference.named_parameters()}
    travelling, most = 0, 0
    start, wait = Trip.start, Trip.wait

    def started(self: Trip, *arguments: Any, **options: Any) -> None:
        nonlocal travelling, most
        start(self, *arguments, **options)
        travelling += 1
        most = max(most, travelling)

    def waited(self: Trip) -> torch.Tensor:
        nonlocal travelling
        travelling -= 1
        return wait(self)

    found = []
    for schedule in SCHEDULES:
        pipeline = Pipeline(_model(), schedule, meshes.group("pipeline"), LENGTH)
        experts.apply(pipeline.part, meshes, node_size=4)
        most = 0
        with patch.object(Trip, "start", started), patch.object(Trip, "wait", waited):
            made = pipeline.accumulate(every[place], share, 0.3)
        error = 0.0
        for key, p in pipeline.part.named_parameters():
            goal = wanted[key]
            if ".experts." in key:
                goal = goal.chunk(2)[place]
            else:
                dist.all_reduce(p.grad, group=data)
            error = max(error, _error(p.grad, goal))
        for stats in made.router.values():
            dist.all_reduce(stats.load_E, group=data)
        right = all(loads[layer] == stats.load_E.tolist() for layer, stats in made.router.items())
        found.append(
            {
                "schedule": schedule,
                "error": error,
                "losses": [float(made.main), float(sum(made.mtp)), float(made.balance)],
                "wanted losses": losses,
                "loads right": right,
                "most travelling": most,
            }
        )
    return found


# The tests.


def _check(ranks: list[list[dict]]) -> None:
    for case in zip(*ranks):
        name, schedule = case[0]["name"], case[0]["schedule"]
        where = f"{name}, {schedule}"
        summed = [sum(part) for part in zip(*(rank["losses"] for rank in case))]
        assert summed == pytest.approx(case[0]["wanted losses"], rel=1e-5), where
        tolerance = 1e-3 if name == "fp8" else 1e-5
        assert all(rank["error"] < tolerance for rank in case), (where, [rank["error"] for rank in case])
        assert {key for rank in case for key in rank["seen"]} == set(case[0]["wanted"]), where
        assert all(rank["loads right"] for rank in case), where
        layers = sorted(layer for rank in case for layer in rank["layers"])
        assert layers == case[0]["wanted layers"], where
        products = sum((Counter(rank["products"]) for rank in case), Counter())
        assert products == Counter(case[0]["wanted products"]), where
        modules = "no MTP" not in name
        if schedule in ("zbv", "dualpipev"):
            assert case[0]["one embedding"] and not any(rank["repeated"] for rank in case), where
        else:
            held = [bool(rank["repeated"]) for rank in case]
            assert held == [modules, *[False] * (len(case) - 2), modules], where


@pytest.fixture(scope="module")
def two() -> list[list[dict]]:
    """All variants on two ranks."""
    return run_ranks(2, "tests.parallel.pipeline.test_pipeline:two_or_four", list(VARIANTS), TIMEOUT)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_make_the_step_of_one(two: list[list[dict]], name: str) -> None:
    """Each matrix product exactly once, the same numbers, nothing silently off."""
    _check([[case for case in rank if case["name"] == name] for rank in two])


@pytest.mark.parametrize("name", SCHEDULES)
def test_ranks_do_what_the_plan_simulates_in_its_order(two: list[list[dict]], name: str) -> None:
    """So that ``dsv3 plan pipeline`` speaks of what runs."""
    for order, cases in zip(planned.schedule(name, 2, MICRO).orders, two):
        (case,) = (c for c in cases if c["name"] == "plain" and c["schedule"] == name)
        assert [tuple(planned.Job(*job) for job in jobs) for jobs in case["ran"]] == list(order)


def test_fp8_really_was_in_fp8(two: list[list[dict]]) -> None:
    (case,) = (c for c in two[0] if c["name"] == "fp8" and c["schedule"] == "zbv")
    products = Counter(case["wanted products"])
    assert products["linear"] == products["dgrad"] == products["wgrad"] > 100


@pytest.mark.slow
def test_four_ranks_make_the_step_of_one() -> None:
    _check(run_ranks(4, "tests.parallel.pipeline.test_pipeline:two_or_four", ["plain"], TIMEOUT))


def test_pipeline_and_expert_ranks_make_the_step_of_one() -> None:
    """Rows of two micro-batches travel at once in DualPipeV, and in no other schedule."""
    ranks = run_ranks(4, "tests.parallel.pipeline.test_pipeline:with_experts", None, TIMEOUT)
    for case in zip(*ranks):
        summed = [sum(part) for part in zip(*(rank["losses"] for rank in case))]
        assert summed == pytest.approx(case[0]["wanted losses"], rel=1e-5)
        assert all(rank["error"] < 1e-5 and rank["loads right"] for rank in case), case
        most = {rank["most travelling"] for rank in case}
        assert most == ({2} if case[0]["schedule"] == "dualpipev" else {1}), case
