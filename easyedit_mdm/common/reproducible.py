"""The same bytes from the same seed, whatever the number of threads."""

from __future__ import annotations

import os

# Intel's MKL, which multiplies matrices on CPUs, adds up in an order that depends on the number of threads
# unless it is told not to. AVX2 and not the machine's best, so that two machines that have it agree.
MKL_MODE = "AVX2,STRICT"


def same_bytes_on_any_number_of_threads() -> None:
    """Ask MKL for results that do not depend on the number of threads, unless the environment (`MKL_CBWR`)
    has asked for something.

    To be called before the first matrix is multiplied, as `easyedit-mdm` does; later it has no effect.
    """
    os.environ.setdefault("MKL_CBWR", MKL_MODE)
