"""Puts a model into the cache claim, whole or not at all: FOLDER [HUB_ID REVISION].

Without a hub id, what an init container has copied to FOLDER.partial is moved into its place.
"""

import os
import shutil
import sys
from pathlib import Path

folder = Path(sys.argv[1])
partial = folder.with_name(f"{folder.name}.partial")
if folder.is_dir():
    print(f"{folder} is there already")
else:
    if len(sys.argv) > 2:
        from huggingface_hub import snapshot_download

        snapshot_download(
            sys.argv[2],
            revision=sys.argv[3],
            local_dir=partial,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
        )
    os.replace(partial, folder)
    print(f"{folder} is complete")
shutil.rmtree(partial, ignore_errors=True)
