"""Rollouts as data: rollouts/step-000012/ of a run has the rollout's images and metadata.parquet, a row per image.

The layout is that of an image folder: `datasets.load_dataset("imagefolder", data_dir=...)` reads it. Every process writes the images
that it has sampled, and the first one the table, once all scores are there.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.io.files import disk_errors, write_atomic
from flowtilt.io.images import to_png
from flowtilt.io.run_folder import RolloutFolder, RunFolder
from flowtilt.prompts import Prompt


class RolloutLog:
    """Writes into a run's folder.

    Args:
        run: the folder, known once training begins.
        seed: of the run, from which an image's noise follows together with step, prompt and copy.

    Raises:
        UserError: pyarrow is missing.
    """

    def __init__(self, run: Callable[[], Path], seed: int, world: World):
        try:
            import pyarrow.parquet  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("log.rollouts: Parquet files are written with pyarrow; install it: pip install flowtilt[pairs]") from None
        self._run, self._seed, self._world = run, seed, world

    def images(self, step: int, which: Sequence[int], images: Tensor) -> None:
        """Writes images [n, 3, H, W] in [0, 1], the ones `which` of rollout `step`."""
        folder = self._at(step).path
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for number, image in zip(which, images, strict=True):
            write_atomic(folder / _name(number), to_png(image, compress_level=1))

    def table(self, step: int, prompts: Sequence[Prompt], columns: Mapping[str, Tensor], kept: Tensor) -> None:
        """Writes the table of rollout `step`.

        Args:
            prompts: of the rollout; each has the same number of images.
            columns: of all N images: scores and "advantage".
            kept: which images are trained on, [N].
        """
        self._world.barrier()  # an image has its file before it has a row
        if self._world.rank:
            return
        import pyarrow as pa  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]

        number = len(kept)
        copies = number // len(prompts)
        own = [prompts[k // copies] for k in range(number)]
        rows = {
            "file_name": [_name(k) for k in range(number)],
            "prompt": [prompt.text for prompt in own],
            "tag": [prompt.tag for prompt in own],
            "rollout": pa.array([step] * number, pa.int64()),
            "seed": pa.array([self._seed] * number, pa.uint64()),
            "prompt_index": pa.array([k // copies for k in range(number)], pa.int64()),
            "copy": pa.array([k % copies for k in range(number)], pa.int64()),
            **{name: pa.array(_or_null(values), pa.float32()) for name, values in columns.items()},
            "trained": kept.tolist(),
        }
        buffer = BytesIO()
        pq.write_table(pa.table(rows), buffer)
        write_atomic(self._at(step).table, buffer.getvalue())

    def _at(self, step: int) -> RolloutFolder:
        return RunFolder(self._run()).rollout(step)


def _or_null(values: Tensor) -> list[float | None]:
    """Missing ones are null."""
    return [None if missing else value for value, missing in zip(values.tolist(), torch.isnan(values).tolist(), strict=True)]


def _name(number: int) -> str:
    return f"{number:05d}.png"
