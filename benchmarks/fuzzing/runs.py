"""Folders of runs and evaluations with damaged files: a run page, a comparison and an evaluation page come of each, or one line."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from flowtilt.config import load_recipe, to_toml
from flowtilt.report import write_report
from flowtilt.report.compare import as_json, compare, text, write_comparison
from flowtilt.report.evaluation import write_evaluation_page
from flowtilt.report.evaluation.terminal import table
from flowtilt.report.image_scores import score_summary
from flowtilt.report.reading import Reader

Payload = tuple[str, str, bytes]
"""The page to write ("report", "compare" or "evaluation"), a file's name in the folder, and what it is damaged to."""

RUN = ("metrics.jsonl", "evaluations.jsonl", "guards.jsonl", "summary.json", "environment.json", "recipe.toml")
SAMPLES = ("samples/step-000000/index.json", "samples/step-000002/scores.json")
EVALUATION = ("results.json", "scores.jsonl")


@cache
def template() -> Path:
    """A run and an evaluation of two rollouts and twelve prompts in one folder, made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="flowtilt-fuzz-"))
    (folder / "recipe.toml").write_text(to_toml(load_recipe("playground", ["rollouts=2"])))
    metrics = [
        {"rollout": s, "reward/total": 0.1 * s, "loss": 0.5 / s, "time/train": 0.2, "seconds": s, "network_evaluations": 9 * s}
        for s in (1, 2)
    ]
    _lines(folder / "metrics.jsonl", [record | {"optimizer_step": record["rollout"]} for record in metrics])
    _lines(folder / "guards.jsonl", [{"rollout": 1, "guard": "kl", "message": "too far"}])
    evaluations = []
    for step in (0, 2):
        kept = {
            "column": "playground_strict",
            "captions": "x",
            "prompt": list(range(12)),
            "tag": ["a", "b"] * 6,
            "score": [step / 2, 0.0, 1.0] * 4,
        }
        samples = folder / "samples" / f"step-{step:06d}"
        samples.mkdir(parents=True)
        (samples / "scores.json").write_text(json.dumps(kept))
        (samples / "index.json").write_text(json.dumps([{"file": "00.png", "prompt": "p", "tag": "a", "score": 1.0, "note": "n"}]))
        summary = score_summary(kept)
        more = {"by_tag": {"a": 0.5, "b": 0.1}, "rewards": {"playground_strict": 0.5}, "missing": {}, "seconds": step}
        evaluations.append({"rollout": step, "column": kept["column"], "score": summary["mean"], "estimate": summary, "images": 12, **more})
    _lines(folder / "evaluations.jsonl", evaluations)
    _json(
        folder / "summary.json", {"recipe": "playground", "seed": 0, "rollouts": 2, "seconds": 2.0, "score": {"before": 0.3, "after": 0.6}}
    )
    _json(folder / "environment.json", {"device": "cpu", "threads": 2, "processor": "x", "versions": {"torch": "2"}})
    column = {"tuned": summary, "base": summary, "difference": summary | {"wins": 0.5, "ties": 0.5}}
    sets = {"s": {"prompts": 12, "images": 12, "columns": {"playground_strict": column}}}
    protocol = {"model": "playground", "lora": [{"path": "runs/playground"}], "steps": 2, "solver": "euler"}
    _json(folder / "results.json", {"protocol": protocol, "variants": ["tuned", "base"], "sets": sets, "left_out": [], "seconds": 1.0})
    row = {"set": "s", "copy": 0, "prompt": "p", "tag": "a", "note": "", "picture": "x.png", "scores": {"playground_strict": 0.5}}
    _lines(folder / "scores.jsonl", [row | {"index": k, "variant": v} for k in range(2) for v in ("tuned", "base")])
    return folder


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from(
        [10**18, -(10**18), 10**400, 1e300, -1e-300, float("nan"), float("inf"), 1e12, 0.5, "", "x", "\0", "\ud800", "<script>"]
    ),
    st.text(max_size=5),
    st.lists(st.integers(0, 2), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.builds(lambda: {"a": {"b": [{}]}}),  # a new one each time: what is drawn is changed further
)


@st.composite
def inputs(draw: st.DrawFn) -> Payload:
    """One file of the folder, changed in its JSON or in its bytes, and the page that is to be made of it."""
    name = draw(st.sampled_from(RUN + SAMPLES + EVALUATION))
    page = "evaluation" if name in EVALUATION else draw(st.sampled_from(["report", "compare"]))
    whole = (template() / name).read_bytes()
    if name.endswith("toml") or draw(st.booleans()):
        return page, name, draw(_bytes(whole))
    lines = name.endswith("jsonl")
    records = [json.loads(line) for line in whole.splitlines()] if lines else json.loads(whole)
    changed = draw(_changed(records))
    if lines and isinstance(changed, list):
        return page, name, "".join(json.dumps(record) + "\n" for record in changed).encode()
    return page, name, json.dumps(changed).encode()


@st.composite
def _changed(draw: st.DrawFn, value: Any) -> Any:
    """The JSON with one to three of its parts replaced, dropped or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = value
        parent: Any = None
        key: Any = None
        for _ in range(draw(st.integers(1, 5))):
            keys = list(place) if isinstance(place, dict) else range(len(place)) if isinstance(place, list) else ()
            if not keys:
                break
            parent, key = place, draw(st.sampled_from(list(keys)))
            place = parent[key]
        if parent is None:
            return draw(ODD)
        how = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if how == "drop":
            del parent[key]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["rollout", "score", "estimate", "column", "time/x", "\0", "<b>"]))] = draw(ODD)
        else:
            parent[key] = draw(ODD)
    return value


@st.composite
def _bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Cut, overwritten, prolonged or replaced."""
    at = draw(st.integers(0, len(whole)))
    junk = draw(
        st.sampled_from(
            [b"", b"\0" * 37, b"\xff\xfe", b"[" * 3000, b'{"a":' * 300, b"9" * 5000, b"\n\n", b"null\n", b"\xef\xbb\xbf", b"\r"]
        )
    )
    junk = draw(st.one_of(st.just(junk), st.binary(max_size=20)))
    kept = whole[at + len(junk) :] if draw(st.booleans()) else whole[at:]
    return draw(st.sampled_from([whole[:at], whole[:at] + junk + kept, whole + junk, junk, b""]))


def read(payload: Payload, folder: Path) -> None:
    """Writes the page, and for a comparison and an evaluation what the terminal shows.

    Raises:
        UserError: there is nothing to write of.
    """
    page, name, data = payload
    shutil.copytree(template(), folder, dirs_exist_ok=True)
    (folder / name).write_bytes(data)
    if page == "report":
        write_report(folder)
    elif page == "evaluation":
        write_evaluation_page(folder)
        table(Reader(folder).object("results.json"))
    else:
        found = compare([template()], labels={"damaged": [folder]}, mixed=True)
        write_comparison(found, folder / "compare.html")
        text(found)
        json.dumps(as_json(found))
