"""In the place of what reads documents: prints the environment that it was given."""

from __future__ import annotations

import json
import os

if __name__ == "__main__":
    print(json.dumps(dict(os.environ)))
