"""A rollout server whose tokens come at a fixed pace and take no processor: python -m benchmarks.paced_rollout

As one whose engine is on a GPU elsewhere. Its gRPC server is the product's own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from collections.abc import AsyncIterator

from foundry.rpc.server import Server
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc

FINGERPRINT = "blake3:" + "1" * 64
TOKEN_SECONDS = 0.01


class Paced(rollout_pb2_grpc.RolloutServicer):
    async def Resident(self, request: object, context: object) -> rollout_pb2.ResidentResponse:
        return rollout_pb2.ResidentResponse(
            model_fingerprint=FINGERPRINT, model_name="paced", max_sequence_tokens=4096, max_sequences=4096
        )

    async def Generate(
        self, request: rollout_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[rollout_pb2.GenerateChunk]:
        num_tokens = request.sampling.max_new_tokens
        loop = asyncio.get_running_loop()
        due = loop.time()
        for place in range(num_tokens):
            due += TOKEN_SECONDS
            await asyncio.sleep(due - loop.time())
            chunk = rollout_pb2.GenerateChunk(ids=[place], text="word ", logprobs=[-0.5], text_offsets=[5 * place])
            if not place:
                chunk.prompt_tokens = 20
                chunk.identity.MergeFrom(
                    common_pb2.Identity(model_fingerprint=FINGERPRINT, cartridges=request.cartridges)
                )
            if place == num_tokens - 1:
                chunk.finish_reason = rollout_pb2.FINISH_REASON_LENGTH
                chunk.usage.MergeFrom(rollout_pb2.Usage(prompt_tokens=20, completion_tokens=num_tokens))
            yield chunk


async def serve(address: str) -> None:
    server = Server(address, [rollout_pb2.DESCRIPTOR.services_by_name["Rollout"]])
    rollout_pb2_grpc.add_RolloutServicer_to_server(Paced(), server.grpc)
    await server.start()
    await server.set_serving()
    gc.collect()
    gc.freeze()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--listen", required=True)
    parser.add_argument("--metrics-port", help="as services have it; there are none")
    asyncio.run(serve(parser.parse_args().listen))


if __name__ == "__main__":
    main()
