"""Text to token ids and back: tokenizers, chat templates, incremental detokenizer, stop strings.

    tokenizer = load_tokenizer_folder(path)            # or load_tokenizer_gguf(metadata, source)
    chat = tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    ids = tokenizer.encode_chat(chat)

Importing this package costs next to nothing: `tokenizers`, `sentencepiece` and `jinja2` are
imported by the first model that needs them.
"""

from edgekv.tokenizer.answer_text import IncrementalDetokenizer, StopMatcher
from edgekv.tokenizer.base import RenderedChat, Tokenizer
from edgekv.tokenizer.chat_template import ChatTemplate
from edgekv.tokenizer.folder import load_tokenizer_folder
from edgekv.tokenizer.gguf import load_tokenizer_gguf

__all__ = [
    "ChatTemplate",
    "IncrementalDetokenizer",
    "RenderedChat",
    "StopMatcher",
    "Tokenizer",
    "load_tokenizer_folder",
    "load_tokenizer_gguf",
]
