"""What `foundry train` was asked, from its configuration file, files and options: checked before anything starts."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from foundry.cli.prompt_files import parquet_lines, refuse_pickle
from foundry.cli.terminal import note, printable
from foundry.corpus import convert
from foundry.corpus.directory import MAX_BYTES, MAX_CONVERTED_BYTES, read_directory, told
from foundry.corpus.walk import read_file
from foundry.errors import CartridgeTooLong, DocumentUnreadable, InvalidArgument
from foundry.identity import content_digest
from foundry.local.demo_model import demo_model_directory
from foundry.local.home import Home
from foundry.selfstudy.prompts import read_prompts
from foundry.store import RunRequest
from foundry.store.documents import readable
from foundry.store.spec import TEMPLATE_TOKENS

# As a file, whatever is piped in.
STANDARD_INPUT = Path("-")


class _Yaml(yaml.SafeLoader):
    """With 1e-5 as a number, which YAML 1.1 takes for a text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def resolve(
    config: Path | None,
    files: Mapping[str, Path | None],
    given: Mapping[tuple[str, ...], Any],
    more_documents: Sequence[Path] = (),
) -> tuple[RunRequest, dict[str, str]]:
    """The run, and the texts that must be uploaded for it, by title. Files win over values, both over `config`'s.

    Raises InvalidArgument, naming what is wrong, DocumentUnreadable or CartridgeTooLong.
    """
    values = _read_config(config) if config is not None else {}
    for (key, *inner), value in given.items():
        if not inner:
            values[key] = value
            continue
        part = values.get(key)
        if not isinstance(part, dict) or part.get("kind", "selfstudy") != "selfstudy":
            part = {}
        values[key] = part | ({} if key == "resources" else {"kind": "selfstudy"}) | {inner[0]: value}
    uploads = {}
    for role in ("document", "prompts", "heldout"):
        file, named = files[role], values.get(role)
        if file is None and config is not None and isinstance(named, str) and not named.startswith("blake3:"):
            file = config.parent / named
        if file is None:
            continue
        if role == "document":
            text = read_document(file)
        else:
            refuse_pickle(file)
            text = parquet_lines(file) if file.suffix == ".parquet" else read_text(file)
        if role == "document":
            # What the file brings is not beside what options have taken the place of.
            dropped = ("document",) if files[role] is None else ("document", "text", "title")
            title = title_of(file)
            values = {"title": title} | {key: value for key, value in values.items() if key not in dropped}
            if "text" in values:
                raise InvalidArgument(f"{config}: give either document or text", field="text")
            values["text"] = text
        else:
            read_prompts(text, field=str(file))
            values[role] = {"kind": "document", "digest": content_digest(text.encode())}
            uploads[f"{role} of {values.get('name')}"] = text
    if more_documents:
        texts = {title_of(file): read_document(file) for file in more_documents}
        values["more_documents"] = [content_digest(text.encode()) for text in texts.values()]
        uploads |= texts
    request = RunRequest.model_validate(values)
    _check_length(request)
    return request, uploads


def read_document(path: Path) -> str:
    """A text file, a PDF, HTML or DOCX file, or all the files of a directory; what of that is left out is said.

    Raises DocumentUnreadable, ExtraMissing, and InvalidArgument as `read_directory` does.
    """
    if path.is_dir():
        corpus = read_directory(path)
        for line in told(corpus.left_out):
            note(printable(line))
        note(f"{path}: {len(corpus.paths)} files are one document of {len(corpus.text.encode())} bytes")
        return readable(corpus.text).decode()
    if (kind := convert.KINDS.get(path.suffix.lower())) is None:
        return read_text(path)
    content = read_file(path.resolve(), MAX_CONVERTED_BYTES)
    if content is None:
        raise DocumentUnreadable(f"{path} has more than {MAX_CONVERTED_BYTES} bytes", field="document")
    text = convert.markdown(str(path), kind, content, max_bytes=MAX_BYTES)
    try:
        return readable(text).decode()
    except DocumentUnreadable as error:
        raise DocumentUnreadable(f"{path}: {error.message}", field="document") from error


def title_of(path: Path) -> str:
    return "standard input" if path == STANDARD_INPUT else path.resolve().name


def _read_config(config: Path) -> dict[str, Any]:
    text = read_text(config)
    try:
        values = json.loads(text) if config.suffix == ".json" else yaml.load(text, _Yaml)
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidArgument(f"{config} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InvalidArgument(f"{config} holds no keys of a run")
    return values


def read_text(file: Path) -> str:
    """Raises DocumentUnreadable unless it is text in UTF-8."""
    try:
        return readable(sys.stdin.buffer.read() if file == STANDARD_INPUT else file.read_bytes()).decode()
    except OSError as error:
        raise DocumentUnreadable(f"{file} can't be read: {error.strerror}", field="document") from error
    except DocumentUnreadable as error:
        raise DocumentUnreadable(f"{file}: {error.message}", field="document") from error


def document_tokens(request: RunRequest) -> int | None:
    """Of the document's text, without its template; None unless the model that will read it is on this machine."""
    running = Home().running()
    model = Path(running.model_directory) if running is not None else demo_model_directory()
    file = model / "tokenizer.json"
    elsewhere = os.environ.get("FOUNDRY_GATEWAY")
    if request.text is None or elsewhere or not file.is_file() or find_spec("tokenizers") is None:
        return None
    from tokenizers import Tokenizer

    return len(Tokenizer.from_file(str(file)).encode(request.text, add_special_tokens=False).ids)


def _check_length(request: RunRequest) -> None:
    num_tokens = document_tokens(request)
    if num_tokens is not None and request.num_tokens > num_tokens + TEMPLATE_TOKENS:
        raise CartridgeTooLong(
            f"a cartridge of {request.num_tokens} tokens was asked for, but the document has only {num_tokens}",
            field="num_tokens",
        )
