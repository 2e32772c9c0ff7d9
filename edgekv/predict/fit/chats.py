"""Prompts as people ask them: a passage and what to do with it, in the model's own chat template.

What `edgekv fit` calibrates a predictor on, and what `edgekv bench quality --chat` measures it by.
"""

import random
from collections.abc import Iterable, Iterator

from edgekv.tokenizer import Tokenizer

# A question is at the end, where people put it, but for the last two.
TASKS = (
    "{text}\n\nSummarise the text above in one sentence.",
    "{text}\n\nGive this a title.",
    "{text}\n\nWhat is this about?",
    "Here is a text:\n\n{text}\n\nList the three most important points.",
    "{text}\n\nExplain this to somebody who has never heard of it.",
    "{text}\n\nWho would read this, and why?",
    'Read the following:\n"""\n{text}\n"""\nWrite a question that it answers.',
    "{text}\n\nRewrite the first sentence in simpler words.",
    "{text}\n\nContinue this.",
    "{text}\n\nWhich names or terms does the text mention?",
    "{text}\n\nWhat happens last?",
    "I have to answer an e-mail with this in it:\n\n{text}\n\nWhat should I say?",
    "{text}\n\nIs there anything unclear in this?",
    "{text}\n\nWhat follows from this?",
    "Summarise what follows in two sentences.\n\n{text}",
    "What is the main idea of this text?\n\n{text}",
)


def chat_prompts(
    tokenizer: Tokenizer, pieces: Iterable[list[int]], *, shortest: int | None, seed: int = 0
) -> Iterator[list[int]]:
    """Token ids of one prompt a piece of text, of which it holds `shortest` tokens or more.

    Lengths are even on a logarithmic scale, between `shortest` and the piece's own; None takes
    pieces as they are.
    """
    dice = random.Random(seed)
    for piece in pieces:
        length = len(piece)
        if shortest is not None:
            length = round(shortest * (length / shortest) ** dice.random())
        text = tokenizer.decode(piece[:length]).strip()
        content = dice.choice(TASKS).format(text=text)
        chat = tokenizer.render_chat([{"role": "user", "content": content}])
        yield list(tokenizer.encode_chat(chat))
