"""A plan as a table for people, at most 110 columns wide."""

from collections.abc import Sequence

from flowtilt.io.columns import aligned, wrapped
from flowtilt.plan.machine import LINK_REACHED, LINKS
from flowtilt.plan.memory import CONTEXT, GIB, SPARE
from flowtilt.plan.meter import added
from flowtilt.plan.plan import Plan
from flowtilt.plan.requests import PATCH, Requests

PRECISIONS = {"half": "16-bit products", "tf32": "fp32 convolutions, as TF32", "single": "other fp32 products"}


def table(plan: Plan) -> str:
    """Parameters, memory, work and hours; the last line says the whole."""
    m = plan.machine
    head = f"{plan.recipe.name} on {m.gpus} x {m.gpu} of {m.gib:.4g} GiB: every figure is computed, none is measured"
    shapes = f"shapes: {plan.costs.source}; images of {plan.costs.resolution} pixels{_sources(plan)}; base in {plan.costs.dtype}"
    return "\n\n".join(
        [
            "\n".join([head, *wrapped(shapes, "")]),
            _parameters(plan),
            _memory(plan),
            _work(plan),
            *([_sent(plan)] if plan.messages else []),
            "\n".join(_notes(plan)),
            "\n".join(wrapped(summary(plan), "")),
        ]
    )


def _sources(plan: Plan) -> str:
    side = plan.costs.source_resolution
    return f" and source images of {side}" if side else ""


def summary(plan: Plan) -> str:
    """The plan in one sentence."""
    r, m, peak = plan.recipe.rollout, plan.machine, plan.peak
    evaluations = sum(effort.evaluations for effort in plan.work.values())
    flops = sum(sum(effort.flops.values()) for effort in plan.work.values())
    fit = f"fits with {_micro_batches(plan)}, peak {peak.total / GIB:.1f} GiB in {peak.name}"
    if not plan.fits:
        over = peak.total / GIB - (1 - SPARE) * m.gib
        needs = f"{peak.name} needs {peak.total / GIB:.1f} GiB with {_micro_batches(plan)}"
        fit = f"DOES NOT FIT: {needs}, {over:.1f} more than {100 * (1 - SPARE):.0f} % of {m.gib:.4g} GiB"
    return (
        f"{plan.recipe.name}: {plan.recipe.rollouts} rollouts of {r.prompts} x {r.images_per_prompt} images = "
        f"{amount(evaluations)} network evaluations, {operations(flops)}, about {duration(plan.hours)} on {m.gpus} {m.gpu} "
        f"at {100 * plan.utilisation:.3g} % ({_rounded(plan.hours * m.gpus)} GPU-hours); {fit}"
    )


def _parameters(plan: Plan) -> str:
    rows = [["parameters", "millions", "GiB"]]
    rows += [[name, f"{found.number / 1e6:,.1f}", f"{found.bytes / GIB:.2f}"] for name, found in plan.weights.items()]
    return aligned(rows)


def _memory(plan: Plan) -> str:
    kept = sum(plan.resident.values())
    rows = [["memory of one GPU, GiB", "resident", "held", "activations", "total"]]
    for phase in plan.phases:
        cells = (kept, sum(phase.held.values()), phase.activations, phase.total)
        rows.append([phase.name, *(f"{cell / GIB:.2f}" for cell in cells)])
    said = "resident: " + ", ".join(f"{what} {count / GIB:.2f}" for what, count in plan.resident.items() if count >= 0.005 * GIB)
    held = [f"{what} {_bytes(count)}" for what, count in plan.peak.held.items()]
    chosen = "given" if isinstance(plan.recipe.micro_batch, int) else "auto"
    how = "computes activations anew, and keeps" if plan.recompute else "keeps"
    saved = f"training {how} {_bytes(plan.training.each.saved)} of a row until its backward pass"
    spare = f"{100 * SPARE:.0f} % of {plan.machine.gib:.4g} GiB are left to what is not modelled"
    visits = ["text encoders and reward models are on the GPU only while they work"] if plan.offload else []
    beside = ", ".join(f"{what} {count / GIB:.2f}" for what, count in plan.host.items() if count >= 0.005 * GIB)
    notes = [
        said,
        f"held in {plan.peak.name}: {', '.join(held)}",
        "; ".join([f"{_micro_batches(plan)} ({chosen})", saved, *visits, spare]),
        f"host memory about {sum(plan.host.values()) / GIB:.0f} GiB for each GPU's process: {beside}",
    ]
    return "\n".join([aligned(rows), *(line for note in notes for line in wrapped(note))])


