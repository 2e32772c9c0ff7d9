"""OpenAI's completions: a text is continued as it is, without a chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekv.chat.events import Event, Finished, TextDelta, TokenLogprob
from edgekv.chat.values import Completion
from edgekv.server.dialect import NUM_ANSWERS_MAX, About, Asked, Writer, sse
from edgekv.server.fields import Fault, Fields, invalid
from edgekv.server.openai_chat import (
    TOKENS_MAX,
    ChatCompletions,
    ChatWriter,
    Terms,
    compact,
    end_reason,
    head,
    includes_usage,
    sampling_of,
    usage_of,
)
from edgekv.server.spelling import figures

TOKENS_USUAL = 16  # of an answer, as the API has it


@dataclass(frozen=True, kw_only=True)
class TextTerms(Terms):
    """And the prompt, if it is to be said again."""

    echo: str = ""


class TextCompletions(ChatCompletions):
    """POST /v1/completions: a text is continued as it is."""

    def parse(self, body: Fields) -> Asked:
        """What a request's body asks. Raises Fault."""
        prompt = body.raw("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str) or not prompt:
            raise invalid("prompt", "one string that is not empty")
        if body.has("suffix"):
            raise Fault("invalid", "suffix is not supported", param="suffix")
        num_top = body.integer("logprobs", 0, 20)
        max_tokens = body.integer("max_tokens", 1, TOKENS_MAX) or TOKENS_USUAL
        return Asked(
            completion=Completion(
                prompt=prompt,
                sampling=sampling_of(body, max_tokens=max_tokens, num_top=num_top),
            ),
            model=body.text("model", ""),
            stream=body.flag("stream"),
            num_answers=body.integer("n", 1, NUM_ANSWERS_MAX) or 1,
            terms=TextTerms(
                include_usage=includes_usage(body),
                num_top=num_top,
                echo=prompt if body.flag("echo") else "",
            ),
        )

    def writer(self, asked: Asked, about: About) -> Writer:
        """Of one stream."""
        return _TextWriter(asked, about)

    def whole(self, asked: Asked, about: About, answers: Sequence[Finished]) -> dict[str, Any]:
        """The answer that does not stream."""
        choices = [
            {
                "index": index,
                "text": asked.terms.echo + answer.message.content,
                "logprobs": _text_logprobs(answer.logprobs, asked),
                "finish_reason": end_reason(answer.reason),
            }
            for index, answer in enumerate(answers)
        ]
        return {
            **head(asked, about, "text_completion"),
            "choices": choices,
            "usage": usage_of([answer.usage for answer in answers]),
            "edgekv": figures(answers[0].stats),
        }


class _TextWriter(ChatWriter):
    """The same of a text that is continued."""

    kind = "text_completion"

    def begin(self) -> str:
        """The opening."""
        return "".join(
            self._text(i, self._asked.terms.echo) for i in range(self._asked.num_answers)
        )

    def event(self, event: Event, choice: int = 0) -> str:
        """What happened, of one answer."""
        match event:
            case TextDelta(text=text, logprobs=logprobs):
                return self._text(choice, text, logprobs=_text_logprobs(logprobs, self._asked))
            case Finished():
                self._usages.append(event.usage)
                self._stats = self._stats or figures(event.stats)
                return self._text(choice, "", reason=end_reason(event.reason))
        return ""

    def heartbeat(self) -> str:
        """What shows that the request lives."""
        return self._text(0, "")

    def _text(
        self,
        choice: int,
        text: str,
        *,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> str:
        shown = {"index": choice, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return sse(compact({**self._head, "choices": [shown]}))


def _text_logprobs(rows: Sequence[TokenLogprob], asked: Asked) -> dict[str, Any] | None:
    if asked.terms.num_top is None:
        return None
    return {
        "tokens": [row.token for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": [{top.token: top.logprob for top in row.top} for row in rows],
    }
