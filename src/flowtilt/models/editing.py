"""Families that edit: a caption is an instruction and comes with a source image, whose tokens follow those of the noise.

The source is the middle square of the image file, at one size for all prompts. Its latents are encoded once with the caption.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io.images import check_image, read_square, to_pil
from flowtilt.models import pipeline as common
from flowtilt.models.base import Model
from flowtilt.models.captions import SOURCE
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.encoding import encode_images
from flowtilt.models.family import Packed
from flowtilt.prompts import Caption, Edit, Prompt


class Editing(Packed):
    """A family whose network reads packed tokens of the source image after those of the noise. It comes first among the bases."""

    edits = True
    one_by_one = True
    own_source: ClassVar[int] = 1024
    """Height and width in pixels that the stock pipeline gives a square source image."""
    source_resolution: int
    """Height and width in pixels of source images."""

    def take_sources(self, pipeline: Any, resolution: int | None) -> None:
        """Sets the size of source images, before everything else; none takes the stock pipeline's own.

        Raises:
            UserError: it is no multiple of a token's size.
        """
        try:
            self.source_resolution = common.check_resolution(resolution or self.own_source, self.patch * pipeline.vae_scale_factor)
        except UserError as error:
            raise UserError(str(error).replace("model.resolution", "model.options.source_resolution")) from None

    def read_edit(self, text: str, picture: Tensor) -> Mapping[str, Tensor]:
        """What the network reads of an instruction for a source image [3, S, S] in [0, 1], besides the image's latents."""
        return self.read(text)

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`; the source image's latents are among them, as among what is read of an edit."""
        side = self.source_resolution // self.scale
        return {**super().blank(tokens), SOURCE: torch.empty(self.latent_shape[0], side, side, device=self.device)}

    def _read(self, caption: Caption) -> Mapping[str, Tensor]:
        assert isinstance(caption, Edit)
        try:
            picture = read_square(caption.image, self.source_resolution)
        except UserError as error:
            raise UserError(f"prompts {caption.where or 'given'}: source image {error}") from None
        latents = encode_images(self, picture[None].to(self.device), checked=False)[0]
        return {**self.read_edit(caption.text, picture), SOURCE: latents}

    def _said(self) -> tuple[object, ...]:
        return (*super()._said(), self.source_resolution)

    def encode_negative(self) -> Conditioning:
        """One row that says that there is guidance: what it leads away from depends on the source, see `Conditioning.away`."""
        return Conditioning({}, torch.zeros(1, dtype=torch.long))

    def with_source(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """Tokens [N, L, C] of the noise, then those of the source images."""
        return torch.cat([x, self.pack(conditioning.source()).to(x.dtype)], 1)

    def unpack(self, v: Tensor) -> Tensor:
        """Tokens as [N, C, h, w], without those of the source."""
        return super().unpack(v[:, : (self.side // 2) ** 2])

    def source_pictures(self, captions: Sequence[Caption]) -> list[Any]:
        """The source images as a call of the stock pipeline takes them."""
        return [to_pil(read_square(one.image, self.source_resolution)[None])[0] for one in captions if isinstance(one, Edit)]


def sources_beside(images: Tensor, prompts: Sequence[Prompt]) -> Tensor | None:
    """The source images of N prompts, in the size of images [N, 3, H, W]; none where a prompt has none."""
    if not prompts or not all(prompt.image for prompt in prompts):
        return None
    return torch.stack([read_square(prompt.image, images.shape[-1]) for prompt in prompts])


def check_sources(model: Model, prompts: Sequence[Prompt]) -> None:
    """Raises UserError at the first prompt without the source image that the model edits, with one that it does not take, or whose
    file is missing or no image."""
    edits, known = getattr(model, "edits", False), set()
    kind = type(model.pipeline).__name__
    for prompt in prompts:
        where = f"prompts {prompt.where or 'given'}"
        if edits and not prompt.image:
            how = 'name it in a column "image", relative to the file' if prompt.where else "give one, in a command as --image FILE"
            raise UserError(f"{where}: no source image, and a {kind} edits one; {how}")
        if prompt.image and not edits:
            raise UserError(f'{where}: names a source image, but a {kind} takes none; remove or rename the column "image"')
        if prompt.image and prompt.image not in known:
            try:
                check_image(prompt.image)
            except UserError as error:
                raise UserError(f"{where}: source image {error}") from None
            known.add(prompt.image)
