"""Waits until the Job that fetches the model has put it in its place: a folder that is there is complete."""

import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
if not folder.is_dir():
    print(f"waiting for {folder}", flush=True)
while not folder.is_dir():
    time.sleep(2)
