"""What a user asks a training run to do. Checked once, here, so that no worker meets an impossible run.

The API's request, `docs/runs.md` and the options of `foundry train` are made from these fields.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from foundry.errors import CartridgeTooLong, InvalidArgument
from foundry.identity import ObjectiveKind, check_digest, content_digest
from foundry.store.names import check_name
from foundry.untrusted import parse_json
from foundry.validation import Checked, FirstError, Number, Strict, checked

# Quantities that Kubernetes takes too; zero is none.
_CPU = re.compile(r"(?=.*[1-9])\d{1,4}(\.\d{1,3})?|(?=.*[1-9])\d{1,7}m")
_MEMORY = re.compile(r"(?=.*[1-9])\d{1,15}([KMGT]i|[kMGT])?")
# More than any chat template adds to a document. A token has at least one byte.
TEMPLATE_TOKENS = 256
# Of one run.
MAX_DOCUMENTS = 64


def _cpu(value: str) -> str:
    if value and not _CPU.fullmatch(value):
        raise ValueError(f"{value[:100]!r} is not a quantity such as '4' or '500m'")
    return value


def _memory(value: str) -> str:
    if value and not _MEMORY.fullmatch(value):
        raise ValueError(f"{value[:100]!r} is not a quantity such as '16Gi' or '512Mi'")
    return value


def _stored(value: str) -> str:
    return value and check_digest(value)


def _several(value: Any) -> Any:
    """JSON has no tuples, and an option on the command line is one word."""
    if isinstance(value, str):
        return tuple(value.split(",", MAX_DOCUMENTS))
    return tuple(value) if isinstance(value, list) else value


def _each_once(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) < len(value):
        raise ValueError(f"{', '.join(value)}: name each once")
    return value


def _unicode(value: str) -> str:
    # JSON can spell half a surrogate pair, which is no character and travels nowhere.
    value.encode()
    return value


Digest = Annotated[str, checked(check_digest)]
Init = Literal["compact", "first_tokens", "text", "random", "version"]
Mode = Literal["on", "off", "hybrid"]
Family = Literal["recite", "quote", "blank", "evidence", "cloze", "question", "summary", "given"]
Schedule = Literal["constant", "cosine"]
Recipe = Literal["quick", "standard", "thorough"]
Families = Annotated[
    tuple[Family, ...], FirstError(), BeforeValidator(_several), AfterValidator(_each_once), Field(min_length=1)
]
Digests = Annotated[
    tuple[Digest, ...],
    FirstError(),
    BeforeValidator(_several),
    AfterValidator(_each_once),
    Field(max_length=MAX_DOCUMENTS - 1),
]
Text = Annotated[str, AfterValidator(_unicode)]
Title = Annotated[Text, Field(max_length=300)]


class SelfStudyPrompts(Strict):
    """Prompts that the model asks itself about chunks of the document."""

    kind: Literal["selfstudy"] = "selfstudy"
    """The model's own."""

    num_prompts: int = Field(default=64, ge=1, le=10**7)
    """Questions that the model asks itself."""

    max_prompt_tokens: int = Field(default=128, ge=1, le=2**20)
    """Most tokens of such a question."""


class DocumentPrompts(Strict):
    """Prompts from a file of JSON lines `{"prompt": ...}` that was put as a document."""

    kind: Literal["document"] = "document"
    """From a file."""

    digest: Digest
    """The file's, as `/v1/documents` gave it."""


Prompts = Annotated[SelfStudyPrompts | DocumentPrompts, Field(discriminator="kind")]


class Resources(Strict):
    """What each pod of a run asks of its node, in Kubernetes' quantities; what is not given is its Job template's."""

    cpu: Annotated[str, AfterValidator(_cpu)] = ""
    """Cores, such as `4` or `500m`."""

    memory: Annotated[str, AfterValidator(_memory)] = ""
    """Bytes, such as `16Gi` or `512Mi`."""

    gpus: int | None = Field(default=None, ge=0, le=1024)
    """Whole GPUs."""

    nodes: int = Field(default=1, ge=1, le=1024)
    """Pods that train together, of which each has all of the above."""


