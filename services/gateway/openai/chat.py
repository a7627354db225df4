"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter, Request, Response

from foundry.v1 import common_pb2, rollout_pb2
from services.gateway.openai.delivery import stream, whole
from services.gateway.openai.generation import Answer, Choice, Chunk, Target, finish_reason
from services.gateway.openai.tokens import TokenSpelling, finite
from services.gateway.openai.types import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatDeltaChoice,
    ChatLogprobs,
    ChatRequest,
    TokenLogprob,
    TopLogprob,
)
from services.gateway.state import GatewayDep

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat_completions(asked: ChatRequest, request: Request, gateway: GatewayDep) -> Response:
    """Answer a conversation. Behind a cartridge, which holds the system message, the messages are its turn."""
    target = await Target.resolve(gateway, asked)
    conversation = common_pb2.Conversation(
        messages=[common_pb2.Message(role=_role(message.role), content=message.content) for message in asked.messages]
    )
    chat = _Chat(asked, Answer(gateway, target, asked, [conversation], "chatcmpl"), gateway.spelling)
    if asked.stream:
        return await stream(chat.answer, request, chat.delta, chat.last)
    return await whole(chat.answer, request, chat.completion)


def _role(role: str) -> str:
    # OpenAI's newer name; chat templates know the older.
    return "system" if role == "developer" else role


class _Chat:
    """An answer in OpenAI's words."""

    def __init__(self, asked: ChatRequest, answer: Answer, spelling: TokenSpelling) -> None:
        self.answer = answer
        self._asked = asked
        self._spelling = spelling
        self._begun: set[int] = set()

    def completion(self, choices: list[Choice]) -> ChatCompletion:
        return ChatCompletion(
            **self.answer.head(),
            choices=[
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content=choice.text),
                    logprobs=self._logprobs(choice),
                    finish_reason=choice.finish_reason,
                    token_ids=choice.ids if self._asked.return_token_ids else None,
                )
                for index, choice in enumerate(choices)
            ],
            usage=self.answer.usage(),
            foundry=self.answer.info(),
        )

    def delta(self, index: int, chunk: Chunk) -> ChatCompletionChunk:
        first = index not in self._begun
        self._begun.add(index)
        choice = ChatDeltaChoice(
            index=index,
            delta=ChatDelta(role="assistant" if first else None, content=chunk.text),
            logprobs=self._logprobs(chunk),
            finish_reason=finish_reason(chunk),
            token_ids=list(chunk.ids) if self._asked.return_token_ids else None,
        )
        return ChatCompletionChunk(
            **self.answer.head(), choices=[choice], foundry=self.answer.info() if first else None
        )

    def last(self) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            **self.answer.head(), choices=[], usage=self.answer.usage(), foundry=self.answer.info()
        )

    def _logprobs(self, part: Choice | Chunk) -> ChatLogprobs | None:
        if self._asked.num_logprobs is None:
            return None
        tops: Iterable[rollout_pb2.TopLogprobs | None] = part.top_logprobs or [None] * len(part.ids)
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._spelled(token_id, logprob).model_dump(),
                    top_logprobs=[]
                    if top is None
                    else [self._spelled(other, value) for other, value in zip(top.ids, top.logprobs, strict=True)],
                )
                for token_id, logprob, top in zip(part.ids, part.logprobs, tops, strict=True)
            ]
        )

    def _spelled(self, token_id: int, logprob: float) -> TopLogprob:
        text, content = self._spelling.spell(token_id)
        return TopLogprob(token=text, logprob=finite(logprob), bytes=content)
