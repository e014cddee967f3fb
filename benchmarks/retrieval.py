"""The nearest texts of 10,000 pictures among 1,200,000: blocks, and faiss, against one by one.

The index is whole: unit rows of 512 random numbers, stored in float16.  Of the queries a slice is
searched once and its time scaled, because all of them take minutes:

* the loop, which has the features in float32 at hand, by its queries;
* ``product`` by its blocks of queries, each of which goes through the whole index;
* ``faiss`` along the line through one query and the slice, because it copies the index first.

Every way is exact, so that they may differ in texts that are equally near alone.
"""

import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from benchmarks.measure import Ratio, cost, speed_up
from benchmarks.memory import peak

PICTURES, TEXTS, WIDTH = 10_000, 1_200_000, 512
NEAREST = 9
"""What a retriever asks for: one, and eight to pass over."""
SLICE = 256
"""A block of ``product``, and more than the 250 from which faiss takes a product of matrices."""
ONE_BY_ONE = 8
TIED = 1e-6
"""Cosines that lie no further apart are equally near: float32 sums of 512 differ by less."""
ROWS = 65_536
"""Made at once."""


def ratios() -> Iterator[Ratio]:
    """Measure seconds and recall on one index, then memory in processes of their own."""
    yield from _searches(*_random())  # nothing here holds the index any longer
    yield from _memory()


def _searches(index: Any, queries: Any) -> Iterator[Ratio]:
    baseline = "one query at a time, float32"
    told = f"{PICTURES} of {TEXTS} x {WIDTH}, scaled from {SLICE} queries"
    seconds, exact = _loop(index, queries)
    by_loop = seconds / ONE_BY_ONE * PICTURES
    beside = f"{told}; the loop's from {ONE_BY_ONE}"
    seconds, product = _timed(lambda: index.search(queries, NEAREST, "product"))
    by_product = seconds / SLICE * PICTURES
    yield speed_up("retrieval, product", baseline, beside, by_loop, by_product, 5)
    yield _recall("retrieval, product", baseline, index, queries, product, exact)
    if find_spec("faiss") is None:
        print("retrieval, faiss: skipped, it is not installed", file=sys.stderr)
        return
    first, _ = _timed(lambda: index.search(queries[:1], NEAREST, "faiss"))
    seconds, found = _timed(lambda: index.search(queries, NEAREST, "faiss"))
    by_faiss = first + (seconds - first) / (SLICE - 1) * (PICTURES - 1)
    yield speed_up("retrieval, faiss", baseline, beside, by_loop, by_faiss, 5)
    yield speed_up("retrieval, faiss", "retrieval, product", told, by_product, by_faiss, 1)
    yield _recall("retrieval, faiss", baseline, index, queries, found, exact)
    _agree("product and faiss", index, queries, product[1], found[1])


def _random() -> tuple[Any, Any]:
    """Make the index in blocks, so that float32 is never there of more than one."""
    import torch
    from torch.nn.functional import normalize

    from hauberk.retrieval import TextIndex

    generator = torch.Generator().manual_seed(0)
    features = torch.empty(TEXTS, WIDTH, dtype=torch.float16)
    for block in features.split(ROWS):
        block.copy_(normalize(torch.randn(block.shape, generator=generator), dim=-1))
    queries = normalize(torch.randn(SLICE, WIDTH, generator=generator), dim=-1)
    return TextIndex(tuple(map(str, range(TEXTS))), features), queries


def repeated() -> tuple[Any, Any]:
    """Make an index of the same size from one block, for memory does not depend on what it says."""
    import torch
    from torch.nn.functional import normalize

    from hauberk.retrieval import TextIndex

    torch.manual_seed(0)
    rows = normalize(torch.randn(ROWS, WIDTH), dim=-1).half()
    features = torch.empty(TEXTS, WIDTH, dtype=torch.float16)
    for block in features.split(ROWS):
        block.copy_(rows[: len(block)])
    return TextIndex(tuple(map(str, range(TEXTS))), features), rows[:SLICE].float()


def _timed(way: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = way()
    return time.perf_counter() - started, found


def _loop(index: Any, queries: Any) -> tuple[float, Any]:
    """Search one query at a time, with all features in float32, which are made before."""
    import torch

    features = index.features.float()

    def loop() -> Any:
        found = [(features @ query).topk(NEAREST) for query in queries[:ONE_BY_ONE]]
        return torch.stack([scores for scores, _ in found])

    return _timed(loop)


def _recall(what: str, baseline: str, index: Any, queries: Any, found: Any, exact: Any) -> Ratio:
    """Count the texts that are no further than the last of the exact ones."""
    scores = _scores(index, queries[:ONE_BY_ONE], found[1][:ONE_BY_ONE])
    best = exact.double()
    apart = (scores[:, 0] - best[:, 0]).abs().max().item()
    assert apart <= TIED, f"{what}: the nearest texts lie {apart:.1e} from the exact ones"
    wanted = exact.numel()
    right = int((scores >= best[:, -1:] - TIED).sum())
    shape = f"the nearest {NEAREST} of {ONE_BY_ONE} queries"
    return Ratio(
        f"{what}: recall", baseline, shape, wanted, right, "texts", right / wanted, ">= 1",
        right >= wanted,
    )  # fmt: skip


def _agree(what: str, index: Any, queries: Any, first: Any, second: Any) -> None:
    """Assert that two ways found the same nearest text of every query, or one as near."""
    ways = [_scores(index, queries, places[:, :1]) for places in (first, second)]
    apart = (ways[0] - ways[1]).abs().where(first[:, :1] != second[:, :1], 0).max().item()
    assert apart <= TIED, f"{what}: nearest texts lie {apart:.1e} apart"


def _scores(index: Any, queries: Any, places: Any) -> Any:
    """Cosines of queries and what was found for them, (queries, places) float64."""
    import torch

    return torch.einsum("qd,qpd->qp", queries.double(), index.features[places].double())


def _memory() -> Iterator[Ratio]:
    """Tell what a search takes beyond the index; faiss' own, in float32, is twice as large."""
    size = TEXTS * WIDTH * 2 / 2**20
    for backend, number, at_most in (("product", SLICE, 0.25), ("faiss", ONE_BY_ONE, 2.1)):
        if backend == "faiss" and find_spec("faiss") is None:
            continue
        taken = peak("search", backend, number)
        if taken is None:
            print("retrieval, memory: skipped, /proc/self/status is not there", file=sys.stderr)
            return
        shape = f"{number} queries of {TEXTS} x {WIDTH}"
        what = f"retrieval, {backend}: peak"
        yield cost(what, "the index in float16", shape, size, taken, at_most, "MiB")
