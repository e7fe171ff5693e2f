"""The top of an evaluation's page: what was evaluated and how, the first score, what to be careful about."""

import math
from collections import Counter
from html import escape

from flowtilt.estimate import EXACT, Estimate
from flowtilt.report.evaluation.estimates import column_decimals, missing, rows_of, verdict, written
from flowtilt.report.evaluation.loading import Record, Results
from flowtilt.report.numbers import counted, duration

GENERIC = {
    "lora",
    "transformer",
    "pytorch_lora_weights.safetensors",
    "diffusion_pytorch_model.safetensors",
    "adapter_model.safetensors",
    "generator_ema.pt",
    "",
}
"""Parts of a LoRA's path that don't tell it from others."""
FORMS = {
    "eta": "eta {}",
    "steps": "{} solver steps",
    "guidance": "guidance {}",
    "embedded_guidance": "embedded guidance {}",
    "resolution": "{} px",
    "images_per_prompt": "{} per prompt",
    "seed": "seed {}",
    "t5_length": "T5 length {}",
    "dtype": "{}",
}


ALONE = {
    "higher": "tuned scores <b>higher</b>: the interval of the difference excludes 0",
    "lower": "tuned scores <b>lower</b>: the interval of the difference excludes 0",
    "may be chance": "the difference may be chance: its interval includes 0",
    "no difference": "tuned and base score the same on average",
    "no interval": "the difference has no interval, so it may be chance",
}
FEW_WORDS = {
    "higher": "<b>higher</b>",
    "lower": "<b>lower</b>",
    "may be chance": "different by what may be chance",
    "no difference": "the same on average",
    "no interval": "without an interval",
}
"""What `estimates.verdict` says of one score, and of several."""


def headline(results: Results) -> str:
    """The first score of the first set stands for the whole: whoever evaluates names it first."""
    about = ["flowtilt", "evaluation", ", ".join(one.name for one in results.sets)]
    about += [duration(results.seconds)] if math.isfinite(results.seconds) else []
    parts = [
        f'<p class="about">{" · ".join(escape(part) for part in about if part)}</p>',
        f"<h1>{escape(subject(results.protocol))}</h1>",
        _first_score(results),
        f"<p>{_tally(results)}</p>" if results.compares else "",
        *(f'<p class="caution">{said}</p>' for said in _cautions(results)),
        f'<p class="protocol">{escape(one_line(results.protocol))}</p>',
    ]
    return f"<header>{''.join(parts)}</header>"


def subject(protocol: Record) -> str:
    """The model and what was trained, by the parts of their paths that tell them from others."""
    model = str(protocol.get("model") or "unknown model").rstrip("/").split("/")[-1]
    lora = protocol.get("lora")
    parts = [*(lora if isinstance(lora, list) else []), protocol.get("weights")]
    names = [_lora_name(part, model) for part in parts if part]
    return f"{model} with {' and '.join(names)}" if names else model


def _lora_name(lora: object, model: str) -> str:
    """The last part of its path that says something, with the folder before it where the model is called the same."""
    path = str(lora.get("path") or "a LoRA") if isinstance(lora, dict) else str(lora)
    parts = path.split("/")
    named = next((place for place in reversed(range(len(parts))) if parts[place] not in GENERIC), None)
    if named is None:
        return path
    if parts[named] != model:
        return parts[named]
    return f"the LoRA of {'/'.join(filter(None, parts[max(0, named - 1) : named + 1]))}"


def one_line(protocol: Record) -> str:
    """euler, 40 steps, guidance 1, 512 px …; only what is known."""
    said = [str(protocol["solver"])] if isinstance(protocol.get("solver"), str) else []
    shown = {key: protocol[key] for key in FORMS if isinstance(protocol.get(key), int | float | str)}
    if isinstance(images := shown.get("images_per_prompt"), int):
        shown["images_per_prompt"] = counted(images, "image")
    return ", ".join(said + [FORMS[key].format(f"{value:g}" if isinstance(value, float) else value) for key, value in shown.items()])


def _first_score(results: Results) -> str:
    one = next((one for one in results.sets if one.columns), None)
    if one is None:
        return ""
    column = one.columns[0]
    which, of = rows_of(one, column)[0]
    digits = column_decimals(column)
    figures = [_figure(v if results.compares else "", of[v], digits, newest=v == "tuned") for v in results.variants]
    measure = " · ".join(escape(part) for part in (f"{column.name} on {one.name}", which) if part)
    arrow = '<div class="arrow" aria-hidden="true">→</div>'
    return f'<p class="measure">{measure}</p><div class="result">{arrow.join(figures)}</div>'


def _figure(name: str, estimate: Estimate, digits: int, newest: bool) -> str:
    value = written(estimate.value, digits) if estimate.known else "–"
    kind = "exact 95% bound over prompts" if estimate.kind == EXACT else "95% interval"
    interval = f"{kind} {written(estimate.low, digits)} to {written(estimate.high, digits)}".replace("-", "−")
    none = f"no interval: {estimate.why_none}"
    more = [(interval if estimate.has_interval else none) if estimate.known else "not scored", missing(estimate)]
    said = "".join(f"<span>{part}</span>" for part in more if part)
    title = f"<span>{name}</span>" if name else ""
    return f'<div class="{"big newest" if newest else "big"}">{title}<strong>{value.replace("-", "−")}</strong>{said}</div>'


def _tally(results: Results) -> str:
    """How many of the scores are higher; further scores of the same reward are no more evidence."""
    said = [verdict(c.difference.estimate) for one in results.sets for c in one.columns if c.difference and not c.is_detail]
    words = Counter(word.partition(":")[0] for word in said if word)
    if not words:
        return ""
    link = '<a href="#differences">Differences with intervals</a>'
    if words.total() == 1:
        (word,) = words
        return f"Compared image by image, {ALONE[word]}. {link}"
    parts = [f"{form} in {words[word]}" for word, form in FEW_WORDS.items() if words[word]]
    return f"Of {words.total()} scores, compared image by image, tuned is {', '.join(parts)}. {link}"


def _cautions(results: Results) -> list[str]:
    lost = [
        f"{escape(column.name)} on {escape(one.name)}"
        for one in results.sets
        for column in one.columns
        if not column.is_detail and any(summary.overall.missing for summary in column.of.values())
    ]
    found = [f"Not all of the folder's files could be read: {escape('; '.join(results.lost))}."] if results.lost else []
    if lost:
        found.append(f'<a href="#missing">Some images have no score</a>: {_few(lost)}. The means are over the others.')
    if results.left_out:
        found.append(f'<a href="#left-out">Left out</a>: {_few([f"{escape(r)} on {escape(s)}" for s, r, _ in results.left_out])}.')
    return found


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
