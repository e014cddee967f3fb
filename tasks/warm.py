"""Warm stages: a stage begins in a fork of a process that has imported its libraries already.

Importing torch and transformers takes a stage longer than its work, in a small run.  So whoever
runs many stages starts one process (:func:`serve`) that imports what they share, and names its
socket in the environment; a stage that finds it hands over its arguments, folder, environment and
streams before it imports anything, and waits.  Of our own code the process has nothing, so that a
stage runs the code as it is, but for this module.  A stage that is ended ends its fork, a fork that
is killed kills its stage, and where nobody takes a stage over it works by itself.  What a process
is given before it begins, such as its limits, and variables that a library reads when it is
imported, are those of the one process.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SOCKET = "STAGE_WARM"
"""Names the socket in the environment."""
LIBRARIES = (
    "torch", "torchvision", "safetensors.torch", "PIL.Image", "tqdm", "pandas", "pyarrow.parquet",
    "pydantic.type_adapter", "yaml",
    "scipy.stats", "statsmodels.stats.proportion", "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto",
    "transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama",
)  # fmt: skip
"""What most stages import.  Best effort: one that is missing is a stage's own affair."""
PATIENCE = 30.0
"""Seconds that a stage waits to be taken over before it works by itself."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""
_SIZE, _STATUS = struct.Struct("!I"), struct.Struct("!B")
_TAKEN = b"t"
"""What a fork says once it has all that it needs to be the stage."""


def hand_over() -> None:
    """Let a fork of the warm process be this one, if this is ``python -m tasks.NAME``.

    Called when the package is imported, which is the first thing that such a process does.
    """
    asked = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
    if SOCKET in os.environ and asked and asked[0].startswith("tasks."):
        die_with_parent()
        if (status := forked(asked[0], asked[1:])) is not None:
            os._exit(status)


def die_with_parent() -> None:
    """End when DVC is killed, so that no orphan goes on to write what DVC has already deleted."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def forked(module: str, arguments: Sequence[str]) -> int | None:
    """Run a module as ``__main__`` in a fork of the warm process.

    Parameters
    ----------
    module : such as "tasks.evaluate"
    arguments : of the module

    Returns
    -------
    int or None
        Its exit status; None where there is no such process, and so nothing was run.
    """
    path = os.environ.get(SOCKET)
    if not path or not hasattr(socket, "send_fds"):
        return None
    asked = {"module": module, "argv": [module, *arguments], "folder": str(Path.cwd())}
    message = json.dumps({**asked, "environ": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(PATIENCE)
        try:
            line.connect(path)
            socket.send_fds(line, [_SIZE.pack(len(message))], [0, 1, 2])
            line.sendall(message)
            taken = line.recv(len(_TAKEN))
        except OSError:  # not ready yet, or gone, or too busy
            return None
        if not taken:
            return None
        line.settimeout(None)
        try:
            answer = line.recv(_STATUS.size)
        except OSError:
            answer = b""
    if not answer:  # the fork was killed, as this process would have been
        os.kill(os.getpid(), signal.SIGKILL)
    return int(_STATUS.unpack(answer)[0])


def serve(path: str) -> None:
    """Import the libraries, then fork for every stage that asks, for ever."""
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            with suppress(OSError):  # of one stage, which then works by itself
                line, _ = listening.accept()
                with line:
                    if os.fork() == 0:
                        listening.close()
                        _become(line)


def _become(line: socket.socket) -> None:
    """Be the stage that asked, to the end of this process."""
    status = 1
    try:
        asked = _received(line)
        line.sendall(_TAKEN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        threading.Thread(target=_end_with, args=(line,), daemon=True).start()
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environ"])
        del os.environ[SOCKET]
        sys.argv = asked["argv"]
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        with suppress(OSError):
            line.sendall(_STATUS.pack(status))
        os._exit(status)


def _received(line: socket.socket) -> Any:
    """Read what a stage hands over, and take its streams for our own."""
    head, streams, _, _ = socket.recv_fds(line, _SIZE.size, 3)
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    (left,) = _SIZE.unpack(head)
    message = bytearray()
    while len(message) < left:
        part = line.recv(left - len(message))
        if not part:
            raise SystemExit(1)
        message += part
    return json.loads(message)


def _end_with(line: socket.socket) -> None:
    """End this process as soon as the stage that asked is gone."""
    with suppress(OSError):
        line.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)
