"""Tokens that end an answer, known by their text.

Files say too little of them: many name the base model's end of text only, and type the end of a
turn as an ordinary token, so that an answer would run on into a next turn of its own. llama.cpp
finds them by text and overrides their type (`llama_vocab::impl::load` in its llama-vocab.cpp, whose
lists these are). Two things are otherwise here. "</s>", "<eos>" and "[EOS]" end an answer only
where the file has them as control tokens, for as ordinary ones they are HTML and prose: Gemma's
vocabulary has a token for the end of struck-out text. And tokens for filling in code
("<|file_sep|>", "<|fim_pad|>") end nothing.
"""

from collections.abc import Collection

# Whatever their type is.
TURN_ENDS = frozenset(
    {
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<turn|>"),
        *("<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[e~["),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"),
        *("<end_of_utterance>", "<｜end▁of▁sentence｜>"),
    }
)
# Where they are control tokens.
_TEXT_ENDS = frozenset({"</s>", "<eos>", "[EOS]"})
# Beside both of these "<|end|>" ends a message, and an answer has several (harmony; Solar).
_INNER_ENDS = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})


def ends_by_text(control: Collection[str]) -> set[str]:
    """Those control tokens after which an answer is over."""
    ends = {text for text in TURN_ENDS | _TEXT_ENDS if text in control}
    if any(both <= ends for both in _INNER_ENDS):
        ends.discard("<|end|>")
    return ends
