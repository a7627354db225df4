"""/v1/completions."""

from __future__ import annotations

from collections import defaultdict

from fastapi import APIRouter, Request, Response

from foundry.v1 import common_pb2
from services.gateway.openai.delivery import stream, whole
from services.gateway.openai.generation import Answer, Choice, Chunk, Target, finish_reason
from services.gateway.openai.tokens import TokenSpelling, finite
from services.gateway.openai.types import Completion, CompletionRequest, TextChoice, TextLogprobs
from services.gateway.state import GatewayDep

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", response_model=Completion)
async def completions(asked: CompletionRequest, request: Request, gateway: GatewayDep) -> Response:
    """Continue each prompt. Choice i of prompt j has index j * n + i."""
    target = await Target.resolve(gateway, asked)
    prompts = [prompt if isinstance(prompt, str) else common_pb2.TokenIds(ids=prompt) for prompt in asked.prompt]
    text = _Text(asked, Answer(gateway, target, asked, prompts, "cmpl"), gateway.spelling)
    if asked.stream:
        return await stream(text.answer, request, text.delta, text.last)
    return await whole(text.answer, request, text.completion)


class _Text:
    """An answer in OpenAI's words."""

    def __init__(self, asked: CompletionRequest, answer: Answer, spelling: TokenSpelling) -> None:
        self.answer = answer
        self._asked = asked
        self._spelling = spelling
        # Characters of each choice sent so far.
        self._sent: defaultdict[int, int] = defaultdict(int)

    def completion(self, choices: list[Choice]) -> Completion:
        return Completion(
            **self.answer.head(),
            choices=[
                TextChoice(
                    index=index,
                    text=choice.text,
                    logprobs=self._logprobs(choice, choice.offsets),
                    finish_reason=choice.finish_reason,
                    token_ids=choice.ids if self._asked.return_token_ids else None,
                )
                for index, choice in enumerate(choices)
            ],
            usage=self.answer.usage(),
            foundry=self.answer.info(),
        )

    def delta(self, index: int, chunk: Chunk) -> Completion:
        first = index not in self._sent
        offset = self._sent[index]
        self._sent[index] += len(chunk.text)
        choice = TextChoice(
            index=index,
            text=chunk.text,
            logprobs=self._logprobs(chunk, [offset] * len(chunk.ids)),
            finish_reason=finish_reason(chunk),
            token_ids=list(chunk.ids) if self._asked.return_token_ids else None,
        )
        return Completion(**self.answer.head(), choices=[choice], foundry=self.answer.info() if first else None)

    def last(self) -> Completion:
        return Completion(**self.answer.head(), choices=[], usage=self.answer.usage(), foundry=self.answer.info())

    def _logprobs(self, part: Choice | Chunk, offsets: list[int]) -> TextLogprobs | None:
        if self._asked.num_logprobs is None:
            return None
        tokens = [self._spelling.spell(token_id)[0] for token_id in part.ids]
        logprobs = [finite(logprob) for logprob in part.logprobs]
        tops = None
        if part.top_logprobs:
            # The sampled token is always among them, as with OpenAI.
            tops = [
                {
                    self._spelling.spell(other)[0]: finite(value)
                    for other, value in zip(top.ids, top.logprobs, strict=True)
                }
                | {token: logprob}
                for top, token, logprob in zip(part.top_logprobs, tokens, logprobs, strict=True)
            ]
        return TextLogprobs(tokens=tokens, token_logprobs=logprobs, top_logprobs=tops, text_offset=offsets)
