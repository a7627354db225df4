"""How a cartridge starts: which KV it holds before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from foundry.errors import CartridgeTooLong, InvalidArgument


def cut_context(context: Sequence[int], closing: Sequence[int], num_tokens: int) -> list[int]:
    """The context's first tokens and its closing tokens, `num_tokens` in all.

    The beginning-of-sequence, the system header and the end of the system turn thus stand inside the cartridge.
    Raises CartridgeTooLong if the context is shorter than asked.
    """
    if num_tokens > len(context):
        raise CartridgeTooLong(
            f"a cartridge of {num_tokens} tokens was asked for, but the document's context has only {len(context)}",
            field="num_tokens",
        )
    if num_tokens <= len(closing) + 1:
        raise InvalidArgument(
            f"num_tokens is {num_tokens}: it must exceed the template's {len(closing)} closing tokens by at least two",
            field="num_tokens",
        )
    return [*context[: num_tokens - len(closing)], *closing]
