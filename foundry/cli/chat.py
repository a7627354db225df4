"""foundry chat and ask: talk to a cartridge, or to the base model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from foundry.cli.gateway import connect
from foundry.cli.terminal import note
from foundry.errors import InvalidArgument, Unavailable

if TYPE_CHECKING:
    from foundry.client import ChatAnswer, FoundryClient

Model = Annotated[str, typer.Argument(help="A cartridge (name, name@17, name@tag ...) or the base model's name.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy: always the likeliest token.")]


def ask(
    model: Model,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
) -> None:
    """Ask one question. The line after the answer names the version and digest that it was computed with."""
    with connect(start=True) as client:
        answer = _stream(client, model, [{"role": "user", "content": question}], max_tokens, temperature)
    note(_identity(answer))


def chat(model: Model, max_tokens: MaxTokens = 512, temperature: Temperature = 0.7) -> None:
    """Talk, turn after turn. Ctrl-C ends an answer, Ctrl-D the conversation."""
    with connect(start=True) as client:
        _check_exists(client, model)
        note(f"Talking to {model}. Ctrl-D ends, an empty line starts afresh.")
        messages: list[dict[str, str]] = []
        while True:
            try:
                words = input("> ").strip()
            except EOFError:
                return
            if not words:
                messages = []
                note("A new conversation.")
                continue
            messages.append({"role": "user", "content": words})
            try:
                answer = _stream(client, model, messages, max_tokens, temperature)
            except KeyboardInterrupt:
                print()
                # The question and the half answer are forgotten: the next turn must not build on them.
                messages.pop()
            except (InvalidArgument, Unavailable) as error:
                # A conversation that grew too long, or a service that restarts: what was said before is kept.
                note(f"error: {error.message}")
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer.text})


def _stream(
    client: FoundryClient, model: str, messages: list[dict[str, str]], max_tokens: int, temperature: float
) -> ChatAnswer:
    stream = client.stream_chat(model, messages, max_tokens=max_tokens, temperature=temperature)
    for text in stream:
        sys.stdout.write(text)
        sys.stdout.flush()
    print()
    if stream.answer is None:
        raise Unavailable("the answer ended before it was complete; ask again")
    return stream.answer


def _identity(answer: ChatAnswer) -> str:
    """`name@version digest`, or the base model's fingerprint."""
    cartridges = "  ".join(f"{cartridge} {cartridge.digest}" for cartridge in answer.cartridges)
    return f"[{cartridges or f'{answer.model} {answer.model_fingerprint}'}]"


def _check_exists(client: FoundryClient, model: str) -> None:
    """Raises CartridgeNotFound at once rather than at the first question."""
    if model != client.models()[0]["id"]:
        client.cartridges.get(model)
