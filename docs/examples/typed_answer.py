"""An answer that is an object, not a text: the model can say nothing that does not fit the type.

python typed_answer.py [MODEL]
"""

import sys
from dataclasses import dataclass
from typing import Literal

import edgekv


@dataclass
class Review:  # a pydantic model, or a JSON schema as a dict, does as well
    mood: Literal["pleased", "neutral", "angry"]
    stars: Literal[1, 2, 3, 4, 5]
    will_come_back: bool


MAIL = "The room was lovely and the breakfast even better. Thank you, we will be back in May!"

with edgekv.Runtime.open(*sys.argv[1:]) as runtime:
    session = runtime.app("reviews").session()
    # The model does not see the type, so the question says what is wanted.
    question = f"How does the writer feel, and how many stars is that?\n\n{MAIL}"
    reply = session.respond(question, schema=Review)
    review = reply.value
    print(review)
    if review.mood == "angry":  # a type checker knows what there is
        print("Call them.")
