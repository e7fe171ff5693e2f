"""LoRAs on top of one another.

What was trained with others beneath it means something on exactly those. It names them by fingerprint, and here
they are found and checked. LoRAs that name none add up freely.
"""

from collections.abc import Sequence
from pathlib import Path

from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.io.files import whole_folder
from flowtilt.io.run_folder import RunFolder
from flowtilt.lora import Lora, are_named, fingerprint, is_named
from flowtilt.lora.find import run_of
from flowtilt.lora.read import read_lora
from flowtilt.lora.write import to_diffusers

"""The folder of a run with copies of what lies beneath its LoRA: 1, 2, …"""


def read_stack(places: Sequence[Path | str]) -> list[Lora]:
    """The LoRAs of those places in order, as `read_lora` takes them; each that was trained on top of others comes directly after those.

    Where the first of them lies in a run, what is beneath it is added in front: from where the run's recipe
    says, or, if that is another one by now, from the run's own copies.

    Raises:
        UserError: one of them can't be read, or what was beneath it is not given, not found, or another one.
    """
    return _read(places, ())


def _read(places: Sequence[Path | str], above: tuple[str, ...]) -> list[Lora]:
    stack: list[Lora] = []
    for lora in map(read_lora, places):
        if not _fits(lora, stack):
            base_loras = None if stack or lora.source in above else _in_run(lora, above)
            if base_loras is None:
                raise UserError(f"lora {lora.source}: {_wants(lora)}{_instead(lora, stack)}; give --lora PARENT --lora {lora.source}")
            stack = base_loras
        stack.append(lora)
    return stack


def read_onto(place: Path | str, base_loras: Sequence[Lora]) -> Lora:
    """A LoRA from which training goes on upon `beneath`.

    Raises:
        UserError: it was trained on top of others.
    """
    lora = read_lora(place)
    if not _fits(lora, base_loras):
        raise UserError(f"lora.init {lora.source}: {_wants(lora)}{_instead(lora, base_loras)}; name its base LoRAs in lora.on")
    return lora


def leading(loras: Sequence[Lora]) -> Path:
    """The file of the LoRA whose run says how several are drawn: the first that is not beneath another one."""
    base_loras = {parent for lora in loras for parent in lora.parents}
    top = (lora for lora in loras if base_loras and not any(is_named(lora, parent) for parent in base_loras))
    return Path(next(top, loras[0]).source)


def keep(loras: Sequence[Lora], run: Path, **others: Lora) -> None:
    """Copies into a run what lies beneath its LoRA, and others by name; where they came from may be trained further, or cleared away."""
    with whole_folder(RunFolder(run).base_loras) as temporary:
        for name, lora in [*((str(number), lora) for number, lora in enumerate(loras, 1)), *others.items()]:
            to_diffusers(lora, temporary / name)


def kept(run: Path) -> list[Path]:
    """The copies that `keep` made, in order."""
    return sorted(
        (place for place in (RunFolder(run).base_loras).glob("[0-9]*") if place.name.isdecimal()), key=lambda place: int(place.name)
    )


def _fits(lora: Lora, stack: Sequence[Lora]) -> bool:
    """Whether a LoRA can follow those: it names none, or the last of them."""
    return not lora.parents or are_named(stack[-len(lora.parents) :], lora.parents)


def _in_run(lora: Lora, above: tuple[str, ...]) -> list[Lora] | None:
    """What lies beneath a LoRA, from the run that it is in; none where there is no run, or nothing there that it names."""
    run = run_of(lora.source)
    for places in (load_recipe(RunFolder(run).recipe, stored=True).lora.on, kept(run)) if run else ():
        try:
            found = _read(places, (*above, lora.source))
        except UserError:  # gone, or another one by now
            continue
        if are_named(found, lora.parents):
            return found
    return None


def _wants(lora: Lora) -> str:
    run = run_of(lora.source)
    said = ", ".join(load_recipe(RunFolder(run).recipe, stored=True).lora.on) if run else ""
    return f"was trained on top of {_listed(lora.parents)}{f' ({said} in its recipe)' if said else ''}"


def _instead(lora: Lora, stack: Sequence[Lora]) -> str:
    """What is there in the place of its parents."""
    before = stack[-len(lora.parents) :]
    if before:
        return f", but before it stands {', '.join(f'{one.source} ({_listed([fingerprint(one)])})' for one in before)}"
    return ", which is not there any more" if run_of(lora.source) else ", which is not given"


def _listed(fingerprints: Sequence[str]) -> str:
    return ", ".join(one[:12] for one in fingerprints)
