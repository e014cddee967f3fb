"""What a process does with the memory that its tensors leave behind."""

import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""From malloc.h."""


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensors, instead of giving it back to the kernel.

    glibc maps every large tensor anew, and the kernel clears each of its pages: up to half of the
    time of a batch of small models on a CPU.  The process holds the most that it ever needed.
    Elsewhere than on Linux with glibc, and for memory on a GPU, this does nothing.
    """
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # an int
