"""AuraFlow 0.1 to 0.3: joint and single blocks, a caption by UMT5 times its mask, shift 1.73. Explained in docs/guides/add-a-model.md."""

from math import isqrt

from torch import Tensor

from flowtilt.models.family import Family


class AuraFlow(Family):
    """An AuraFlow pipeline as a `Model`."""

    block_lists = ("joint_transformer_blocks", "single_transformer_blocks")
    longest_text = 256

    def read(self, text: str) -> dict[str, Tensor]:
        """As the pipeline's own `encode_prompt` makes it."""
        embeds, *_ = self.pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.text_length
        )
        return {"encoder_hidden_states": embeds[0]}

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """See `Family.blank`."""
        return {"encoder_hidden_states": self.empty(tokens, self.network.config.joint_attention_dim)}

    def own_resolution(self) -> int:
        """The network's sample size in pixels."""
        return self.network.config.sample_size * self.scale

    def largest_resolution(self) -> int:
        """That of the table of positions, which is square."""
        return self.scale * self.patch * isqrt(self.network.config.pos_embed_max_size)
