"""Folders of evaluations, made up, for tests of what is written about them."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowtilt.io.images import to_png
from flowtilt.statistics import paired, summary

NAN = math.nan
TAGS = ("counting", "colors", "position")
PROTOCOL = {
    "model": "stabilityai/stable-diffusion-3.5-medium",
    "lora": [{"path": "runs/nft-geneval/lora/pytorch_lora_weights.safetensors", "sha256": "9f" * 32}],
    "steps": 40,
    "solver": "euler",
    "guidance": 1.0,
    "seed": 0,
    "images_per_prompt": 2,
    "resolution": 512,
    "dtype": "float32",
    "rewards": {"pickscore": {"revision": "abc123"}},
}


def rows_of_set(
    name: str, prompts: int, columns: tuple[str, ...], tags: tuple[str, ...], variants: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Two images a prompt; the tuned model's scores are the base's plus 0.2, the first prompt has no scores at all."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(prompts):
        for copy in range(2):
            base = {column: round(float(rng.uniform(0.2, 0.6)), 3) for column in columns}
            for variant in variants:
                scores = {c: None if index == 0 else round(s + 0.2 * (variant == "tuned"), 3) for c, s in base.items()}
                place = {"set": name, "index": index, "copy": copy, "variant": variant}
                texts = {"prompt": f"{name} prompt {index}", "tag": tags[index % len(tags)], "note": "" if index else "503: no answer"}
                found.append(place | texts | {"scores": scores, "picture": f"pictures/{name}-{index}-{copy}-{variant}.png"})
    return found


def results_of(rows: list[dict[str, Any]], variants: tuple[str, ...]) -> dict[str, Any]:
    sets = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        of = {v: [row for row in rows if row["set"] == name and row["variant"] == v] for v in variants}
        first = of[variants[0]]
        labels = [row["index"] for row in first], [row["tag"] for row in first]
        columns: dict[str, Any] = {}
        for column in first[0]["scores"]:
            values = {v: [NAN if row["scores"][column] is None else row["scores"][column] for row in mine] for v, mine in of.items()}
            columns[column] = {v: summary(values[v], *labels) for v in variants}
            columns[column] |= {"difference": paired(values["tuned"], values["base"], *labels)} if len(variants) > 1 else {}
        sets[name] = {"prompts": len(first) // 2, "images": len(first), "columns": columns}
    left_out = [{"set": "drawbench", "reward": "ocr", "why": "its prompts quote no text"}]
    return {"protocol": PROTOCOL, "variants": list(variants), "sets": sets, "left_out": left_out, "seconds": 750.0}


@cache
def _png(index: int) -> bytes:
    return to_png((torch.tensor([index * 10, 90, 200]) / 255)[:, None, None].expand(3, 96, 96))


def write(folder: Path, variants: tuple[str, ...]) -> Path:
    (folder / "pictures").mkdir(parents=True)
    rows = rows_of_set("geneval", 36, ("geneval", "geneval/strict", "pickscore", "pickscore/raw"), TAGS, variants)
    rows += rows_of_set("drawbench", 12, ("pickscore", "aesthetic"), ("",), variants)
    for row in rows:
        (folder / row["picture"]).write_bytes(_png(row["index"]))
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps(results_of(rows, variants)))
    return folder
