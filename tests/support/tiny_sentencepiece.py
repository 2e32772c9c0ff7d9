"""Tiny sentencepiece BPE models, trained in a moment."""

import io
from collections.abc import Iterable
from typing import Any

import sentencepiece


def train_model(corpus: Iterable[str], **options: Any) -> bytes:
    """A serialized model; the text is left as it is unless told otherwise."""
    out = io.BytesIO()
    settings = {"normalization_rule_name": "identity", **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=out,
        model_type="bpe",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return out.getvalue()
