"""Evaluation over several processes: samples are divided, journals are merged, nothing is lost.

A sample belongs to a shard by a hash of its id, so that every run divides alike.  Each worker
process loads the model itself, sees its share of the GPUs (or uses its share of the threads) and
keeps what is finished in a journal of its own.  A run goes on where an earlier one stopped, however
it ended and with whatever number of workers.  A worker that fails is not started again: the others
go on, and the error says what happened and what is kept.
"""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hauberk.data.samples import Sample
from hauberk.errors import BadData, HauberkError, ShardsFailed
from hauberk.evaluation.run import Record, evaluate, read_records, taken_up

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from transformers import PreTrainedModel, ProcessorMixin

    from hauberk.requests import SupportsDefense

Loaded = tuple["PreTrainedModel", "ProcessorMixin", "SupportsDefense | None"]
GPUS = "CUDA_VISIBLE_DEVICES"
_PATIENCE = 10.0
"""Seconds that a worker has to end when it is asked to, before it is killed."""


@dataclass(frozen=True)
class FromDisk:
    """What a worker loads: a model, and the bundle of a defense or none."""

    path: str | Path
    bundle: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """As :func:`hauberk.loading.load_model` takes them."""

    def __call__(self) -> Loaded:
        """Load the two; errors are those of ``load_model`` and of :func:`hauberk.load`."""
        from hauberk.defenses import load
        from hauberk.loading import load_model

        model, processor = load_model(self.path, **self.options)
        return model, processor, load(self.bundle, model, processor) if self.bundle else None


def shard_of(sample_id: str, shards: int) -> int:
    """Tell the shard of a sample, 0 to shards - 1: the same in every run, on every machine."""
    return int.from_bytes(sha256(sample_id.encode()).digest()[:8], "big") % shards


def merge(journals: Sequence[Path]) -> list[Record]:
    """Read journals into one list that holds every sample once, in their order.

    An answer that stands twice is kept once: two runs may both have finished it.

    Raises
    ------
    BadData
        If two journals hold different answers of one sample, or cannot be read.
    """
    found: dict[str, tuple[Record, Path]] = {}
    for path in journals:
        for record in read_records(path):
            known, where = found.setdefault(record.sample_id, (record, path))
            if replace(known, seconds=record.seconds) != record:
                raise BadData(
                    f"{where} and {path}: different answers of {record.sample_id!r}; they are of "
                    "different runs: delete those that are not of this one."
                )
    return [record for record, _ in found.values()]


