"""The Job of a run: how it is made from the template, and what it says of itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import yaml

from foundry.errors import InvalidArgument
from foundry.store import Resources

JobManifest = dict[str, Any]

RUN_LABEL = "foundry.dev/run"
TEMPLATE_KEY = "job.yaml"
CONTAINER = "trainer"
# torchrun with a trainer on each GPU (services/trainer/launch.py), which reads its options from PET_* variables.
LAUNCH = ("python", "-m", "services.trainer.launch")
# Where the ranks of several pods meet.
RENDEZVOUS_PORT = 29500
_GPU = "nvidia.com/gpu"
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_DEFAULT_PREFIX = "foundry-run"
# Of what a Job's name becomes a label of its pods.
_MAX_NAME_LENGTH = 63


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    run_id: str
    complete: bool
    # Why it has failed for good; empty while it has not.
    failure: str
    deleting: bool
    num_failed_pods: int

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Self:
        metadata, status = manifest["metadata"], manifest.get("status") or {}
        # Other types, such as FailureTarget and Suspended, come before the end.
        met = {each["type"]: each for each in status.get("conditions") or () if each["status"] == "True"}
        failed = met.get("Failed")
        return cls(
            name=metadata["name"],
            run_id=metadata["labels"][RUN_LABEL],
            complete="Complete" in met,
            failure=f"{failed.get('reason', 'Failed')}: {failed.get('message', '')}" if failed else "",
            deleting="deletionTimestamp" in metadata,
            num_failed_pods=status.get("failed") or 0,
        )

    @property
    def finished(self) -> bool:
        return self.complete or bool(self.failure)

    def waiting_for(self) -> str:
        """What a run waits for that nobody has taken up although there is this Job."""
        failed = {0: "its pod is", 1: "1 pod failed, the next is"}.get(
            self.num_failed_pods, f"{self.num_failed_pods} pods failed, the next is"
        )
        return f"job {self.name}: {failed} not ready"


@dataclass(frozen=True, slots=True)
class JobTemplate:
    """`owner` is the ConfigMap it came from, as an owner reference: when that goes, so do the Jobs."""

    manifest: JobManifest
    owner: Mapping[str, str]

    @classmethod
    def parse(cls, config_map: str, uid: str, data: Mapping[str, str]) -> Self:
        """Raises InvalidArgument, naming the ConfigMap and what is wrong in it."""
        where = f"ConfigMap {config_map}"
        if TEMPLATE_KEY not in data:
            raise _unfit(f"{where} has no key {TEMPLATE_KEY}")
        try:
            manifest = yaml.safe_load(data[TEMPLATE_KEY])
        except yaml.YAMLError as error:
            raise _unfit(f"{TEMPLATE_KEY} of {where} is not YAML: {error}") from error
        try:
            kind = manifest["apiVersion"], manifest["kind"]
            names = [container["name"] for container in manifest["spec"]["template"]["spec"]["containers"]]
        except (KeyError, TypeError) as error:
            raise _unfit(f"{TEMPLATE_KEY} of {where} is not a Job with containers: {error!r}") from error
        if kind != ("batch/v1", "Job") or names.count(CONTAINER) != 1:
            raise _unfit(
                f"{TEMPLATE_KEY} of {where} is a {kind[0]} {kind[1]} with containers {names}: it must be a "
                f"batch/v1 Job with one container {CONTAINER}"
            )
        return cls(manifest, {"apiVersion": "v1", "kind": "ConfigMap", "name": config_map, "uid": uid})

    def name(self, run_id: str) -> str:
        """The same in every gateway, so that only one of them can make it. Raises InvalidArgument if it is too long."""
        prefix = (self.manifest.get("metadata") or {}).get("generateName") or _DEFAULT_PREFIX
        name = f"{prefix.rstrip('-')}-{run_id.removeprefix('run-')}"
        _check_length("the Job's name", name)
        return name

    def job(self, run_id: str, resources: Resources | None) -> JobManifest:
        """The manifest of one run's Job. Raises InvalidArgument if the template is not for what the run asks."""
        job = copy.deepcopy(self.manifest)
        metadata = job.setdefault("metadata", {})
        metadata.pop("generateName", None)
        metadata["name"] = self.name(run_id)
        metadata["ownerReferences"] = [dict(self.owner)]
        pod = job["spec"]["template"]
        for labelled in (metadata, pod.setdefault("metadata", {})):
            labelled.setdefault("labels", {})[RUN_LABEL] = run_id
        (trainer,) = (each for each in pod["spec"]["containers"] if each["name"] == CONTAINER)
        trainer["args"] = [*trainer.get("args", ()), "--run", run_id]
        if resources is not None:
            _give(trainer.setdefault("resources", {}), resources)
            if resources.gpus is not None:
                _set(trainer, "FOUNDRY_DEVICE", {"value": "cuda" if resources.gpus else "cpu"})
        num_gpus = int((trainer.get("resources") or {}).get("limits", {}).get(_GPU, 0))
        num_nodes = resources.nodes if resources is not None else 1
        if num_gpus > 1 or num_nodes > 1:
            trainer.setdefault("command", list(LAUNCH))
            _set(trainer, "PET_NPROC_PER_NODE", {"value": str(max(num_gpus, 1))})
        if num_nodes > 1:
            _spread(job, trainer, num_nodes)
        return job


def _check_length(what: str, name: str) -> None:
    if len(name) > _MAX_NAME_LENGTH:
        raise _unfit(f"{what} {name} is longer than {_MAX_NAME_LENGTH} characters: shorten the template's generateName")


def _unfit(message: str) -> InvalidArgument:
    return InvalidArgument(message, field="jobs.template")


def _give(given: JobManifest, resources: Resources) -> None:
    """Requests equal limits: a run gets what it asked for, no less and no more."""
    asked = {"cpu": resources.cpu, "memory": resources.memory}
    if resources.gpus is not None:
        asked[_GPU] = str(resources.gpus)
    for kind in ("requests", "limits"):
        amounts = given.setdefault(kind, {})
        amounts |= {name: amount for name, amount in asked.items() if amount}
        if resources.gpus == 0:
            # A pod that asks for none of them may still be kept off nodes that have none.
            del amounts[_GPU]


def _spread(job: JobManifest, trainer: JobManifest, num_nodes: int) -> None:
    """One pod a node, all at once; each knows its rank, and by its Service's name the address of the first."""
    name, subdomain = job["metadata"]["name"], job["spec"]["template"]["spec"].get("subdomain")
    if not subdomain:
        raise _unfit(
            f"resources.nodes is {num_nodes}, but the template's pods have no subdomain: it must be the name of a "
            "headless Service over them"
        )
    _check_length("the host name", f"{name}-{num_nodes - 1}")
    job["spec"] |= {"completionMode": "Indexed", "completions": num_nodes, "parallelism": num_nodes}
    _set(trainer, "PET_NNODES", {"value": str(num_nodes)})
    _set(trainer, "PET_NODE_RANK", {"valueFrom": {"fieldRef": {"fieldPath": _INDEX}}})
    _set(trainer, "PET_MASTER_ADDR", {"value": f"{name}-0.{subdomain}"})
    _set(trainer, "PET_MASTER_PORT", {"value": str(RENDEZVOUS_PORT)})


def _set(container: JobManifest, name: str, value: JobManifest) -> None:
    variables = [each for each in container.get("env") or () if each["name"] != name]
    container["env"] = [*variables, {"name": name, **value}]
