"""A tokenizer of single bytes and a few control tokens, with any chat template."""

from pathlib import Path

from tokenizers import pre_tokenizers

from edgekv.tokenizer import Tokenizer, load_tokenizer_gguf


def byte_tokenizer(template: str | None, control: tuple[str, ...] = ()) -> Tokenizer:
    """<s>, <|im_start|> and <|im_end|> are 0, 1 and 2; <s> begins a text, the others are more."""
    named = ["<s>", "<|im_start|>", "<|im_end|>", *control]
    tokens = [*named, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[3] * len(named), *[1] * 256],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.eos_token_id": 2,
    }
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return load_tokenizer_gguf(metadata, Path("tiny.gguf"))
