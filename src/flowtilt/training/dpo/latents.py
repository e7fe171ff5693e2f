"""Latents of pictures by where they are, kept in memory."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io.images import read_image
from flowtilt.models.base import Model
from flowtilt.models.encoding import encode_images
from flowtilt.preferences import Picture
from flowtilt.preferences.parquet import Cells
from flowtilt.rewards.pixels import bicubic_crop

IN_MEMORY = 2 * 2**30
"""Bytes of latents kept in the computer's memory; the least recently used go first and are encoded anew."""


class Latents:
    """Encodes pictures for a model: upright, resized until the shorter side fits, cut from the middle.

    Each picture is encoded by itself, since in a batch roundings would depend on which ones happened to be together.

    Args:
        size: bytes to keep.
    """

    def __init__(self, model: Model, size: int = IN_MEMORY):
        self._model, self._size = model, size
        self._side: int = model.latent_shape[-1] * model.pipeline.vae_scale_factor
        self._cells = Cells()
        self._kept: OrderedDict[Picture, Tensor] = OrderedDict()

    def __call__(self, picture: Picture, where: str) -> Tensor:
        """[*latent_shape] fp32 on the CPU.

        Args:
            where: file and row of the pair, for the message.

        Raises:
            UserError: the picture is gone, or can't be read.
        """
        if picture not in self._kept:
            self._kept[picture] = self._encode(self._read(picture, where))
            while len(self._kept) > 1 and len(self._kept) * self._kept[picture].nbytes > self._size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(picture)
        return self._kept[picture]

    def _read(self, picture: Picture, where: str) -> Tensor:
        try:
            source: Path | bytes = picture.file if picture.row is None else self._cells(picture)
            return read_image(source)
        except UserError as error:
            raise UserError(f"pairs {where}: {error}") from None

    def _encode(self, image: Tensor) -> Tensor:
        square = bicubic_crop(image[None], self._side)
        return encode_images(self._model, square.to(self._model.device))[0].cpu()

    def stack(self, pictures: list[tuple[Picture, str]]) -> Tensor:
        """[N, *latent_shape] on the model's device."""
        found = [self(picture, where) for picture, where in pictures]
        whole = torch.stack(found) if found else torch.empty(0, *self._model.latent_shape)
        return whole.to(self._model.device)
