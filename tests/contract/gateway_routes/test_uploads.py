"""Documents as files: forms, and PDF, HTML and DOCX, whose text is kept."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.gateway_routes.site import Site
from tests.files import docx, html, pdf

TEXT = "The treaty was signed in Ghent."
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


@pytest.mark.parametrize(
    ("filename", "media_type", "content", "text"),
    [
        ("treaty.txt", "text/plain", TEXT.encode(), TEXT),
        ("treaty.MD", "", b"# Treaty", "# Treaty"),
        ("treaty", "text/markdown; charset=UTF-8", "# Trëaty".encode(), "# Trëaty"),
        ("treaty.pdf", "application/pdf", pdf(TEXT), TEXT),
        ("treaty.html", "text/html", html(TEXT), f"# Head\n\n{TEXT}"),
        ("treaty.docx", "application/octet-stream", docx(TEXT), TEXT),
    ],
)
def test_a_file_of_a_form_is_kept_as_its_text(
    site: Site, filename: str, media_type: str, content: bytes, text: str
) -> None:
    file = (filename, content, media_type) if media_type else (filename, content, "application/octet-stream")
    answer = site.http("POST", "/v1/documents", files={"file": file}, data={"title": "T"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["title"] == "T"
    assert site.client.documents.text(answer.json()["digest"]) == text
    site.client.documents.delete(answer.json()["digest"])


def test_a_files_name_is_its_title(site: Site) -> None:
    answer = site.http("POST", "/v1/documents", files={"file": (r"C:\docs\titled.txt", b"Titled.", "text/plain")})
    assert answer.json()["title"] == "titled.txt"


@pytest.mark.parametrize(
    ("media_type", "content"), [("application/pdf", pdf(TEXT)), ("text/html", html(TEXT)), (DOCX, docx(TEXT))]
)
def test_a_file_may_be_the_body(site: Site, media_type: str, content: bytes) -> None:
    headers = {"content-type": media_type}
    answer = site.http("POST", "/v1/documents?title=Body", content=content, headers=headers)
    assert (answer.status_code, answer.json()["title"]) == (201, "Body")
    assert TEXT in site.client.documents.text(answer.json()["digest"])


@pytest.mark.parametrize(
    ("form", "status", "param"),
    [
        ({"files": {"other": ("a.txt", b"x", "text/plain")}}, 400, "file"),
        ({"files": {"file": ("a.txt", b"x", "text/plain")}, "data": {"name": "x"}}, 400, "name"),
        ({"files": {"file": ("a.txt", b"x", "text/plain")}, "data": {"title": "x" * 301}}, 400, "title"),
        ({"files": [("file", ("a.txt", b"x", "text/plain"))] * 2}, 400, None),
        ({"files": {"file": ("a.png", b"x", "image/png")}}, 415, "file"),
        ({"files": {"file": ("a.exe", b"x", "application/octet-stream")}}, 415, "file"),
        ({"files": {"file": ("a.pdf", b"nothing", "application/pdf")}}, 400, "file"),
        ({"files": {"file": ("a.pdf", pdf(""), "application/pdf")}}, 400, "file"),
        ({"files": {"file": ("a.docx", b"PK\3\4", DOCX)}}, 400, "file"),
        ({"files": {"file": ("a.txt", b"\xff", "text/plain")}}, 400, "file"),
        ({"files": {"file": ("a.txt", b"a" * 110_000, "text/plain")}}, 413, "file"),
        ({"files": {"file": ("a.html", html("a" * 110_000), "text/html")}}, 413, "file"),
        ({"content": b"--x\r\nno", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "file"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400, None),
    ],
)
def test_what_is_no_document_is_refused(site: Site, form: dict[str, Any], status: int, param: str | None) -> None:
    answer = site.http("POST", "/v1/documents", **form)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
