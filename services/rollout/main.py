"""python -m services.rollout.main: parse, build, serve, close."""

from __future__ import annotations

import asyncio
import gc
import signal

import structlog
import torch

from foundry import telemetry
from foundry.rpc.server import Server
from foundry.store import CartridgeStore
from foundry.telemetry.gpu import observe_gpus
from foundry.v1 import rollout_pb2, rollout_pb2_grpc
from services.rollout import metrics
from services.rollout.engine_choice import choose_engine
from services.rollout.prefetch import Prefetch
from services.rollout.servicer import RolloutServicer
from services.rollout.serving import Serving, load_engine
from services.rollout.settings import RolloutSettings

log = structlog.get_logger(__name__)


async def serve(settings: RolloutSettings) -> int:
    # Listening before the model is loaded: a port that is taken is known at once, and health answers NOT_SERVING.
    service = rollout_pb2.DESCRIPTOR.services_by_name["Rollout"]
    server = Server(settings.listen, [service], settings.tls, access=settings.access, reflect=settings.reflection)
    servicer = RolloutServicer(server.set_not_serving)
    rollout_pb2_grpc.add_RolloutServicer_to_server(servicer, server.grpc)
    await server.start()
    log.info("listening", port=server.port)
    try:
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        settings = await asyncio.to_thread(choose_engine, settings)
        info, engine = await asyncio.to_thread(load_engine, settings)
        metrics.ENGINE.labels(settings.engine).set(1)
        observe_gpus()
        store = await CartridgeStore.open(settings.store)
        serving = Serving.build(settings, info, engine, store)
    except BaseException:
        # Or gRPC would have the last word, about a loop that is closed.
        await server.stop(0)
        raise
    serving.driver.start()
    servicer.begin(serving)
    prefetch = Prefetch(serving.residency, store.subscribe)
    if settings.prefetch:
        prefetch.start()
    # What is there now stays: the collector need not walk it again and again.
    gc.collect()
    gc.freeze()
    # Until now a signal simply ended the process.
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await server.set_serving()
    log.info("serving", port=server.port, engine=settings.engine, model_fingerprint=info.spec.fingerprint)
    ends = (told.wait(), serving.driver.failed.wait(), serving.driver.drained())
    await asyncio.wait(map(asyncio.create_task, ends), return_when=asyncio.FIRST_COMPLETED)
    # Refuses new calls at once and ends those in flight after the grace period.
    await server.stop(serving.driver.grace_left(settings.grace_seconds))
    await prefetch.close()
    await serving.residency.close()
    await serving.driver.close()
    await store.close()
    # With a failed engine: an exit that a supervisor restarts. It does so after a drain, too.
    return int(serving.driver.failed.is_set())


def main() -> None:
    settings = RolloutSettings.parse()
    telemetry.start("rollout", settings)
    raise SystemExit(asyncio.run(serve(settings)))


if __name__ == "__main__":
    main()
