"""The gateway's application: what it holds, its middleware and its routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from foundry.rpc.pods import Pods
from foundry.store import CartridgeStore
from foundry.tasks import end
from foundry.telemetry.traces import flush_traces
from services.gateway import errors, metrics, openapi, usage
from services.gateway.access.audit import AuditLog
from services.gateway.access.authentication import Authentication
from services.gateway.access.counters import Counters
from services.gateway.access.grants import Grants
from services.gateway.access.issuer import Issuer
from services.gateway.access.keys import Keys
from services.gateway.access.oidc import Oidc
from services.gateway.access.quotas import Quotas
from services.gateway.access.rates import Rates
from services.gateway.access.route import BEARER
from services.gateway.access.stored import StoredBytes
from services.gateway.balancer import RolloutBalancer
from services.gateway.base_name import BaseName
from services.gateway.batches import files
from services.gateway.batches import routes as batches
from services.gateway.batches.work import BatchWorker
from services.gateway.conversion.converter import Converter
from services.gateway.middleware.audit import Audit
from services.gateway.middleware.body_limit import BodyLimit
from services.gateway.middleware.head import Head
from services.gateway.middleware.request_context import TRACING, RequestContext
from services.gateway.middleware.request_limits import RequestLimits
from services.gateway.middleware.request_metrics import RequestMetrics
from services.gateway.middleware.web_pages import WebPages, hosts_of
from services.gateway.openai import chat, completions, models, responses, tokenize
from services.gateway.openai.tokens import TokenSpelling
from services.gateway.resources import cartridge_files, cartridges, datasets, documents, grants, health, runs
from services.gateway.settings import GatewaySettings
from services.gateway.state import Gateway
from services.gateway.tokasaurus import routes as tokasaurus

_ROUTERS = (
    chat.router,
    completions.router,
    responses.router,
    tokenize.router,
    tokasaurus.router,
    files.router,
    batches.router,
    models.router,
    # Before the cartridges' own, whose names may have any number of slashes.
    grants.router,
    cartridge_files.router,
    cartridges.router,
    documents.router,
    runs.router,
    datasets.router,
)
# What browsers would keep from a page's scripts.
_EXPOSED = ("etag", "retry-after", "x-foundry-cartridge", "x-foundry-digest", "x-request-id")


def build_app(settings: GatewaySettings) -> FastAPI:
    audit = AuditLog(settings.audit_log_file)
    # FastAPI's own documentation has browsers fetch scripts of somebody else's.
    app = FastAPIOffline(
        redoc_url=None,
        title="Cartridge Foundry",
        version=version("cartridge-foundry"),
        lifespan=_lifespan(settings, audit),
        telemetry=TRACING,
    )
    # JSON escapes make more of a document; as text/plain it may be as large as the store takes.
    document_bytes = settings.store.max_document_bytes * 3 // 2 + 64 * 1024
    # The last one added sees a request first.
    app.add_middleware(Head)
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_request_bytes,
        limits={
            r"/v1/documents": document_bytes,
            r"/v1/runs": document_bytes,
            r"/v1/files": settings.batches.max_file_bytes + 64 * 1024,
            r"/v1/cartridges/.+/versions": settings.transfer_memory_bytes,
        },
    )
    app.add_middleware(RequestLimits)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            expose_headers=_EXPOSED,
            max_age=settings.cors_max_age_seconds,
        )
    hosts = hosts_of(settings.listen) if settings.allowed_hosts is None else settings.allowed_hosts
    app.add_middleware(WebPages, hosts=hosts, origins=settings.allowed_origins)
    app.add_middleware(Audit, audit=audit, completions=settings.audit_completions)
    app.add_middleware(RequestMetrics)
    app.add_middleware(RequestContext)
    errors.install(app)
    for router in _ROUTERS:
        app.include_router(router, dependencies=[Depends(BEARER)] if settings.api_keys else [])
    app.include_router(health.router)
    openapi.complete(app)
    return app


def _lifespan(settings: GatewaySettings, audit: AuditLog) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        token = settings.token_of("gateway")
        store = await CartridgeStore.open(settings.store)
        rollouts = RolloutBalancer(
            Pods("rollout", settings.rollout_addresses, settings.tls, token=token),
            poll_seconds=settings.poll_seconds,
            retry_timeout_seconds=settings.retry_timeout_seconds,
        )
        teachers = (
            Pods("teacher", [settings.teacher_address], settings.tls, token=token)
            if settings.teacher_address is not None
            else None
        )
        rates = Rates(Counters(store.redis), settings.limits)
        stored = StoredBytes()
        quotas = Quotas(store.runs, stored, settings.limits)
        jobs = None
        watching = [
            asyncio.create_task(usage.watch(partial(stored.look, store), settings.census_seconds)),
            asyncio.create_task(audit.write()),
        ]
        authentication = None
        if settings.api_keys:
            authentication, watches = _authentication(settings, store)
            watching += map(asyncio.create_task, watches)
        try:
            await rollouts.start()
            base_name = BaseName(store, rollouts)
            await base_name.look()
            watching.append(asyncio.create_task(base_name.watch(settings.census_seconds)))
            if settings.jobs is not None:
                # Here, because the Kubernetes client is large.
                from services.gateway.kubernetes.jobs import Jobs

                jobs = Jobs(settings.jobs, store.runs)
                jobs.start()
            metrics.MAX_IN_FLIGHT.set(settings.max_concurrent_requests)
            spelling = TokenSpelling(settings.tokenizer)
            converter = Converter(settings.conversions, max_text_bytes=settings.store.max_document_bytes)
            app.state.gateway = gateway = Gateway(
                settings, store, rollouts, base_name, teachers, spelling, converter, rates, quotas, jobs, authentication
            )
            watching.append(asyncio.create_task(BatchWorker(gateway).run()))
            yield
        finally:
            await end(*watching)
            await asyncio.to_thread(audit.flush)
            if jobs is not None:
                await jobs.close()
            if teachers is not None:
                await teachers.close()
            await rollouts.close()
            await rates.close()
            await store.close()
            # uvicorn ends the process by the signal that stopped it.
            await asyncio.to_thread(flush_traces)

    return lifespan


def _authentication(
    settings: GatewaySettings, store: CartridgeStore
) -> tuple[Authentication, list[Coroutine[Any, Any, None]]]:
    """With what keeps its keys, grants and issuer's keys fresh."""
    keys, grants, oidc = Keys(store.api_keys), Grants(store.grants), None
    watches = [each.watch(settings.api_keys_refresh_seconds) for each in (keys, grants)]
    if settings.oidc is not None:
        issuer = Issuer(settings.oidc.issuer, settings.oidc.jwks_url)
        watches.append(issuer.watch())
        oidc = Oidc(settings.oidc, issuer)
    return Authentication(keys, settings.admin_key, grants, oidc), watches
