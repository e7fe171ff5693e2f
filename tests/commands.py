"""`flowtilt …` in a process of its own, forked from one that has imported everything: what a person types, without its seconds."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks import forked

from flowtilt.cli import main


def _typed(words, cwd, said):
    os.chdir(cwd)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    # a shell that runs the tests in the background has them ignore the signal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.exit(main(list(words)))


@dataclass
class Command:
    """A command that runs, and what it has said."""

    process: Any
    said: tuple[Path, Path]

    def interrupt(self):
        os.kill(self.process.pid, signal.SIGINT)

    def ended(self, within=120):
        """Exit status, stdout and stderr; None as status where it had to be killed."""
        self.process.join(within)
        code = self.process.exitcode
        self.process.kill()
        return code, *(path.read_text() for path in self.said)


def typed(*words, cwd, name="command"):
    """The command `flowtilt` with these words in a folder; names of commands there tell them apart."""
    said = (cwd / f"{name}.out", cwd / f"{name}.err")
    return Command(forked(_typed, words, cwd, said), said)
