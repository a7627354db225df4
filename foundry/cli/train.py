"""foundry train: a document becomes a cartridge."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from foundry.cli.gateway import connect
from foundry.cli.runs import watch
from foundry.cli.terminal import App, Command, JsonEvents, note, print_json

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from foundry.store import RunRequest

# Shorter spellings.
_SHORT = {"num_tokens": "--tokens", "num_steps": "--steps", "learning_rate": "--lr"}


class TrainCommand(Command):
    """Makes its options from the fields of a run when it is used: loading those takes longer than `foundry --help`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        from typer.main import get_command

        app = App("", add_completion=False)
        app.command()(_with_run_options(_train, help=train.__doc__))
        return get_command(app).make_context(info_name, args, parent, **extra)


def train() -> None:
    """Train a cartridge for a document and watch. Ctrl-C stops watching, not the run."""


def _train(
    file: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The document: a text file in UTF-8, a PDF, HTML or DOCX file, or a directory; - is standard input. "
            "Or several, for one."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON with the keys of the API; there document, prompts and heldout may be files, relative "
            "to it. Options win over it."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='Prompts instead of its own questions: JSON lines {"prompt": ...}, or parquet, veRL\'s too.'),
    ] = None,
    heldout: Annotated[
        Path | None, typer.Option(help="Prompts that are never trained on, in the same format, to measure with.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the run as YAML; start, upload and train nothing.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Print the run's id and return.")] = False,
    as_json: JsonEvents = False,
    **given: Any,
) -> None:
    from foundry.cli.run_request import resolve

    documents = file or []
    files = {"document": documents[0] if documents else None, "prompts": prompts, "heldout": heldout}
    values = {option.key: given[option.name] for option in run_options() if given[option.name] is not None}
    # Before the stack is started: what is wrong should not take half a minute to be found.
    request, uploads = resolve(config, files, values, documents[1:])
    if dry_run:
        import yaml

        run = _dry(request)
        print_json(run) if as_json else print(yaml.safe_dump(run, sort_keys=False, allow_unicode=True), end="")
        return
    with connect(start=True) as client:
        for title, content in uploads.items():
            client.documents.create(content, title=title)
        unsaid = {"text", "title"} if request.text is None else {"document"}
        queued = client.runs.create(**request.model_dump(exclude_unset=True, exclude=unsaid))
        for line in queued["chosen"] or ():
            note(line)
        if detach:
            note(f"Watch it:  foundry runs follow {queued['id']}")
            print_json(queued) if as_json else print(queued["id"])
            return
        watch(client, queued, as_json=as_json)


def _dry(request: RunRequest) -> dict[str, Any]:
    """The whole run where the document's length is known here, else what was asked for."""
    from foundry.cli.run_request import document_tokens
    from foundry.recipes import choose, describe

    num_tokens = document_tokens(request)
    if num_tokens is None:
        return request.model_dump(mode="json", exclude_unset=True, exclude={"text", "title"})
    spec = choose(request, num_tokens)
    for line in describe(spec, request.recipe, num_tokens):
        note(line)
    note("counted here, without the document's template: the run may have a token and a step more")
    return spec.model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class RunOption:
    """An option that stands for one value of a run; `key` is where, as in ("prompts", "num_prompts")."""

    key: tuple[str, ...]
    spellings: tuple[str, ...]
    field: FieldInfo

    @property
    def name(self) -> str:
        return self.spellings[-1].removeprefix("--").replace("-", "_")

    @property
    def parameter(self) -> inspect.Parameter:
        """None stands for what the configuration file says, else for the default."""
        from foundry.store.spec import CHOSEN

        annotations = (self.field.annotation, *get_args(self.field.annotation))
        # Of an `Annotated` what it is without its annotations.
        kinds = [getattr(each, "__origin__", each) for each in annotations]
        kind = next((kind for kind in (int, float) if kind in kinds), str)
        about = " ".join((self.field.description or "").split())
        if self.key[0] == "heldout":
            about = f"Held out: {about}"
        elif self.key[-1] in CHOSEN or self.key[0] in CHOSEN:
            about += "  [default: the recipe's]"
        elif isinstance(self.field.default, int | float | str) and self.field.default != "":
            about += f"  [default: {self.field.default}]"
        option = typer.Option(*self.spellings, help=about, show_default=False)
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )


def run_options() -> Iterator[RunOption]:
    """One for every value of a run but the document, prompts in files apart."""
    from foundry.store import Resources, RunRequest, RunSpec, SelfStudyPrompts

    parts: dict[str, tuple[str, type[BaseModel]]] = {
        "prompts": ("", SelfStudyPrompts),
        "heldout": ("heldout-", SelfStudyPrompts),
        "resources": ("", Resources),
    }
    for key, field in RunSpec.model_fields.items():
        if key in parts:
            prefix, part = parts[key]
            for name, inner in part.model_fields.items():
                if name != "kind":
                    yield RunOption((key, name), (f"--{prefix}{name.replace('_', '-')}",), inner)
        elif key != "document":
            short = (_SHORT[key],) if key in _SHORT else ()
            yield RunOption((key,), (*short, f"--{key.replace('_', '-')}"), field)
    for key in ("recipe", "compression"):
        yield RunOption((key,), (f"--{key}",), RunRequest.model_fields[key])


def _with_run_options(function: Callable[..., None], *, help: str | None) -> Callable[..., None]:
    """`function` with a parameter for each, in place of its `**given`."""

    def command(**values: Any) -> None:
        function(**values)

    *own, _ = inspect.signature(function, eval_str=True).parameters.values()
    parameters = [*own, *(option.parameter for option in run_options())]
    command.__doc__ = help
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
