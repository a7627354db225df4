"""API keys: who may ask a gateway for what, and how much of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from foundry.validation import Strict

Scope = Literal["query", "train", "admin"]
"""`query`: ask models and cartridges, and see what there is. `train`: put documents, make runs, change cartridges.
`admin`: delete, and manage the tenant's keys and grants."""

Most = Annotated[int | None, Field(ge=0, le=2**53)]


class KeyLimits(Strict):
    """How much one key, or for what is kept one tenant, may take; None: no limit of its own."""

    requests_per_minute: Most = None
    """HTTP requests."""

    tokens_per_minute: Most = None
    """Tokens of prompts and answers."""

    concurrent_requests: Most = None
    """Completions that are answered at one time."""

    concurrent_runs: Most = None
    """Runs of the tenant that are not over."""

    steps_per_run: Most = None
    """Optimiser steps of one run."""

    stored_bytes: Most = None
    """Bytes of the tenant's documents and durable cartridges."""

    def or_else(self, defaults: KeyLimits) -> KeyLimits:
        """These, and what `defaults` have where there is none."""
        return KeyLimits(**(defaults.model_dump() | self.model_dump(exclude_none=True)))
