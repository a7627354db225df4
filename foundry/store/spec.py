"""What a user asks a training run to do. Checked once, here, so that no worker meets an impossible run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from foundry.errors import InvalidArgument
from foundry.identity import check_digest
from foundry.store.names import check_name

# Quantities that Kubernetes takes too; zero is none.
_CPU = re.compile(r"(?=.*[1-9])\d{1,4}(\.\d{1,3})?|(?=.*[1-9])\d{1,7}m")
_MEMORY = re.compile(r"(?=.*[1-9])\d{1,15}([KMGT]i|[kMGT])?")
T = TypeVar("T")
OBJECTIVES = ("forward_kl", "reverse_kl", "jsd", "topk")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfStudyPrompts:
    """Prompts that the model asks itself about chunks of the document."""

    kind: ClassVar[str] = "selfstudy"
    num_prompts: int
    max_prompt_tokens: int = 128

    def __post_init__(self) -> None:
        _check_integers(self, {"num_prompts": (1, 10**7), "max_prompt_tokens": (1, 2**20)})


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentPrompts:
    """Prompts from a jsonl file that was put as a document."""

    kind: ClassVar[str] = "document"
    digest: str

    def __post_init__(self) -> None:
        if not isinstance(self.digest, str):
            raise InvalidArgument(f"digest is {self.digest!r}, not a string", field="digest")
        check_digest(self.digest)


Prompts = SelfStudyPrompts | DocumentPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What each pod of a run asks of its node, in Kubernetes' quantities; what is not given is its Job template's."""

    cpu: str = ""
    memory: str = ""
    gpus: int | None = None
    # Pods that train together, of which each has all of the above.
    nodes: int = 1

    def __post_init__(self) -> None:
        for name, pattern, example in (("cpu", _CPU, "'4' or '500m'"), ("memory", _MEMORY, "'16Gi' or '512Mi'")):
            value = getattr(self, name)
            if not isinstance(value, str) or (value and not pattern.fullmatch(value)):
                raise InvalidArgument(f"{name} is {value!r}, must be a quantity such as {example}", field=name)
        if self.gpus is not None:
            _check_integers(self, {"gpus": (0, 1024)})
        _check_integers(self, {"nodes": (1, 1024)})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """Raises InvalidArgument, naming the field, unless every value is within its range."""

    # The cartridge that is published, and the digest of the document it stands in for.
    name: str
    document: str
    # p, of which the first `num_frozen` are never trained.
    num_tokens: int
    num_frozen: int = 1
    num_steps: int
    # Prompts per step, answers per prompt.
    batch_size: int = 8
    samples_per_prompt: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    prompts: Prompts
    objective: str = "forward_kl"
    # Weight of the teacher in the mixture of `jsd`; candidates of `topk`.
    jsd_beta: float = 0.5
    topk: int = 20
    learning_rate: float = 0.01
    seed: int = 0
    # Prompts that are never trained on, judged every `heldout_every` steps; 0: at the first and last only.
    heldout: Prompts | None = None
    heldout_every: int = 0
    # Every so many steps a version goes to object storage, and the trainer's state.
    durable_every: int = 10
    checkpoint_every: int = 10
    # Nats per token beyond which the rollout is not the policy it claims to be, and the run stops.
    policy_mismatch_threshold: float = 0.05
    # Empty: whatever model the worker serves.
    model_fingerprint: str = ""
    # For runs that are trained by a Kubernetes Job each.
    resources: Resources | None = None

    def __post_init__(self) -> None:
        for name in ("name", "document", "objective", "model_fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise InvalidArgument(f"{name} is {getattr(self, name)!r}, not a string", field=name)
        check_name(self.name)
        check_digest(self.document, field="document")
        if self.model_fingerprint:
            check_digest(self.model_fingerprint, field="model_fingerprint")
        if self.objective not in OBJECTIVES:
            raise InvalidArgument(f"objective {self.objective!r} is not one of {OBJECTIVES}", field="objective")
        for name in ("prompts", "heldout"):
            if not isinstance(getattr(self, name), Prompts | None if name == "heldout" else Prompts):
                raise InvalidArgument(f"{name} is {getattr(self, name)!r}, not prompts", field=name)
        if not isinstance(self.resources, Resources | None):
            raise InvalidArgument(f"resources is {self.resources!r}, not resources", field="resources")
        _check_integers(
            self,
            {
                "num_tokens": (1, 2**20),
                "num_frozen": (0, 2**20),
                "num_steps": (1, 10**7),
                "batch_size": (1, 2**16),
                "samples_per_prompt": (1, 2**10),
                "max_new_tokens": (1, 2**20),
                "topk": (1, 2**10),
                "seed": (0, 2**63 - 1),
                "heldout_every": (0, 10**7),
                "durable_every": (1, 10**7),
                "checkpoint_every": (1, 10**7),
            },
        )
        if self.num_frozen >= self.num_tokens:
            raise InvalidArgument(
                f"num_frozen is {self.num_frozen} of {self.num_tokens} tokens: nothing is left to train",
                field="num_frozen",
            )
        _check_number(self, "temperature", above=0, most=10)
        _check_number(self, "learning_rate", above=0, most=10)
        _check_number(self, "policy_mismatch_threshold", above=0, most=math.inf)
        _check_number(self, "jsd_beta", above=0, most=1)
        if self.jsd_beta == 1:
            raise InvalidArgument("jsd_beta is 1, must be within 0..1, both excluded", field="jsd_beta")

    def to_json(self) -> str:
        values = asdict(self)
        for name in ("prompts", "heldout"):
            if (prompts := getattr(self, name)) is not None:
                values[name] = {"kind": prompts.kind, **asdict(prompts)}
        # Left out, so that checkpoints of runs from before it keep their configuration's digest.
        if self.resources is None:
            del values["resources"]
        return json.dumps(values, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> RunSpec:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InvalidArgument(f"run is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise InvalidArgument("run is not a JSON object")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSpec:
        """From JSON values; unknown keys are refused."""
        parsed = dict(values)
        for name in ("prompts", "heldout"):
            if parsed.get(name) is not None:
                parsed[name] = _prompts(name, parsed[name])
        if parsed.get("resources") is not None:
            parsed["resources"] = _part("resources", Resources, parsed["resources"])
        _check_keys(cls, parsed, where="")
        return cls(**parsed)


def _prompts(name: str, values: Any) -> Prompts:
    if not isinstance(values, dict):
        raise InvalidArgument(f"{name} is {values!r}, not an object", field=name)
    values = dict(values)
    kinds: dict[Any, type[SelfStudyPrompts] | type[DocumentPrompts]] = {
        cls.kind: cls for cls in (SelfStudyPrompts, DocumentPrompts)
    }
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise InvalidArgument(f"{name}.kind is {kind!r}, not one of {sorted(kinds)}", field=f"{name}.kind")
    return _part(name, kinds[kind], values)


def _part(name: str, kind: type[T], values: Any) -> T:
    """An object of a run's specification; its errors name the field within the run."""
    if not isinstance(values, dict):
        raise InvalidArgument(f"{name} is {values!r}, not an object", field=name)
    _check_keys(kind, values, where=f"{name}.")
    try:
        return kind(**values)
    except InvalidArgument as error:
        raise InvalidArgument(f"{name}: {error.message}", field=f"{name}.{error.field}") from error


def _check_keys(cls: type[Any], values: Mapping[str, Any], *, where: str) -> None:
    known = {entry.name: entry for entry in fields(cls)}
    for name in values:
        if name not in known:
            raise InvalidArgument(f"{where}{name} is not a setting of a run", field=f"{where}{name}")
    for name, entry in known.items():
        if name not in values and entry.default is MISSING:
            raise InvalidArgument(f"{where}{name} is missing", field=f"{where}{name}")


def _check_integers(spec: object, ranges: Mapping[str, tuple[int, int]]) -> None:
    for name, (least, most) in ranges.items():
        value = getattr(spec, name)
        if type(value) is not int or not least <= value <= most:
            raise InvalidArgument(f"{name} is {value!r}, must be an integer within {least}..{most}", field=name)


def _check_number(spec: object, name: str, *, above: float, most: float) -> None:
    value = getattr(spec, name)
    if type(value) not in (int, float) or not (math.isfinite(value) and above < value <= most):
        raise InvalidArgument(f"{name} is {value!r}, must be a number above {above} and at most {most}", field=name)
