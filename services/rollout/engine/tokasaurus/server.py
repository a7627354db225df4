"""One question to a server of Tokasaurus' cartridge branch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx

from foundry.errors import AlignmentError, DeadlineExceeded, FoundryError, InvalidArgument, Unavailable
from services.rollout.engine import SequenceRequest
from services.rollout.engine.tokasaurus.packed import ExternalAnswer, read_answer

# What a token takes in an answer: text, id and packed logprob, and for each alternative a packed id and logprob.
_TOKEN_BYTES, _ALTERNATIVE_BYTES, _FRAME_BYTES = 256, 16, 64 * 1024
_MAX_CHARACTERS = 500


class ExternalServer:
    """Use within one event loop."""

    def __init__(
        self, url: str, route: str, *, vocab_size: int, timeout_seconds: float, connect_seconds: float
    ) -> None:
        """`timeout_seconds` is of a whole answer, `connect_seconds` of reaching the server."""
        self._route, self._vocab_size, self._timeout_seconds = route, vocab_size, timeout_seconds
        self._name = f"the Tokasaurus server at {url}"
        # As many as the engine has places for. An answer comes in one piece when it has ended, so that nothing but the
        # whole can have a limit.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=connect_seconds)
        self._client = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, trust_env=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, request: SequenceRequest, cartridges: Sequence[str]) -> ExternalAnswer:
        """`cartridges` are the ids that the server has them under. Who gives up has the server give up, too.

        Raises Unavailable if the server can't be reached, goes away or fails, DeadlineExceeded, InvalidArgument if it
        refuses the request, AlignmentError if what it answers is no answer to it.
        """
        sampling = request.sampling
        token_bytes = _TOKEN_BYTES + _ALTERNATIVE_BYTES * sampling.num_logprobs
        try:
            async with asyncio.timeout(self._timeout_seconds):
                max_bytes = _FRAME_BYTES + sampling.max_new_tokens * token_bytes
                status, content = await self._post(_body(request, cartridges), max_bytes)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self._name} has not answered within {self._timeout_seconds:g} s") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"{self._name} can't be reached: {str(error) or type(error).__name__}") from error
        if status != httpx.codes.OK:
            raise self._refused(status, content, cartridges)
        try:
            return read_answer(
                content,
                vocab_size=self._vocab_size,
                max_tokens=sampling.max_new_tokens,
                num_alternatives=sampling.num_logprobs,
            )
        except (ValueError, TypeError, LookupError, RecursionError, AttributeError) as error:
            raise AlignmentError(f"{self._name} sent what is no answer: {error!r:.{_MAX_CHARACTERS}}") from error

    async def _post(self, body: dict[str, Any], max_bytes: int) -> tuple[int, bytes]:
        content = bytearray()
        async with self._client.stream("POST", self._route, json=body) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > max_bytes:
                    raise AlignmentError(f"{self._name} sent more than the {max_bytes} bytes that an answer may have")
        return response.status_code, bytes(content)

    def _refused(self, status: int, content: bytes, cartridges: Sequence[str]) -> FoundryError:
        try:
            said = str(json.loads(content)["detail"])[:_MAX_CHARACTERS]
        except (ValueError, TypeError, LookupError, RecursionError):
            said = f"status {status}"
        if any(each in said for each in cartridges):
            return Unavailable(
                f"{self._name} can't read a cartridge ({said}): is its `cartridge_dir` the directory of "
                "`tokasaurus.cartridge_dir`?"
            )
        if status in (httpx.codes.NOT_FOUND, httpx.codes.METHOD_NOT_ALLOWED):
            return Unavailable(f"{self._name} has no {self._route}: `tokasaurus.route` says where its branch has it")
        if status in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
            return InvalidArgument(f"{self._name} refuses the request: {said}", field="sampling")
        return Unavailable(f"{self._name} failed: {said}")


def _body(request: SequenceRequest, cartridges: Sequence[str]) -> dict[str, Any]:
    sampling = request.sampling
    return {
        # It serves one and does not look.
        "model": "default",
        "prompt": list(request.prompt_ids),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop": list(sampling.stop),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.num_logprobs,
        "logprobs_in_fingerprint": True,
        "cartridges": [{"id": each, "source": "local"} for each in cartridges],
    }