def _micro_batches(plan: Plan) -> str:
    return "micro-batches " + ", ".join(f"{kind} {rows}" for kind, rows in plan.micro_batches.items())


def _work(plan: Plan) -> str:
    steps = plan.recipe.rollouts
    rows = [["work", "network evaluations", "per rollout", "operations", "time", "share"]]
    for name, effort in plan.work.items():
        calls = [f"{effort.evaluations:,}", f"{effort.evaluations / steps:,.0f}"] if effort.evaluations else ["", ""]
        time = [duration(effort.hours), f"{100 * effort.hours / plan.hours:.0f} %"]
        rows.append([name, calls[0], "" if name == "evaluate" else calls[1], operations(sum(effort.flops.values())), *time])
    flops = added(*(effort.flops for effort in plan.work.values()))
    calls = sum(effort.evaluations for effort in plan.work.values())
    rows.append(["all", f"{calls:,}", "", operations(sum(flops.values())), duration(plan.hours), ""])
    training = [effort for name, effort in plan.work.items() if name != "evaluate"]
    one = operations(sum(sum(effort.flops.values()) for effort in training) / steps)
    time = duration(sum(effort.hours for effort in training) / steps)
    shares = {PRECISIONS[p]: plan.machine.hours({p: count}, plan.utilisation) / plan.hours for p, count in flops.items() if count}
    spent = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    said = [
        f"per rollout: {one}, {time}; {plan.evaluations} evaluations of {plan.recipe.evaluate.images} images",
        f"time by precision: {spent}",
    ]
    return "\n".join([aligned(rows), *(line for text in said for line in wrapped(text))])


def _notes(plan: Plan) -> Sequence[str]:
    assumed = (
        f"assumed: {100 * plan.utilisation:.3g} % of each precision's peak, every image scored, {CONTEXT / GIB:g} GiB for the CUDA context"
    )
    if plan.costs.caption_tokens:
        assumed += f", captions of {plan.costs.caption_tokens} tokens"
    if plan.machine.gpus > 1:
        where = f", {_link(plan.machine.between)} between machines" if plan.machine.nodes > 1 else ""
        assumed += f", {_link(plan.machine.link)} between the GPUs of a machine{where}, of which messages reach {100 * LINK_REACHED:.0f} %"
    beside = [f"not counted, reward {name}: {why}" for name, why in plan.beside.items()]
    asked = [request_line(name, found) for name, found in plan.requests.items()]
    return [line for note in (assumed, *beside, *asked) for line in wrapped(note, "")]


def request_line(name: str, found: Requests) -> str:
    """What a reward asks of its server."""
    money = f", {_rounded(found.cost)} in money" if found.cost else ""
    tokens = f"about {amount(found.whole * found.tokens)} tokens if a picture is one per {PATCH} x {PATCH} pixels{money}"
    ends = f"; {found.ends}" if found.ends else ""
    return f"requests to {name}: {amount(found.rollout)} per rollout, {amount(found.whole)} with all evaluations, {tokens}{ends}"


def _link(told: str) -> str:
    return f"{told} ({LINKS[told]:g} GB/s)" if told in LINKS else f"{told} GB/s"


def _sent(plan: Plan) -> str:
    """What each GPU sends to the others."""
    rows = [["sent by each GPU per rollout", "messages", "MiB"]]
    rows += [[name, f"{one.number:,.0f}", f"{one.sent / 2**20:,.3g}"] for name, one in plan.messages.items()]
    efficiency = (
        f"efficiency {100 * plan.efficiency:.3g} %: the rest goes to messages and uneven shares; "
        f"{plan.images_per_gpu_second:.3g} images per GPU-second"
    )
    return "\n".join([aligned(rows), *wrapped(efficiency)])


def amount(number: float) -> str:
    """1234567 as 1.23 million."""
    for unit, name in ((1e9, " billion"), (1e6, " million")):
        if number >= unit:
            return _rounded(number / unit) + name
    return f"{number:,.0f}"


def operations(flops: float) -> str:
    """Floating-point operations with their unit."""
    for unit, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if flops >= unit:
            return f"{_rounded(flops / unit)} {name}"
    return f"{_rounded(flops / 1e9)} GFLOP" if flops else "0"


def duration(hours: float) -> str:
    """Hours with their unit, or minutes, seconds, milliseconds."""
    for unit, name in ((1, "h"), (1 / 60, "min"), (1 / 3600, "s")):
        if hours >= unit:
            return f"{_rounded(hours / unit)} {name}"
    return f"{_rounded(3.6e6 * hours)} ms" if hours else ""


def _rounded(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def _bytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.2f} MiB"
