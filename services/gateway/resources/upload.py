"""A document's bytes, however they were sent: as JSON, as the body itself, or as a file of a form."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from foundry.errors import InvalidArgument
from foundry.store.spec import Title
from foundry.validation import Checked
from services.gateway.conversion.formats import BY_MEDIA_TYPE, BY_SUFFIX, UNKNOWN, Format
from services.gateway.errors import UnsupportedMediaType
from services.gateway.media_type import MediaType

_MAX_TITLE_CHARACTERS = 300


class DocumentRequest(Checked):
    text: str
    title: Title = ""


class FormFields(Checked):
    """Those of a form besides its `file`."""

    title: Title = ""


@dataclass(frozen=True, slots=True)
class SentDocument:
    """`param` is where the bytes came from, for errors."""

    content: str | bytes
    kind: Format
    title: str
    param: str


class _InMemory(MultiPartParser):
    # A body is bounded before it is read; nothing of it goes to a disk.
    spool_max_size = 2**31


async def read_upload(request: Request, title: str) -> SentDocument:
    """`title` is for a body that is the document itself. Raises InvalidArgument, UnsupportedMediaType."""
    content_type = request.headers.get("content-type", "")
    sent_as = MediaType.of(content_type).name
    if sent_as == "application/json":
        asked = DocumentRequest.model_validate(await request.json())
        return SentDocument(asked.text, "text", asked.title, "text")
    if sent_as == "multipart/form-data":
        return await _of_form(request)
    return SentDocument(await request.body(), _kind(sent_as, "", "content-type"), title, "text")


async def _of_form(request: Request) -> SentDocument:
    try:
        form = await _InMemory(request.headers, request.stream(), max_files=1, max_fields=1).parse()
    except MultiPartException as error:
        raise InvalidArgument(f"the body is no multipart/form-data: {error}") from error
    fields = {name: value for name, value in form.multi_items() if name != "file"}
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise InvalidArgument("file is missing: a part of that name, with a filename", field="file")
    given = FormFields.model_validate(fields)
    filename = (file.filename or "").replace("\\", "/").rpartition("/")[2]
    kind = _kind(MediaType.of(file.content_type or "").name, filename, "file")
    return SentDocument(await file.read(), kind, given.title or filename[:_MAX_TITLE_CHARACTERS], "file")


def _kind(media_type: str, filename: str, param: str) -> Format:
    """By what it was said to be; where that is nothing, by its name. Raises UnsupportedMediaType."""
    if kind := BY_MEDIA_TYPE.get(media_type):
        return kind
    suffix = filename.rpartition(".")[2].lower()
    if media_type in UNKNOWN and filename and suffix in BY_SUFFIX:
        return BY_SUFFIX[suffix]
    raise UnsupportedMediaType(
        "send a document as application/json, or itself, or as the part `file` of multipart/form-data; it may be "
        f"{', '.join(BY_MEDIA_TYPE)}",
        field=param,
    )
