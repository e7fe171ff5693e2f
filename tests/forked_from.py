"""What a process is forked from imports this: all that most of them import, and the playground, for good."""

import os

import conftest
import torch
from reading import read_once

from flowtilt import trainer  # noqa: F401
from flowtilt.models.opening import load_pipeline

torch.set_num_threads(1)
os.fsync = conftest.no_fsync
reading = read_once()  # has a name, as what is not kept is undone
reading.__enter__()
load_pipeline("playground", revision=None, dtype="float32", device=torch.device("cpu"))
conftest.settle()
