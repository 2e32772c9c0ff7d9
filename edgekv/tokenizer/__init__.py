"""Text to token ids and back: tokenizers, chat templates, incremental detokenizer, stop strings.

    tokenizer = load_tokenizer_folder(path)            # or load_tokenizer_gguf(metadata, source)
    text = tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    ids = tokenizer.encode(text, add_special_tokens=False)     # the template wrote its own BOS

Importing this package costs next to nothing: `tokenizers`, `sentencepiece` and `jinja2` are
imported by the first model that needs them.
"""

from edgekv.tokenizer.answer_text import IncrementalDetokenizer, StopMatcher
from edgekv.tokenizer.base import Tokenizer
from edgekv.tokenizer.chat_template import ChatTemplate
from edgekv.tokenizer.folder import load_tokenizer_folder
from edgekv.tokenizer.gguf import load_tokenizer_gguf

__all__ = [
    "ChatTemplate",
    "IncrementalDetokenizer",
    "StopMatcher",
    "Tokenizer",
    "load_tokenizer_folder",
    "load_tokenizer_gguf",
]
