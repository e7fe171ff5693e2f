"""Qwen-Image-Edit, and -Edit-2509 and later ("Plus"): Qwen-Image that edits.

Qwen2.5-VL reads the source image with the instruction, and the network reads its latents. The negative caption is read with the image.
"""

from typing import Any

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from torch import Tensor

from flowtilt.io.images import to_pil
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.editing import Editing
from flowtilt.models.qwen_image import QwenImage


class QwenImageEdit(Editing, QwenImage):
    """A Qwen-Image-Edit pipeline as a `Model`.

    Args:
        source_resolution: height and width of source images in pixels; none takes 1024, the pipeline's own for a square. A call of
            the stock pipeline has no other.
    """

    encoders = ("text_encoder", "processor")

    def __init__(
        self,
        pipeline: Any,
        *,
        resolution: int | None = None,
        text_length: int | None = None,
        offload: bool = False,
        source_resolution: int | None = None,
    ):
        self.take_sources(pipeline, source_resolution)
        super().__init__(pipeline, resolution=resolution, text_length=text_length, offload=offload)
        self.protocol = {**self.protocol, "source_resolution": self.source_resolution}

    def read_edit(self, text: str, picture: Tensor) -> dict[str, Tensor]:
        """The last hidden states of the image's and the instruction's tokens, without the template's."""
        embeds, _ = self.pipeline.encode_prompt(text, image=self.seen(picture), device=self.device)
        return {"encoder_hidden_states": embeds[0]}

    def seen(self, picture: Tensor) -> Any:
        """The source image [3, S, S] as the text encoder's processor takes it."""
        return to_pil(picture[None])[0]

    def seen_side(self) -> int:
        """Height and width of that image in pixels."""
        return self.source_resolution

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`: the text encoder's tokens of the source image stand before the instruction's."""
        eyes = self.pipeline.text_encoder.config.vision_config
        side = round(self.seen_side() / (eyes.patch_size * eyes.spatial_merge_size))
        return super().blank(tokens + side**2)

    def inputs(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """As Qwen-Image's, with the source's tokens, rows and columns."""
        given = super().inputs(self.with_source(x, conditioning), t, conditioning)
        side = self.source_resolution // self.scale // self.patch
        return {**given, "img_shapes": [[*shapes, (1, side, side)] for shapes in given["img_shapes"]]}


class QwenImageEditPlus(QwenImageEdit):
    """A Qwen-Image-Edit-2509 or -2511 pipeline as a `Model`, of one source image: the text encoder sees it smaller."""

    def seen(self, picture: Tensor) -> list[Any]:
        """A list of one image, of the pipeline's own size."""
        side = self.seen_side()
        return [self.pipeline.image_processor.resize(to_pil(picture[None])[0], side, side)]

    def seen_side(self) -> int:
        """The pipeline's own, of a square."""
        return plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, 1.0)[0]