def evaluate_sharded(
    load: Callable[[], Loaded],
    samples: Sequence[Sample],
    *,
    shards: int,
    names: tuple[str, str],
    folder: Path,
    max_new_tokens: int,
    batch_size: int,
    threads: int | None = None,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[Record]:
    """Answer and judge samples in several processes; see :func:`hauberk.evaluation.run.evaluate`.

    Answers are those of one process, as far as they depend neither on their batch nor on the number
    of threads: rounding can tip a near tie between two tokens.

    Parameters
    ----------
    load : loads model, processor and defense in a worker; a function of a module, or a
        :class:`FromDisk`, since other processes have to find it
    shards : how many processes there are at once
    folder : where the journals lie, those of earlier runs included
    threads : of each worker; None divides those of this process
    progress : called with the number of newly finished samples

    Returns
    -------
    list of Record
        In the order of ``samples``.

    Raises
    ------
    ValueError
        If there is no shard, or no other process can find ``load``.
    BadData
        If the journals contradict each other, or are of another model or defense.
    ShardsFailed
        If workers failed, after the others have finished.
    """
    if shards < 1:
        raise ValueError(f"shards: {shards} is wrong, 1 or more is right.")
    try:
        pickle.dumps(load)
    except Exception as error:
        raise ValueError(
            f"no other process can find {load!r} ({error}); give a function of a module or "
            "FromDisk(path, bundle)."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    done = taken_up(_earlier(folder, names), samples, names, folder)
    progress(sum(sample.sample_id in done for sample in samples))
    parts: list[list[Sample]] = [[] for _ in range(shards)]
    for sample in samples:
        if sample.sample_id not in done:
            parts[shard_of(sample.sample_id, shards)].append(sample)
    options = {"names": names, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    settings = zip(_divided_gpus(shards), [_threads(threads, shards)] * shards, strict=True)
    workers = [
        _Worker(index, load, part, options | {"journal": folder / f"shard-{index}.jsonl"}, *setting)
        for index, (part, setting) in enumerate(zip(parts, settings, strict=True))
        if part
    ]
    failures = _run(workers, progress)
    records = {record.sample_id: record for record in merge(_journals(folder))}
    if failures:
        kept = sum(sample.sample_id in records for sample in samples)
        told = "\n  ".join(f"shard {index}: {why}" for index, why in sorted(failures.items()))
        raise ShardsFailed(
            f"{len(failures)} of {shards} shards failed:\n  {told}\n{kept} of {len(samples)} "
            f"answers are kept in {folder}; run it again to go on from there."
        )
    return [records[sample.sample_id] for sample in samples]


def _earlier(folder: Path, names: tuple[str, str]) -> list[Record]:
    """What earlier runs have finished."""
    records = merge(_journals(folder))
    if others := {(r.model, r.defense) for r in records} - {names}:
        told = ", ".join(" with ".join(pair) for pair in sorted(others))
        raise BadData(
            f"{folder} holds answers of {told}, and not only of {' with '.join(names)}; give each "
            "run a folder of its own."
        )
    return records


def _journals(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.jsonl"))


def _threads(given: int | None, shards: int) -> int:
    import torch

    return given or max(1, torch.get_num_threads() // shards)


def _divided_gpus(shards: int) -> list[str | None]:
    """Name the GPUs of each worker as CUDA_VISIBLE_DEVICES does; None where there are none."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get(GPUS)
    seen = named.split(",")[:count] if named else [str(index) for index in range(count)]
    if not seen:
        return [None] * shards
    return [",".join(seen[index::shards]) or seen[index % count] for index in range(shards)]


# --- the parent -------------------------------------------------------------------------------


class _Worker:
    """A process that answers one shard, seen from the one that started it."""

    def __init__(
        self,
        index: int,
        load: Callable[[], Loaded],
        samples: Sequence[Sample],
        options: Mapping[str, Any],
        gpus: str | None,
        threads: int,
    ) -> None:
        self.index, self.task = index, (samples, options)
        context = get_context("spawn")  # a fork would take over a GPU that is in use
        self.line, self._theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_work, args=(self._theirs, load, gpus, threads), daemon=True
        )

    def start(self) -> None:
        self.process.start()
        self._theirs.close()

    def hand_over(self) -> None:
        with suppress(OSError):  # it has ended: that is seen when it is listened to
            self.line.send(self.task)

    def end(self) -> None:
        if self.process.pid is not None:
            self.process.terminate()
            self.process.join(_PATIENCE)
            self.process.kill()
            self.process.join()
        self.line.close()

    def died(self) -> str:
        """Say how a process ended that did not say so itself."""
        self.process.join()
        code = self.process.exitcode or 0
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"its process ended with status {code}"


def _run(workers: Sequence[_Worker], progress: Callable[[int], Any]) -> dict[int, str]:
    """Let all workers work to their ends; return why those failed that did."""
    failures: dict[int, str] = {}
    try:
        for worker in workers:
            worker.start()
        for worker in workers:  # now that all are starting: this waits for each to be there
            worker.hand_over()
        working = {worker.line: worker for worker in workers}
        while working:
            for line in connection.wait(list(working)):
                worker = working[line]  # type: ignore[index]
                try:
                    finished, why = worker.line.recv()
                except (EOFError, OSError):
                    finished, why = None, worker.died()
                if finished is None:
                    del working[worker.line]
                    if why:
                        failures[worker.index] = why
                else:
                    progress(finished)
    finally:
        for worker in workers:
            worker.end()
    return failures


# --- the worker -------------------------------------------------------------------------------


def _work(
    line: "connection.Connection[Any, Any]",
    load: Callable[[], Loaded],
    gpus: str | None,
    threads: int,
) -> None:
    """Answer the samples that come over the line; say how many are finished, and how it ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    if gpus is not None:
        os.environ[GPUS] = gpus  # before CUDA is asked for anything
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()  # of loading: several at once are no progress

    def tell(finished: int) -> None:
        if finished:
            line.send((finished, ""))

    why = ""
    try:
        samples, options = line.recv()
        model, processor, defense = load()
        evaluate(model, processor, samples, defense, progress=tell, **options)
    except HauberkError as error:
        why = str(error)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    line.send((None, why))


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, even if it was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