class RunSpec(Checked):
    """Raises InvalidArgument, naming the field, unless every value is within its range."""

    tags = ("selfstudy", "document")

    name: Annotated[str, checked(check_name)]
    """Name of the cartridge that is published: `name` or `tenant/name`."""

    document: Digest
    """Digest of the document that the cartridge stands in for."""

    more_documents: Digests = ()
    """Digests of further documents that it stands in for as well; each conversation is about one of them."""

    num_tokens: int = Field(default=128, ge=1, le=2**20)
    """Length of the cartridge in tokens (p)."""

    init: Init = "compact"
    """What the cartridge holds before the first step: the document's tokens that are attended to most, with their
    values refitted (`compact`), its first ones (`first_tokens`), random ones (`random`), those of another text (`text`,
    which is `init_text`), or a version that exists (`version`, which is `init_version`)."""

    init_text: Annotated[str, checked(_stored)] = ""
    """Digest of the stored document whose first tokens `text` begins with, such as a summary."""

    init_version: str = Field(default="", max_length=256)
    """Reference of the version that `version` goes on from: of this model and length, whatever its document."""

    reference_tokens: int = Field(default=16384, ge=1, le=2**20)
    """Most tokens of the turns about the document that say what `compact` keeps."""

    matching_steps: int = Field(default=200, ge=0, le=10**5)
    """Steps on each layer of `compact` that bring its attention nearer to that of the whole document, before any
    training."""

    num_frozen: int = Field(default=1, ge=0, le=2**20)
    """The first so many tokens of the cartridge are never trained."""

    num_steps: int = Field(default=40, ge=0, le=10**7)
    """Optimiser steps; 0 publishes the start and measures it."""

    batch_size: int = Field(default=8, ge=1, le=2**16)
    """Prompts per step."""

    mode: Mode = "on"
    """Who writes the answers that are trained on: the cartridge itself at every step (`on`), the model with the
    document before it and the document's own words, once before the first step (`off`), or these first and then the
    cartridge (`hybrid`)."""

    off_policy_share: Number = Field(default=0.5, gt=0, lt=1)
    """Share of the steps of `hybrid` before the cartridge answers itself."""

    families: Families = ("recite", "quote", "cloze")
    """What is written for the off-policy steps, in equal parts: the document's passages word for word (`recite`), its
    sentences by words of theirs (`quote`), with a blank to be filled (`blank`), as answers to what the model asks about
    them (`evidence`), or completed (`cloze`), the answers to `prompts` (`question`), summaries of its parts
    (`summary`), and the answers that a file of prompts has (`given`)."""

    general_share: Number = Field(default=0.0, ge=0, le=0.5)
    """Share of each step's prompts that have nothing to do with the document and whose teacher has none: behind the
    cartridge the model should stay what it is."""

    samples_per_prompt: int = Field(default=1, ge=1, le=2**10)
    """Answers to each prompt of a step."""

    max_new_tokens: int = Field(default=64, ge=1, le=2**20)
    """Most tokens of an answer to train on."""

    temperature: Number = Field(default=1.0, gt=0, le=10)
    """Temperature at which answers to train on are sampled."""

    prompts: Prompts = SelfStudyPrompts()
    """What is trained on."""

    objective: ObjectiveKind = "forward_kl"
    """The loss: KL from teacher to student (`forward_kl`) or back (`reverse_kl`), the generalised Jensen-Shannon
    divergence (`jsd`), `forward_kl` over the teacher's most likely tokens and the rest as one (`topk`), or the
    likelihood of written answers (`nll`, with mode `off`)."""

    jsd_beta: Number = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `jsd`."""

    topk: int = Field(default=20, ge=1, le=2**10)
    """Tokens that `topk` matches one by one."""

    hard_label_weight: Number = Field(default=0.0, ge=0, le=1)
    """Of the loss on the document's own words (`recite`, `quote`, `blank`, `evidence`): how much is their likelihood,
    beside the objective. A cartridge may so come to say what the document says where the model with the document is
    not sure."""

    learning_rate: Number = Field(default=0.01, gt=0, le=10)
    """Learning rate of the optimiser, where it is highest."""

    schedule: Schedule = "constant"
    """How the learning rate goes on after the warm-up: the same, or down to 0 at the last step (`cosine`)."""

    warmup_steps: int = Field(default=0, ge=0, le=10**7)
    """Steps over which the learning rate rises to its height, in equal parts."""

    max_grad_norm: Number = Field(default=0.0, ge=0)
    """Longer gradients are shortened to this norm; 0: never."""

    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Of everything that is drawn: equal runs with equal seeds draw the same."""

    heldout: Prompts | None = None
    """Prompts that are never trained on, to measure with. Unset: a part of `prompts`."""

    heldout_every: int = Field(default=10, ge=0, le=10**7)
    """Measure on held-out prompts every so many steps, besides the first and the last; 0: at those only. The version
    with the lowest KL is tagged `best`, and published once more when the run ends, if it is not the last; with hard
    labels, or objective `nll`, the one that finds the teacher's answers likeliest."""

    patience: int = Field(default=0, ge=0, le=10**7)
    """End after so many measurements in a row that were no better than the best one; 0: never."""

    durable_every: int = Field(default=10, ge=1, le=10**7)
    """Steps between two versions that go to object storage."""

    checkpoint_every: int = Field(default=10, ge=1, le=10**7)
    """Steps between two checkpoints of the trainer's state."""

    policy_mismatch_threshold: Number = Field(default=0.05, gt=0)
    """Nats per token beyond which the rollout is not the policy it claims to be, and the run stops."""

    # These are left out where they are the default, so that checkpoints of runs from before them keep their
    # configuration's digest.
    max_staleness: int = Field(default=0, ge=0, le=3, exclude_if=lambda value: value == 0)
    """Versions that the answers of a step may be behind the policy: so many steps are answered and scored while others
    train. 0: each step is answered by the version that it trains."""

    importance_ratio_max: Number = Field(default=2.0, ge=1, le=100, exclude_if=lambda value: value == 2.0)
    """Most that a token of an older version's answer counts: as much as what stands before it is likelier now, up to
    this."""

    model_fingerprint: Annotated[str, checked(_stored)] = ""
    """Model that the run is for. Empty: whatever model the worker serves."""

    resources: Resources | None = Field(default=None, exclude_if=lambda value: value is None)
    """For runs that are trained by a Kubernetes Job each."""

    @model_validator(mode="after")
    def _leave_something_to_train(self) -> Self:
        if self.num_frozen >= self.num_tokens:
            raise InvalidArgument(
                f"num_frozen is {self.num_frozen} of {self.num_tokens} tokens: nothing is left to train",
                field="num_frozen",
            )
        return self

    @model_validator(mode="after")
    def _name_the_start(self) -> Self:
        for init, field in (("text", "init_text"), ("version", "init_version")):
            if (self.init == init) != bool(getattr(self, field)):
                raise InvalidArgument(f"init {init} and {field} go together", field=field)
        return self

    @model_validator(mode="after")
    def _have_what_is_given(self) -> Self:
        if "given" in self.families and not isinstance(self.prompts, DocumentPrompts):
            raise InvalidArgument("family given takes the answers of a file of prompts: bring one", field="families")
        return self

    @model_validator(mode="after")
    def _imitate_what_is_written(self) -> Self:
        if self.objective == "nll" and self.mode != "off":
            raise InvalidArgument(
                "objective nll imitates written answers: of its own ones a cartridge learns nothing; use mode off",
                field="objective",
            )
        return self

    def to_json(self) -> str:
        """Always the same for the same run."""
        return json.dumps(self.model_dump(), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Raises InvalidArgument."""
        values = parse_json(text)
        # Runs from before there was a choice.
        old = {"init": "first_tokens", "mode": "on", "matching_steps": 0}
        return cls.model_validate(old | values if isinstance(values, dict) else values)

    @property
    def digest(self) -> str:
        """Of all that a checkpoint must agree with."""
        return content_digest(self.to_json().encode())

    @property
    def documents(self) -> tuple[str, ...]:
        """Digests of all that it stands in for."""
        return tuple(dict.fromkeys((self.document, *self.more_documents)))

    @property
    def texts(self) -> tuple[str, ...]:
        """Digests of all stored texts that it needs."""
        files = [each.digest for each in (self.prompts, self.heldout) if isinstance(each, DocumentPrompts)]
        return (*self.documents, *files, *([self.init_text] if self.init_text else []))

    @property
    def num_off_policy_steps(self) -> int:
        """The first so many steps train on answers that were there before them."""
        share = {"on": 0.0, "off": 1.0, "hybrid": self.off_policy_share}[self.mode]
        return round(share * self.num_steps)

    @property
    def loss(self) -> str:
        """What is made small, for people to read."""
        hard = f", {self.hard_label_weight:g} hard labels" if self.hard_label_weight else ""
        return f"{self.objective}{hard}"

    @property
    def is_surer(self) -> bool:
        """Whether the cartridge is meant to be surer than its teacher. How far it is from it then does not say which
        version is the best: how likely the teacher's held-out answers are does."""
        return self.objective == "nll" or self.hard_label_weight > 0

    @property
    def start(self) -> str:
        """How the first version is made, for people to read."""
        said = {
            "compact": f"reference_tokens={self.reference_tokens}, matching_steps={self.matching_steps}",
            "text": self.init_text,
            "version": self.init_version,
        }
        return f"{self.init}, {said[self.init]}" if self.init in said else self.init


# What a recipe says where a request does not; `foundry.recipes` has the values.
CHOSEN = frozenset(
    {"num_tokens", "reference_tokens", "matching_steps", "prompts", "families", "general_share", "max_new_tokens"}
    | {"num_steps", "batch_size", "mode", "off_policy_share", "heldout_every"}
    | {"hard_label_weight", "learning_rate", "schedule", "warmup_steps", "max_grad_norm"}
)


def _leave_to_the_recipe(schema: dict[str, Any]) -> None:
    """A request's fields have no default of their own there."""
    for name in CHOSEN:
        schema["properties"][name].pop("default", None)


class RunRequest(RunSpec):
    """A run whose document may come with it, as `text`, and of which little need be said: the rest is the recipe's."""

    model_config = ConfigDict(json_schema_extra=_leave_to_the_recipe)

    recipe: Recipe = "standard"
    """Where the values come from that are not given: `quick` takes minutes on two cores, `standard` is the best for its
    cost on a GPU, `thorough` trains longer on more kinds of data."""

    compression: Number | None = Field(default=None, ge=1, le=10**6)
    """How many tokens of the document one of the cartridge stands for, in place of `num_tokens`. Unset: 4."""

    document: Digest = ""
    """Digest of a stored document that the cartridge stands in for; either this or `text`."""

    text: Text | None = None
    """The document itself, which is stored with the run."""

    title: Title | None = None
    """Title of `text`."""

    @model_validator(mode="before")
    @classmethod
    def _name_the_document(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        text = values.get("text")
        if text is None and "document" not in values:
            raise InvalidArgument("document is missing: give it or text", field="document")
        if text is None and values.get("title") is not None:
            raise InvalidArgument("title goes with text: a stored document has its own", field="title")
        if text is not None and "document" in values:
            raise InvalidArgument("give either document or text", field="text")
        if not isinstance(text, str):
            return values
        return values | {"document": content_digest(text.encode(errors="replace"))}

    @model_validator(mode="after")
    def _may_fit(self) -> Self:
        if self.text is not None and self.num_tokens > (most := len(self.text.encode()) + TEMPLATE_TOKENS):
            raise CartridgeTooLong(
                f"a cartridge of {self.num_tokens} tokens was asked for, but the document can't have more than {most}",
                field="num_tokens",
            )
        return self

    @model_validator(mode="after")
    def _say_once_how_long(self) -> Self:
        if self.compression is not None and "num_tokens" in self.model_fields_set:
            raise InvalidArgument("give either num_tokens or compression", field="compression")
        return self
