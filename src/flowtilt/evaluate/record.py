"""An evaluation in a run's folder."""

import json
from pathlib import Path

from flowtilt.evaluate import Evaluation
from flowtilt.io.files import append_line, whole_folder, write_json
from flowtilt.io.images import to_png
from flowtilt.io.run_folder import RunFolder, SamplesFolder
from flowtilt.report.image_scores import score_summary


def save_evaluation(folder: Path, step: int, seconds: float, found: Evaluation) -> None:
    """Logs an evaluation with its interval, and keeps every image's score and its samples as PNG files with captions and verdicts."""
    with whole_folder(RunFolder(folder).samples_at(step).path) as temporary:
        for k, (image, row) in enumerate(zip(found.samples, found.sample_rows, strict=True)):
            row["file"] = f"{k:02d}.png"
            (temporary / f"{k:02d}.png").write_bytes(to_png(image))
            if found.sources is not None:
                row["source"] = f"{k:02d}-source.png"
                (temporary / f"{k:02d}-source.png").write_bytes(to_png(found.sources[k]))
        write_json(SamplesFolder(temporary).index, found.sample_rows)
        SamplesFolder(temporary).scores.write_text(json.dumps({"column": found.column, **found.by_image}), encoding="utf-8")
    record = {
        "rollout": step,
        "column": found.column,
        "score": found.score,
        "estimate": score_summary({"column": found.column, **found.by_image}),
        "images": found.images,
        "by_tag": found.by_tag,
        "rewards": found.rewards,
        "stds": found.stds,
        "missing": found.missing,
        "seconds": seconds,
    }
    append_line(RunFolder(folder).evaluations, record)
