"""foundry chat and ask: talk to a cartridge, or to the base model."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundry.cli.gateway import connect
from foundry.cli.terminal import Json, JsonEvents, note, print_event, print_json, standard_input
from foundry.errors import InvalidArgument, Unavailable

if TYPE_CHECKING:
    from foundry.client import ChatAnswer, Foundry

Model = Annotated[str, typer.Argument(help="A cartridge (name, name@17, name@tag ...) or the base model's name.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy: always the likeliest token.")]


def ask(
    model: Model,
    question: Annotated[str | None, typer.Argument(help="What to ask; - or none: what standard input says.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    as_json: Json = False,
) -> None:
    """Ask one question. The line after the answer names the version and digest that it was computed with."""
    if question is None and sys.stdin.isatty():
        raise InvalidArgument("QUESTION is missing: name it, or pipe it in")
    if question in (None, "-"):
        question = standard_input("the question").strip()
    with connect(start=True) as client:
        said = [{"role": "user", "content": question}]
        answer = _answer(client, model, said, max_tokens, temperature, shown=not as_json)
    if as_json:
        print_json(asdict(answer))
    note(_identity(answer))


def chat(
    model: Model, max_tokens: MaxTokens = 512, temperature: Temperature = 0.7, as_json: JsonEvents = False
) -> None:
    """Talk, turn after turn. Ctrl-C ends an answer, Ctrl-D the conversation."""
    with connect(start=True) as client:
        _check_exists(client, model)
        note(f"Talking to {model}. Ctrl-D ends, an empty line starts afresh.")
        messages: list[dict[str, Any]] = []
        while True:
            try:
                words = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except UnicodeDecodeError as error:
                raise InvalidArgument(f"the line is not text in UTF-8: {error}") from error
            if not words:
                messages = []
                note("A new conversation.")
                continue
            messages.append({"role": "user", "content": words})
            try:
                answer = _answer(client, model, messages, max_tokens, temperature, shown=not as_json)
            except KeyboardInterrupt:
                print()
                # The question and the half answer are forgotten: the next turn must not build on them.
                messages.pop()
            except (InvalidArgument, Unavailable) as error:
                # A conversation that grew too long, or a service that restarts: what was said before is kept.
                note(f"error: {error.message}")
                messages.pop()
            else:
                if as_json:
                    print_event(asdict(answer))
                messages.append({"role": "assistant", "content": answer.text})


def _answer(
    client: Foundry, model: str, messages: list[dict[str, Any]], max_tokens: int, temperature: float, *, shown: bool
) -> ChatAnswer:
    """Shown as it comes, if at all."""
    stream = client.stream_chat(model, messages, max_tokens=max_tokens, temperature=temperature)
    for text in stream:
        if shown:
            sys.stdout.write(text)
            sys.stdout.flush()
    if shown:
        print()
    if stream.answer is None:
        raise Unavailable("the answer ended before it was complete; ask again")
    return stream.answer


def _identity(answer: ChatAnswer) -> str:
    """`name@version digest`, or the base model's fingerprint."""
    cartridges = "  ".join(f"{cartridge} {cartridge.digest}" for cartridge in answer.cartridges)
    return f"[{cartridges or f'{answer.model} {answer.model_fingerprint}'}]"


def _check_exists(client: Foundry, model: str) -> None:
    """Raises CartridgeNotFound at once rather than at the first question."""
    if model != client.models()[0]["id"]:
        client.cartridges.get(model)
