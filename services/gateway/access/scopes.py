"""What each route asks of a key. None includes another: a key has as many scopes as it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from foundry.store.api_keys import Scope

# Those that decode: limits and the audit log count them.
COMPLETIONS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/cartridge/chat/completions",
        "/v1/cartridge/completions",
        "/custom/cartridge/chat/completions",
        "/custom/cartridge/completions",
        "/custom/cartridge/synchronous-batch-completions",
    }
)
NEEDED: Mapping[str, Scope] = {
    **{f"POST {path}": "query" for path in COMPLETIONS},
    "POST /tokenize": "query",
    "POST /detokenize": "query",
    "GET /v1/files": "query",
    "POST /v1/files": "query",
    "GET /v1/files/{file_id}": "query",
    "GET /v1/files/{file_id}/content": "query",
    "DELETE /v1/files/{file_id}": "query",
    "GET /v1/batches": "query",
    "POST /v1/batches": "query",
    "GET /v1/batches/{batch_id}": "query",
    "POST /v1/batches/{batch_id}/cancel": "query",
    "GET /v1/models": "query",
    "GET /v1/models/{model:path}": "query",
    "GET /v1/cartridges": "query",
    "GET /v1/cartridges/{name:path}": "query",
    "DELETE /v1/cartridges/{name:path}": "admin",
    "GET /v1/cartridges/{name:path}/versions": "query",
    "POST /v1/cartridges/{name:path}/versions": "train",
    "DELETE /v1/cartridges/{name:path}/versions/{version}": "admin",
    "GET /v1/cartridges/{name:path}/compare": "query",
    # The bytes are more than answers: who has them needs no gateway.
    "GET /v1/cartridges/{name:path}/versions/{version}/file": "train",
    "GET /v1/cartridges/{name:path}/tags/{tag}": "query",
    "PUT /v1/cartridges/{name:path}/tags/{tag}": "train",
    "DELETE /v1/cartridges/{name:path}/tags/{tag}": "admin",
    "POST /v1/cartridges/{name:path}/tags/{tag}/rollback": "train",
    "POST /v1/cartridges/{name:path}/rollback": "train",
    "GET /v1/cartridges/{name:path}/grants": "admin",
    "PUT /v1/cartridges/{name:path}/grants/{tenant}": "admin",
    "DELETE /v1/cartridges/{name:path}/grants/{tenant}": "admin",
    "GET /v1/documents": "train",
    "POST /v1/documents": "train",
    "GET /v1/documents/{digest}": "train",
    "GET /v1/documents/{digest}/content": "train",
    "DELETE /v1/documents/{digest}": "admin",
    "GET /v1/runs": "train",
    "POST /v1/runs": "train",
    "GET /v1/runs/{run_id}": "train",
    "DELETE /v1/runs/{run_id}": "admin",
    "GET /v1/runs/{run_id}/events": "train",
    "GET /v1/runs/{run_id}/dataset": "train",
    "GET /v1/runs/{run_id}/dataset/rows": "train",
    "POST /v1/runs/{run_id}/cancel": "train",
    "POST /v1/runs/{run_id}/pause": "train",
    "POST /v1/runs/{run_id}/resume": "train",
}

# Orchestrators and scrapers have no key, and the documentation says nothing that is not in this repository.
OPEN = frozenset(
    {"/health", "/healthz", "/ping", "/readyz", "/version", "/docs", "/docs/oauth2-redirect", "/openapi.json"}
)


def needed(methods: Iterable[str] | None, path: str) -> Scope:
    """Raises LookupError for a route that is not above, so that none is served without."""
    (method,) = methods or ()
    return NEEDED[f"{method} {path}"]
