"""What a version is compared with, each asked through the gateway as any client would ask it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

from foundry.client import ChatAnswer, Foundry, VersionJson
from foundry.errors import InvalidArgument
from foundry.evaluation.questions import Question


@dataclass(frozen=True, slots=True)
class System:
    """One way of answering questions."""

    label: str
    # As the gateway is asked: the base model, or a version by its number.
    model: str
    # What the system turn says; nothing behind a cartridge, which holds that turn.
    document: str | None = None
    # The cartridge's.
    digest: str | None = None

    def ask(self, client: Foundry, question: Question, *, max_tokens: int) -> ChatAnswer:
        """The greedy answer."""
        system = [] if self.document is None else [{"role": "system", "content": self.document}]
        return client.chat(self.model, [*system, *question.messages], max_tokens=max_tokens, temperature=0.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A version, and the systems beside it."""

    manifest: VersionJson
    document: str
    # Who answers, and with which template.
    model_fingerprint: str
    template_digest: str
    # Of the first question.
    turn_tokens: int
    # In the order of the table, the version last.
    systems: list[System]
    # Those that the version is held against.
    baselines: list[System]
    # Why a system that one might expect is missing, a line each.
    left_out: list[str]

    @property
    def version(self) -> System:
        return self.systems[-1]

    def num_held_tokens(self, first_answer: ChatAnswer) -> int:
        """Tokens that the model holds before the turn, of a system's answer to the first question."""
        return first_answer.cartridge_tokens + first_answer.prompt_tokens - self.turn_tokens


def compare(client: Foundry, reference: str, question: Question) -> Comparison:
    """What `reference` means now, and what it is compared with; `question` is the first that will be asked.

    Raises CartridgeNotFound, and InvalidArgument for a version that names no document.
    """
    manifest = client.cartridges.get(reference)["version"]
    label = f"{manifest['name']}@{manifest['version']}"
    if manifest["document"] is None:
        raise InvalidArgument(
            f"{label} names no document, so there is nothing to compare it with: evaluate a version that a run made",
            field="reference",
        )
    base = client.models()[0]["id"]
    document = client.documents.text(manifest["document"])
    version = System(label, label, digest=manifest["digest"])
    # Behind a cartridge the prompt is the turn alone, so this says how long the turn is.
    probe = version.ask(client, question, max_tokens=1)
    whole = System("whole document", base, document)
    cut = _cut(client, whole, question, probe)
    untrained = _untrained(client, manifest)
    return Comparison(
        manifest,
        document,
        probe.model_fingerprint,
        probe.template_digest,
        probe.prompt_tokens,
        systems=[
            each for each in (System("no document", base), whole, cut, untrained, version) if not isinstance(each, str)
        ],
        baselines=[each for each in (whole, untrained) if not isinstance(each, str)],
        left_out=[each for each in (cut, untrained) if isinstance(each, str)],
    )


def _cut(client: Foundry, whole: System, question: Question, probe: ChatAnswer) -> System | str:
    """The longest beginning of the document whose system turn takes no more tokens than the cartridge; or why not.

    Found by bisection, each try an answer of one token: the gateway says how long a prompt was, and this side needs no
    tokenizer.
    """
    document = whole.document or ""

    def num_tokens_of(num_characters: int) -> int:
        beginning = replace(whole, document=document[:num_characters])
        return beginning.ask(client, question, max_tokens=1).prompt_tokens - probe.prompt_tokens

    num_tokens = probe.cartridge_tokens
    num_characters = bisect_right(range(1, len(document) + 1), num_tokens, key=num_tokens_of)
    if not document[:num_characters].strip():
        return f"The document cut to {num_tokens} tokens is left out: the template alone takes as many."
    return replace(whole, label=f"document cut to {num_tokens} tokens", document=document[:num_characters])


def _untrained(client: Foundry, manifest: VersionJson) -> System | str:
    """The version of step 0 of the run that made this one; or why not."""
    name, run = manifest["name"], manifest["run"]
    if manifest["step"] == 0:
        return f"The untrained cartridge is left out: version {manifest['version']} is untrained itself."
    starts = [each for each in client.cartridges.versions(name) if (each["run"], each["step"]) == (run, 0)]
    if not starts:
        return f"The untrained cartridge is left out: no version of step 0 is kept of {run}, which made this one."
    start = starts[-1]
    # What follows in `init` are its parameters.
    kind = start["init"].partition(",")[0] or "cartridge"
    return System(f"{kind}, untrained", f"{name}@{start['version']}", digest=start["digest"])
