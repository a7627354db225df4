"""python -m services.trainer.launch OPTIONS: torchrun with a trainer on each GPU, and with the trainer's exit status.

How many GPUs and pods there are is said by torchrun's own variables: PET_NPROC_PER_NODE, PET_NNODES, PET_NODE_RANK,
PET_MASTER_ADDR, PET_MASTER_PORT.
"""

from __future__ import annotations

import sys

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from services.trainer.exits import RANK_LOST


def main() -> None:
    arguments = parse_args(["-m", "services.trainer.main"])  # type: ignore[no-untyped-call]
    # Not parsed there: it would take `--run` for one of torchrun's own.
    arguments.training_script_args = sys.argv[1:]
    try:
        run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        statuses = [failure.exitcode for failure in error.failures.values()]
        # What made the others end, if it was one of ours.
        status = next((status for status in statuses if status != RANK_LOST), RANK_LOST)
        raise SystemExit(status if status > 0 else 128 - status) from error
    except DistError as error:
        # The pod of rank 0 is not there, or no more.
        raise SystemExit(RANK_LOST) from error
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from stopped


if __name__ == "__main__":
    main()
