"""Plans as text."""

from collections.abc import Sequence

from rich.table import Table

from dive.config import PlanTable
from dive.plan import construction, flops
from dive.plan.capacity import Capacity, shortages
from dive.plan.stages import Plan
from dive.units import count, duration, operations, precise, size


def headline(plan: Plan) -> list[str]:
    """The first lines of a run: parameters, memory, disk, time."""
    p, job = plan.parameters, plan.job
    with_extras = p["total"] + p["noise"] + p["bias"]
    names = " and ".join(name for name, key in (("router noise", "noise"), ("expert biases", "bias")) if p[key])
    extras = f" ({precise(with_extras)} with {names})" if names else ""
    memory = f"{size(plan.host)} of host memory"
    if job.on_gpu:
        memory += f", {size(plan.device)} of each device's"
    disk = f"{size(plan.store)} store, {size(plan.export)} export, {size(plan.checkpoints)} checkpoints"
    return [
        f"plan     {precise(p['dense'])} dense → {precise(p['total'])} total{extras}, {precise(p['active'])} active, "
        f"{precise(p['trained'])} trained on {count(plan.retraining_tokens)} tokens",
        f"         {memory}; disk: {disk}; "
        f"about {duration(plan.seconds)} on {job.place} at {job.device.utilisation:.0%} of its peak"
        + (f" × {job.world}" if job.world > 1 else ""),
    ]


def stage_table(plan: Plan) -> Table:
    """Every stage's tokens, operations, memory, disk and time."""
    table = Table(title=f"Plan for {plan.job.config.model.name} on {plan.job.place}")
    table.add_column("stage")
    for name in ("trained", "tokens", "operations", "host memory", "device memory", "disk", "time"):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        table.add_row(
            stage.name,
            f"{stage.trained:,}" if stage.trained else "–",
            count(stage.tokens) if stage.tokens else "–",
            operations(stage.operations),
            size(stage.memory.host_peak),
            size(stage.memory.device_peak) if plan.job.on_gpu else "–",
            size(stage.written) if stage.written else "–",
            duration(stage.seconds),
        )
    table.add_section()
    table.add_row(
        "all",
        f"{plan.parameters['trained']:,}",
        count(sum(stage.tokens for stage in plan.stages)),
        operations(sum(stage.operations for stage in plan.stages)),
        size(plan.host),
        size(plan.device) if plan.job.on_gpu else "–",
        size(plan.disk),
        duration(plan.seconds),
    )
    return table


def memory_table(plan: Plan) -> Table:
    """What fills the memory at each stage's peak."""
    table = Table(title=f"Memory of {plan.job.config.model.name} on {plan.job.place}")
    for name in ("stage", "where", "what", "bytes"):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    for stage in plan.stages:
        for where, items in (("host", stage.memory.host), ("device", stage.memory.device)):
            for what, number in items.items():
                if number:
                    table.add_row(stage.name, where, what, size(number))
        table.add_section()
    return table


def construction_rows(plan: Plan) -> tuple[str, list[tuple[str, str, str, str, str]]]:
    """(title, rows of step, operations of one layer and of all, device memory, host memory) of building the experts."""
    job = plan.job
    s, domains, moe = job.shapes, job.config.calibration_domains, job.config.moe
    tokens = job.building_sequences(job.groups, experts=s.experts) * domains.length
    settings = construction.refinement(job.config)
    hidden = tokens * s.hidden * job.weight
    sampled = min(moe.distillation.tokens, tokens)
    costs: list[tuple[str, float, float, float]] = [
        ("dense layer forward", tokens * flops.dense_layer(s, domains.length), 0.0, hidden),
        ("second moments, one group at a time", construction.moments(s, tokens), construction.moment_bytes(s), 0.0),
        (
            f"second moments, {s.experts} groups at once",
            construction.moments(s, tokens),
            s.experts * construction.moment_bytes(s),
            0.0,
        ),
        ("least squares, one expert", construction.solve(s), construction.solve_bytes(s), 0.0),
        (f"least squares, {s.experts} experts", s.experts * construction.solve(s), construction.solve_bytes(s), 0.0),
    ]
    solving = construction.solve_bytes(s)
    if job.eliminates:
        eliminating = construction.eliminate_bytes(s)
        costs.append((f"elimination, {s.experts} experts", s.experts * construction.eliminate(s), eliminating, 0.0))
        solving = max(solving, eliminating)
    costs.append(("router", construction.router_fit(s, moe.distillation, sampled), 0.0, 0.0))
    if settings is not None:
        costs += [
            (
                f"refinement: {settings.derivations} derivations, {settings.steps} steps of {settings.batch} tokens",
                construction.refine(s, settings, moe.distillation, tokens, domains.length),
                construction.refine_device_bytes(s, settings),
                construction.refine_host_bytes(s, tokens, job.weight),
            ),
            (
                f"{'elimination and ' if job.eliminates else ''}least squares of the refinement",
                construction.refine_solves(s, settings, eliminates=job.eliminates),
                solving,
                0.0,
            ),
        ]
    rows = [
        (
            what,
            operations(number),
            operations(number * s.sparse),
            size(on_device) if on_device else "–",
            size(on_host) if on_host else "–",
        )
        for what, number, on_device, on_host in costs
    ]
    title = f"{job.config.model.name}: building {s.experts} experts of {s.width} of {s.channels} channels from {tokens:,} tokens"
    return title, rows


def construction_table(plan: Plan) -> Table:
    """What reconstruction and refinement cost."""
    title, rows = construction_rows(plan)
    table = Table(title=title)
    for name in ("step", "one layer", "all layers", "device memory", "host memory"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def full_text(plan: Plan, capacity: Capacity) -> Sequence[Table | str]:
    """What ``python -m dive.plan`` prints."""
    config = plan.job.config.plan
    if config.table is PlanTable.construction:
        return [construction_table(plan)]
    table = memory_table(plan) if config.table is PlanTable.memory else stage_table(plan)
    return [*headline(plan), table, *notes(plan), *shortages(plan, capacity)]


def notes(plan: Plan) -> list[str]:
    """What the figures take for granted."""
    job = plan.job
    device = job.device
    found = [
        f"{job.place}: {device.bfloat16:.3g} FLOP/s in bfloat16, {device.float32:.3g} in float32, at "
        f"{device.utilisation:.0%}; {size(device.bandwidth)}/s of memory bandwidth"
        + (f", {size(device.memory)} of memory" if device.memory is not None else "")
    ]
    if job.config.eval.windows is None:
        found.append(
            f"eval.windows=null: {job.config.plan.windows} windows of each text taken for granted (plan.windows)"
        )
    if job.tasks:
        sequences = count(sum(number for number, _ in job.tasks))
        found.append(
            f"eval.tasks: {sequences} sequences taken for granted (plan.questions, answers and question_tokens)"
        )
    if not job.on_gpu and "float16" in job.dtype + job.training_dtype:
        found.append(f"{job.dtype} on a CPU is slow: model.dtype=float32, or trainer=gpu plan.device=h100")
    return found
