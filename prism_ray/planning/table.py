"""A plan as tables on the terminal."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from prism_ray.config.run import RunSettings
from prism_ray.planning import flow as flows
from prism_ray.planning.hardware import GIB
from prism_ray.planning.plan import Plan
from prism_ray.planning.usage import CONTEXT

WIDTH = 150
"""Columns where the output is no terminal."""


def print_plan(plan: Plan, settings: RunSettings) -> None:
    """Everything but the problems, which the job prints to stderr."""
    console = Console()
    console = Console(width=None if console.is_terminal else WIDTH, highlight=False)
    size = f"policy {plan.policy.total / 1e9:.2f} billion parameters"
    console.print(f"{settings.name}: {size}, discriminator {plan.judge.total / 1e9:.2f}", markup=False)
    for table in (_placement(plan), _memory(plan), _flow(plan), _disk(plan)):
        if table.row_count:
            console.print(table)
    console.print(_assumptions(plan), markup=False)
    for remark in plan.remarks:
        console.print(f"note: {remark}", markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    return table


def _placement(plan: Plan) -> Table:
    table = Table(title="placement: what each stage reserves, and on which nodes it would lie", title_justify="left")
    for column in ("stage", "actors", "each", "nodes"):
        table.add_column(column)
    head = next((node.name for node in plan.hardware.nodes if node.head), plan.hardware.nodes[0].name)
    table.add_row("all", "coordinator, journal", "none", head)
    for layout in plan.layouts:
        placed = plan.placed.get(layout.stage)
        kinds: dict[str, Counter[str]] = {}
        each: dict[str, str] = {}
        for group in layout.groups:
            kind = group.name.rstrip("0123456789 ")
            each[kind] = str(group.bundles[0])
            lies = placed[group.name] if placed else ("no room",) * len(group.bundles)
            kinds.setdefault(kind, Counter()).update(lies)
        for kind, nodes in kinds.items():
            where = ", ".join(f"{node}: {count}" for node, count in nodes.items())
            table.add_row(layout.stage, f"{nodes.total()} x {kind}", each[kind], where)
        table.add_section()
    return table


def _memory(plan: Plan) -> Table:
    names = (
        "weights",
        "gradients",
        "optimiser",
        "buffers",
        "activations",
        "keys, values",
        "all",
        "may have",
        "in host",
    )
    table = _table("memory of one actor at its peak, GiB", "actor", "stages", *names)
    for usage in plan.usages:
        m, limit = usage.memory, usage.limit(plan.hardware)
        parts = (m.weights, m.gradients, m.optimiser, m.buffers, m.activations, m.kv_cache)
        whole = m.device + (CONTEXT if limit is not None else 0)
        may = "host" if limit is None else _gib(limit)
        table.add_row(usage.actor, usage.stage, *map(_gib, parts), _gib(whole), may, _gib(m.host))
    return table


def _flow(plan: Plan) -> Table:
    names = ("rollouts under way", "tokens, at most", "engines hold", "generate", "judge", "train", "update")
    table = _table("flow of an update, seconds", "stage", "waits for", *names, "staleness", "rates")
    for f in plan.flows:
        seconds = ("–" if s is None else f"{s:.0f}" for s in (f.generate_s, f.judge_s, f.train_s, f.update_s))
        held = "–" if f.room == float("inf") else f"{f.room:.0f}"
        stale = f"{f.staleness:.1f}" if f.update_s is not None else "–"
        table.add_row(f.stage, f.bottleneck, f"{f.sequences}", f"{f.tokens:,}", held, *seconds, stale, f.source)
    return table


def _disk(plan: Plan) -> Table:
    table = Table(title="the run's folder", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for item in plan.disk:
        table.add_row(item.name, _gib(item.bytes))
    table.add_row("all", _gib(sum(item.bytes for item in plan.disk)), style="bold")
    return table


def _assumptions(plan: Plan) -> str:
    h = plan.hardware
    text = f"assumed: {h.gpu_gib:g} GiB a GPU, {CONTEXT / GIB:g} of them for CUDA and NCCL; responses of "
    text += f"{flows.RESPONSE_SHARE:g} and prompts of {flows.PROMPT_SHARE:g} of the longest"
    if h.gpus:
        text += f"; {h.gpu_tflops:g} Tflop/s x {flows.MFU:g} in training, {h.gpu_tb_per_s:g} TB/s x "
        text += f"{flows.MEMORY_EFFICIENCY:g} in decoding"
    return text + ". Rates that a run has measured (--measured) take the place of assumed ones."


def _gib(size: int) -> str:
    return "–" if not size else f"{size / GIB:.1f}" if size > GIB else f"{size / GIB:.3f}"
