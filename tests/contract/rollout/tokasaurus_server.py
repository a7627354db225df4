"""A server as Tokasaurus' cartridge branch documents itself, written from its README and its requests' fields.

It reads cartridges from its directory when they are first named, keeps them under their ids for good, and decodes with
`transformers`. `before_answer` and `answer` let a test hold it or have it lie.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

PAGE_TOKENS = 16
FIELDS = frozenset(
    {
        *("model", "prompt", "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n"),
        *("presence_penalty", "seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user"),
        *("metadata", "logprobs_in_fingerprint", "ignore_eos", "cartridges"),
    }
)


async def _nothing() -> None:
    pass


@dataclass
class TokasaurusServer:
    model_directory: Path
    cartridge_dir: Path
    eos_ids: frozenset[int]
    max_topk_logprobs: int | None = 4
    before_answer: Callable[[], Awaitable[None]] = _nothing
    answer: Callable[[dict[str, Any]], Response] = JSONResponse
    bodies: list[dict[str, Any]] = field(default_factory=list)
    given_up: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.model_directory, dtype=torch.float32)
        self.loaded: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if refusal := self._refusal(body):
            return JSONResponse({"detail": refusal}, status_code=400)
        try:
            held = [self._load(cartridge["id"]) for cartridge in body.get("cartridges") or []]
        except FileNotFoundError as error:
            return JSONResponse({"detail": str(error)}, status_code=400)
        waiting = asyncio.ensure_future(self.before_answer())
        gone = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait([waiting, gone], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            self.given_up.set()
            return Response(status_code=499)
        gone.cancel()
        return self.answer(self._answer(body, held))

    def _refusal(self, body: dict[str, Any]) -> str:
        if unknown := set(body) - FIELDS:
            return f"extra fields: {unknown}"
        if body.get("top_p") not in (None, 1.0) or body.get("logit_bias") is not None:
            return "not supported"
        most = body.get("logprobs") or 0
        if most > (self.max_topk_logprobs or 0):
            return f"logprobs={most} but engine was configured with max_topk_logprobs={self.max_topk_logprobs}"
        return ""

    def _load(self, cartridge_id: str) -> tuple[list[Tensor], list[Tensor]]:
        if cartridge_id not in self.loaded:
            directory = self.cartridge_dir / cartridge_id
            if not (directory / "config.yaml").exists():
                raise FileNotFoundError(f"Cartridge config not found: {directory / 'config.yaml'}")
            num_tokens = yaml.safe_load((directory / "config.yaml").read_text())["kv_cache_initializer"]["max_tokens"]
            found = torch.load(directory / "cartridge.pt", weights_only=False)
            fixed = "frozen" if "frozen_keys" in found else "fixed"
            halves = []
            for name in ("keys", "values"):
                # A server looks into the first layer of both.
                kept = found[f"{fixed}_{name}"][0].shape[2] + found[f"trainable_{name}"][0].shape[2]
                kept -= kept % PAGE_TOKENS
                pairs = zip(found[f"{fixed}_{name}"], found[f"trainable_{name}"], strict=True)
                halves.append([torch.cat(pair, dim=2)[:, :, :kept].detach().float() for pair in pairs])
            assert num_tokens == halves[0][0].shape[2]
            self.loaded[cartridge_id] = halves[0], halves[1]
        return self.loaded[cartridge_id]

    def _answer(self, body: dict[str, Any], held: list[tuple[list[Tensor], list[Tensor]]]) -> dict[str, Any]:
        ids, logprobs, top = self._decode(body, held)
        num_top = body["logprobs"]
        packed = {
            "completion_ids": [ids],
            "packed_chosen_logprobs": [_packed("f", logprobs)],
            "packed_topk_indices": [_packed("i", [each for row in top for each, _ in row])] if num_top else None,
            "packed_topk_logprobs": [_packed("f", [each for row in top for _, each in row])] if num_top else None,
        }
        return {
            "id": "1",
            "object": "text_completion",
            "model": body["model"],
            "created": 0,
            "choices": [{"index": 0, "text": "", "finish_reason": "stop", "logprobs": None}],
            "usage": {
                "prompt_tokens": len(body["prompt"]),
                "completion_tokens": len(ids),
                "total_tokens": len(body["prompt"]) + len(ids),
                "prompt_tokens_details": {"cached_tokens": 0},
            },
            "system_fingerprint": json.dumps(packed),
        }

    @torch.inference_mode()
    def _decode(self, body: dict[str, Any], held: Any) -> tuple[list[int], list[float], list[list[tuple[int, float]]]]:
        cache = DynamicCache()
        for keys, values in held:
            for layer, pair in enumerate(zip(keys, values, strict=True)):
                cache.update(*pair, layer)
        ids: list[int] = []
        logprobs: list[float] = []
        top: list[list[tuple[int, float]]] = []
        given = body["prompt"]
        while len(ids) < body["max_tokens"]:
            out = self.model(torch.tensor([given]), past_key_values=cache, use_cache=True).logits[0, -1]
            of_all = (out / (body["temperature"] or 1)).log_softmax(-1)
            token_id = int(of_all.argmax())
            ids.append(token_id)
            logprobs.append(float(of_all[token_id]))
            best = of_all.topk(body["logprobs"])
            top.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            if token_id in self.eos_ids and not body["ignore_eos"]:
                break
            given = [token_id]
        return ids, logprobs, top


def _packed(kind: str, numbers: list[Any]) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}{kind}", *numbers)).decode()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def listening(server: TokasaurusServer, path: str = "/custom/cartridge/completions") -> AsyncIterator[None]:
    app = Starlette(routes=[Route(path, server.completions, methods=["POST"])])
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    running = uvicorn.Server(config)
    running.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    sockets = [config.bind_socket()]
    server.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    task = asyncio.create_task(running.serve(sockets))
    try:
        yield
    finally:
        running.should_exit = running.force_exit = True
        await task
