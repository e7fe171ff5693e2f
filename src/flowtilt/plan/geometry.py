"""The shapes of a pipeline, from its config.json files where it is on disk, else as its publisher has them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowtilt.errors import UserError
from flowtilt.models.opening import FAMILIES
from flowtilt.plan.published import PUBLISHED, Component


@dataclass(frozen=True, eq=False)
class Geometry:
    """What the modules of a pipeline are built from.

    Args:
        source: where that is known from.
        pipeline: diffusers' class.
        components: class and configuration by name; those that the pipeline leaves empty are not there, and of tokenizers
            no more than the longest caption is known.
    """

    source: str
    pipeline: str
    components: Mapping[str, Component]


def find_geometry(path: str, revision: str | None = None) -> Geometry:
    """The geometry of a folder, of a hub id in the cache or in `PUBLISHED`, or of "playground".

    Raises:
        UserError: it is none of them, or of no known family.
    """
    if path == "playground":
        from flowtilt.playground import pipeline_path

        return _read(pipeline_path(), path)
    folder = Path(path) if Path(path).is_dir() else _cached(path, revision)
    if folder is not None:
        return _read(folder, path)
    if path in PUBLISHED:
        return Geometry("its published configuration", *PUBLISHED[path])
    raise UserError(
        f"model {path}: neither a folder nor in the hub's cache, and its configuration is not among those that plan knows "
        f"({', '.join(PUBLISHED)}); give the folder, or download it first"
    )


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(repo, name, revision=revision) for name in ("model_index.json", "transformer/config.json")]
    except HFValidationError:  # a path that is no hub id either
        return None
    return Path(found[0]).parent if all(isinstance(place, str) for place in found) and isinstance(found[0], str) else None


def _read(folder: Path, path: str) -> Geometry:
    if not (folder / "model_index.json").is_file():
        raise UserError(f"model {path}: no model_index.json there; give the folder that save_pretrained wrote")
    index = _json(folder / "model_index.json", path)
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        raise UserError(f"model {path}: a {kind}, whose network plan can't count; it counts {', '.join(FAMILIES)}")
    components: dict[str, Component] = {}
    for name, place in index.items():
        # a pipeline may be saved without its T5: [null, null]
        if name.startswith("_") or not isinstance(place, list) or place[:1] == [None]:
            continue
        file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        if name.startswith(("tokenizer", "processor", "feature_extractor")):
            file = folder / name / "tokenizer_config.json"
            if not file.is_file():
                continue
        components[name] = str(place[1]), _json(file, path)
    for name in ("transformer", "vae", "scheduler"):
        if name not in components:
            raise UserError(f"model {path}: its model_index.json leaves out the {name}")
    return Geometry("its config.json files", str(kind), components)


def _json(file: Path, path: str) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model {path}: {file} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"model {path}: {file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"model {path}: {file} holds no configuration")
    return found
