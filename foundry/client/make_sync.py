"""Writes sync.py from aio.py; with --check says whether it is up to date.

The two differ in words only: what is awaited in one is waited for in the other. So does httpx make its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("aio.py")
TARGET = SOURCE.with_name("sync.py")
WORDS = (
    (r'""".*?"""', '"""The client that waits. Made from aio.py by `make docs`: change that one."""'),
    (r"\bawait |\basync ", ""),
    (r"\bfrom asyncio import sleep\b", "from time import sleep"),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\b__a(iter|enter|exit)__\b", r"__\1__"),
    (r"\ba(close|read|iter_bytes)\b", r"\1"),
    (r"\(client\.(chat\([^`]*?\))\)\.text", r"client.\1.text"),
)


def synchronous(source: str) -> str:
    for number, (pattern, word) in enumerate(WORDS):
        source = re.sub(pattern, word, source, count=1 if number == 0 else 0, flags=re.DOTALL)
    for command in (["check", "--select", "I", "--fix", "--quiet"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(TARGET), "-"]
        source = subprocess.run(ruff, input=source, capture_output=True, text=True, check=True).stdout
    return source


def main() -> int:
    text = synchronous(SOURCE.read_text())
    if "--check" not in sys.argv:
        TARGET.write_text(text)
    elif not TARGET.exists() or TARGET.read_text() != text:
        print(f"{TARGET.name} is not what {SOURCE.name} says: run 'make docs'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
