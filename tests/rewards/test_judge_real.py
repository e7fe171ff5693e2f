"""The judge against `transformers serve`, a real server, with a tiny vision-language model of random weights."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from flowtilt.prompts import Prompt
from flowtilt.rewards import load_reward, score


def tiny(folder):
    """A LLaVA of a few thousand weights that reads and writes bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: k for k, letter in enumerate(["<pad>", "</s>", "<image>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<image>"])
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        pictures,
        fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=template,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=2)).save_pretrained(folder)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve needs fastapi, uvicorn and openai: pip install 'transformers[serving]'")
    folder = tmp_path_factory.mktemp("model")
    tiny(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder), "--host", "127.0.0.1"]
    with (folder / "log").open("w") as log:
        # it lists the models of the hub's cache, and fails without one
        cache = {**os.environ, "HF_HUB_CACHE": str(tmp_path_factory.mktemp("hub")), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"], stdout=log, stderr=log, env=cache)
        try:
            end = time.monotonic() + 240
            while True:
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            process.terminate()
            process.wait(20)


def test_a_real_server_is_found_asked_and_its_prose_is_missing(url):
    address, model = url
    options = {"url": address, "model": model, "max_missing": 1.0, "length": 8, "workers": 2}
    judge = load_reward("judge", "judge", options=options)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores, notes = score({"judge": judge}, images, [Prompt(f"a cat {k}") for k in range(3)])
    assert judge.version["logprobs"] is False  # type: ignore[attr-defined]
    assert scores["judge"].isnan().all() and all(note.startswith("unreadable answer") for note in notes)  # random weights write noise
    assert judge.budget.own.calls == 4 and judge.budget.own.read > 4 * 50  # type: ignore[attr-defined]
