"""Tiny tokenizers of every way to begin a text, as `tokenizers` makes them, and chat templates."""

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
PLAIN = ("<think>", "</think>", "<tool call>")  # added, not special
CORPUS = [
    "Hello world, the quick brown fox can't jump over the lazy dog's 1234 bones. <s> is HTML.",
    "  def f(x):\n    return x + 10\n\n\nHELLO user assistant\n\nUser: Assistant:",
    "naïve café über straße 日本語 emoji 🙂🙃 Привет <|im_end|> im_start",
] * 3
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _added(text: str, *, special: bool, **flags: bool) -> AddedToken:
    return AddedToken(text, special=special, normalized=flags.pop("normalized", False), **flags)


def _train(tokenizer: Any, trainer: Any, **flags: bool) -> Any:
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([_added(text, special=True, **flags) for text in CONTROL])
    tokenizer.add_tokens([_added(text, special=False) for text in PLAIN])
    return tokenizer


def byte_level(*, prefix: bool = False, pattern: str = "", nfc: bool = False, **flags: bool) -> Any:
    """GPT-2's BPE, or with a pattern Llama 3's."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=bool(pattern)))
    steps = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not pattern)
    if pattern:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        steps = pre_tokenizers.Sequence([split, steps])
    tokenizer.pre_tokenizer = steps
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    return _train(tokenizer, trainer, **flags)


def sentencepiece_like(how: str, *, unigram: bool = False, **flags: bool) -> Any:
    """BPE with byte fallback as Llama 2 and Gemma have it, or a Unigram model as T5 has it.

    `how` is what is put before a text: "prepend" by a normalizer, "first", "always" or "never" by
    Metaspace, "none" as Gemma does it; "lower" is "none" in lower case.
    """
    unknown = {"unk_token": "<unk>"}
    model = (
        models.Unigram() if unigram else models.BPE(byte_fallback=True, fuse_unk=True, **unknown)
    )
    tokenizer = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if how in ("prepend", "none", "lower"):
        first = {"prepend": [normalizers.Prepend(SPACE)], "lower": [normalizers.Lowercase()]}
        tokenizer.normalizer = normalizers.Sequence([*first.get(how, []), spaces])
        strip = [decoders.Strip(" ", 1, 0)] if how == "prepend" else []
        tokenizer.decoder = decoders.Sequence([*steps, *strip])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=how, split=unigram)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=how, split=unigram)
    special = ["<unk>"] if unigram else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    options = {"vocab_size": 360, "special_tokens": special, "show_progress": False}
    if unigram:
        trainer = trainers.UnigramTrainer(**options, **unknown)
    else:
        trainer = trainers.BpeTrainer(**options)
    spec = json.loads(_train(tokenizer, trainer, **flags).to_str())
    spec["added_tokens"] = [
        token for token in spec["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def make(style: str) -> Any:
    """One of STYLES."""
    return STYLES[style]()


STYLES = {
    "gpt2": byte_level,
    "gpt2, prefix": lambda: byte_level(prefix=True),
    "llama3": lambda: byte_level(pattern=_GPT4),
    "qwen": lambda: byte_level(pattern=_GPT4.replace("{1,3}", ""), nfc=True),
    "phi, stripping right": lambda: byte_level(rstrip=True),
    "stripping left": lambda: byte_level(lstrip=True, prefix=True),
    "llama2": lambda: sentencepiece_like("prepend"),
    "llama2, stripping right": lambda: sentencepiece_like("prepend", rstrip=True),
    "lower case": lambda: sentencepiece_like("lower", normalized=True),
    "gemma": lambda: sentencepiece_like("none"),
    "metaspace first": lambda: sentencepiece_like("first"),
    "metaspace always": lambda: sentencepiece_like("always"),
    "metaspace never": lambda: sentencepiece_like("never"),
    "unigram first": lambda: sentencepiece_like("first", unigram=True),
    "unigram always": lambda: sentencepiece_like("always", unigram=True),
}

# As models have them; "bos" is what a template without a system prompt begins with.
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "tight": "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>{% endif %}",
    "llama2": "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} "
    "[/INST]{% else %} {{ m.content | trim }} </s><s>{% endif %}{% endfor %}",
    "bare": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}"
    "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    "cutting": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
