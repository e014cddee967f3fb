"""Run a program that does not outlive the one that started it.

``python leash.py PARENT PROGRAM ARGUMENTS...`` asks the kernel to end this process with its parent,
whose PID is given, and becomes the program.  Without it a run that is killed leaves dvc and its
stage working.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the program that the arguments name."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(sys.argv[1]):  # the parent ended before the kernel knew
            raise SystemExit(1)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
