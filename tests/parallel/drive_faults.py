"""What test_processes.py starts with torchrun: processes of which some fail, and the others wait for them.

    drive_faults.py FAULT

FAULT: memory (of rank 1), user (a mistake that all but rank 0 find), disk (full for all).
"""

import sys

from baleen.config import UserError
from baleen.parallel.ranks import Ranks, joined


def fail(fault: str, ranks: Ranks) -> None:
    if fault == "memory" and ranks.rank == 1:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 17179869184 bytes")
    if fault == "user" and ranks.rank:
        raise UserError("there is no such thing: take another")
    if fault == "disk":
        raise OSError(28, "No space left on device")


if __name__ == "__main__":
    with joined(8.0) as ranks:
        fail(sys.argv[1], ranks)
        ranks.largest([0.0])
