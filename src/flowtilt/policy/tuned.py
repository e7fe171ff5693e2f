"""What was trained, as a user names it: LoRAs, or the run of `train = "full"` whose weights replace the network's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.io.files import digest
from flowtilt.io.run_folder import CheckpointFolder, RunFolder
from flowtilt.lora import Lora
from flowtilt.lora.find import run_of, split_alpha
from flowtilt.lora.stacked import leading, read_stack
from flowtilt.models.base import Model
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.policy.whole import WEIGHTS


@dataclass(frozen=True)
class Tuned:
    """What a model is sampled with: LoRAs that add up, or a file with all weights of its network, or neither."""

    loras: Sequence[Lora] = ()
    whole: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.loras) or self.whole is not None

    @property
    def leading(self) -> Path | None:
        """The file whose run says how it is sampled; none where nothing was trained."""
        return self.whole or (leading(self.loras) if self.loras else None)

    def on(self, model: Model) -> TunedModel:
        """The model with it.

        Raises:
            UserError: it belongs to another model.
        """
        return TunedModel(model, self.loras, self.whole)

    def protocol(self) -> dict[str, Any]:
        """Which files these are."""
        loras = [
            {"path": str(Path(lora.source).resolve()), "sha256": digest(Path(lora.source)), "scales": lora.scales()} for lora in self.loras
        ]
        whole = {"weights": {"path": str(self.whole.resolve()), "sha256": digest(self.whole)}} if self.whole else {}
        return {"lora": loras, **whole}


def read_tuned(places: Sequence[Path | str]) -> Tuned:
    """What lies at those places: runs, checkpoints, folders or files of LoRAs, as `read_stack` takes them, or one run of all weights.

    Raises:
        UserError: it can't be read, or a run of all weights is not alone.
    """
    whole = [file for file in map(whole_file, places) if file]
    if not whole:
        return Tuned(read_stack(places))
    if len(places) > 1:
        raise UserError(f'--lora {whole[0]}: a run of train = "full" stands alone; export it and give that as --model to add LoRAs')
    return Tuned(whole=whole[0])


def whole_file(place: Path | str) -> Path | None:
    """The weights of a run of `train = "full"`, its newest EMA or that of a checkpoint; none for what is no such run.

    Raises:
        UserError: it is one, and there are no weights.
    """
    run = run_of(place)
    if run is None or load_recipe(RunFolder(run).recipe, stored=True).train != "full":
        return None
    path = split_alpha(place)[0]
    files = (path, CheckpointFolder(path).ema, path / WEIGHTS, RunFolder(path).network / WEIGHTS)
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UserError(f"{path}: no weights there; give the run, or one of its checkpoints")
    return found
