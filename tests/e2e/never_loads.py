"""The teacher, whose model never comes to an end of loading."""

import time

from foundry.model.lm import FrozenLM
from services.teacher.main import main

if __name__ == "__main__":
    FrozenLM.load = lambda *arguments, **options: time.sleep(3600)  # type: ignore[assignment]
    main()
