"""The Kubernetes API, as far as the gateway needs it: Jobs, and the ConfigMap that they are made from.

The client blocks: each call runs in a thread, with a deadline and without retries of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kubernetes import client, config
from urllib3.exceptions import HTTPError

from foundry.errors import InvalidArgument
from services.gateway.errors import ClusterRefused, ClusterUnavailable
from services.gateway.kubernetes.job import RUN_LABEL, Job, JobManifest, JobTemplate
from services.gateway.settings import JobSettings

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Cluster:
    """Raises ClusterUnavailable, and ClusterRefused where asking again won't help by itself."""

    def __init__(self, settings: JobSettings) -> None:
        """Reaches for nothing yet. Raises InvalidArgument if there is neither a service account nor a KUBECONFIG."""
        configuration, namespace = _configuration()
        self.namespace = settings.namespace or namespace
        self._template = settings.template
        self._timeout_seconds = settings.api_timeout_seconds
        self._client = client.ApiClient(configuration)
        self._core = client.CoreV1Api(self._client)
        # Manifests as they stand: the models of typed calls refuse or drop what their release does not know.
        self._objects = client.CustomObjectsApi(self._client)
        self._jobs = {"group": "batch", "version": "v1", "namespace": self.namespace, "plural": "jobs"}

    def close(self) -> None:
        self._client.rest_client.pool_manager.clear()

    async def template(self) -> JobTemplate:
        """Also raises InvalidArgument if what the ConfigMap holds is no template."""
        found = await self._call(
            "get", f"configmaps/{self._template}", self._core.read_namespaced_config_map, self._template, self.namespace
        )
        return JobTemplate.parse(self._template, found.metadata.uid, found.data or {})

    async def jobs(self) -> list[Job]:
        """All Jobs of runs, whoever made them."""
        found = await self._call(
            "list", "jobs", self._objects.list_namespaced_custom_object, **self._jobs, label_selector=RUN_LABEL
        )
        return [Job.of(manifest) for manifest in found["items"]]

    async def create(self, manifest: JobManifest) -> bool:
        """False if there is a Job of that name already."""
        try:
            await self._call(
                "create", "jobs", self._objects.create_namespaced_custom_object, **self._jobs, body=manifest
            )
        except _AlreadyExists:
            return False
        return True

    async def delete(self, name: str) -> None:
        """Its pods are told to stop. No error if it is gone."""
        options = {"name": name, "propagation_policy": "Background"}
        with suppress(_Missing):
            await self._call("delete", "jobs", self._objects.delete_namespaced_custom_object, **self._jobs, **options)

    async def _call(self, verb: str, resource: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        doing = f"{verb} {resource} in namespace {self.namespace}"
        try:
            return await asyncio.to_thread(call, *args, **kwargs, _request_timeout=self._timeout_seconds)
        except client.ApiException as error:
            raise _typed(error, doing) from error
        except (HTTPError, OSError) as error:
            raise ClusterUnavailable(f"the Kubernetes API can't be reached to {doing}: {error}") from error


class _AlreadyExists(ClusterRefused):
    pass


class _Missing(ClusterRefused):
    pass


def _typed(error: client.ApiException, doing: str) -> ClusterUnavailable:
    said = _message(error)
    match error.status:
        case 401 | 403:
            return ClusterRefused(f"the gateway may not {doing} (docs/jobs.md lists the rights it needs): {said}")
        case 404:
            return _Missing(f"can't {doing}: {said}")
        case 409:
            return _AlreadyExists(f"can't {doing}: {said}")
        case 400 | 422:
            return ClusterRefused(f"the Kubernetes API does not take it to {doing}, correct the template: {said}")
    return ClusterUnavailable(f"the Kubernetes API failed to {doing}: {error.status} {said}")


def _message(error: client.ApiException) -> str:
    """What the API says in its Status object."""
    try:
        return str(json.loads(error.body or "")["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def _configuration() -> tuple[client.Configuration, str]:
    """How to reach the API, and the namespace to use unless another is set."""
    configuration = client.Configuration()
    # Retries are the caller's: the library would repeat each call at once, three times.
    configuration.retries = False
    try:
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        return configuration, _NAMESPACE_FILE.read_text().strip()
    except config.ConfigException as outside:
        # The library reads the variable when it is imported.
        path = os.environ.get("KUBECONFIG")
        try:
            config.load_kube_config(path, client_configuration=configuration)  # type: ignore[no-untyped-call]
            _, context = config.list_kube_config_contexts(path)  # type: ignore[no-untyped-call]
        except config.ConfigException as error:
            raise InvalidArgument(
                f"jobs need a cluster, but there is no service account ({outside}) and no KUBECONFIG ({error})",
                field="jobs",
            ) from error
        return configuration, context["context"].get("namespace", "default")
