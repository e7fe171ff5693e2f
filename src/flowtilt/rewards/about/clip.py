"""OpenAI's CLIP ViT-L/14, which several rewards read, and the tokenizer of all CLIP models."""

from flowtilt.io.published import Hub

_REPO, _COMMIT = "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"
CLIP_L = Hub("clip-l", _REPO, _COMMIT, ("config.json", "model.safetensors"))
TOKENIZER = Hub("clip-tokenizer", _REPO, _COMMIT, ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"))
CLIP_L_NETWORK = {"clip-l": "flowtilt.rewards.clip:vit_l14"}
