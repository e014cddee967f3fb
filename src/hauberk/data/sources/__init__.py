"""The data sets that can be loaded, by name; a new one is a module here and a line in SOURCES."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hauberk.data.samples import Split
from hauberk.data.sources.figstep import FIGSTEP
from hauberk.data.sources.jailbreak_llms import JAILBREAK_LLMS
from hauberk.data.sources.jailbreakv import JAILBREAKV
from hauberk.data.sources.judged import LLAVA_BENCH_COCO, LLAVA_BENCH_WILD, MM_VET
from hauberk.data.sources.loading import Loaded, Manifest, load_source
from hauberk.data.sources.mm_safetybench import MM_SAFETYBENCH
from hauberk.data.sources.mossbench import MOSSBENCH
from hauberk.data.sources.own import OWN
from hauberk.data.sources.scienceqa import SCIENCEQA
from hauberk.data.sources.source import Option, Source
from hauberk.data.sources.spa_vl import SPA_VL
from hauberk.data.sources.vlguard import VLGUARD
from hauberk.data.sources.vlsafe import VLSAFE
from hauberk.data.sources.vqa import TEXTVQA, VQAV2
from hauberk.data.sources.xstest import XSTEST
from hauberk.data.sources.yes_no import MME, POPE
from hauberk.errors import BadParams

__all__ = ["SOURCES", "Loaded", "Manifest", "Option", "Source", "load"]

SOURCES: dict[str, Source] = {
    "vlsafe": VLSAFE,
    "jailbreak_llms": JAILBREAK_LLMS,
    "mm_safetybench": MM_SAFETYBENCH,
    "figstep": FIGSTEP,
    "spa_vl": SPA_VL,
    "jailbreakv": JAILBREAKV,
    "vlguard": VLGUARD,
    "xstest": XSTEST,
    "mossbench": MOSSBENCH,
    "vqav2": VQAV2,
    "mme": MME,
    "mm_vet": MM_VET,
    "llava_bench_wild": LLAVA_BENCH_WILD,
    "llava_bench_coco": LLAVA_BENCH_COCO,
    "scienceqa": SCIENCEQA,
    "textvqa": TEXTVQA,
    "pope": POPE,
    "own": OWN,
}


def load(
    name: str,
    where: str | Path | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    allow_partial: bool = False,
    shares: Mapping[Split, float] | None = None,
    seed: int = 0,
    **options: Any,
) -> Loaded:
    """Load a data set as samples in the normal form.

    All of it is looked through before anything is handed out: columns, ids, paths, and whether the
    pictures are there.  Pictures are decoded when their sample is reached.

    Parameters
    ----------
    name : one of :data:`SOURCES`
    where : folder that it was downloaded to, cloned to, or saved to by `datasets`; or its id on
        the hub, which is where it comes from if None
    split : one of its own splits; the one that is evaluated on if None
    revision : commit on the hub; of a folder, what its revision shall be called
    allow_partial : whether to go on where rows or pictures are missing, which the manifest records
    shares : part of the pairs that ``anchor``, ``train``, ``calibration`` and ``test`` receive; if
        None all samples are for ``train`` where the data set's split is called so, and else for
        ``test``
    seed : of all that is drawn: the shares, and pictures that are paired with texts
    options : what else the data set lets choose; see ``SOURCES[name].options``

    Raises
    ------
    BadParams
        If there is no such data set, split or option.
    BadData
        If a file is missing or malformed, naming file, row and cure.
    """
    if name not in SOURCES:
        raise BadParams(f"no data set {name!r} is known; there are {', '.join(SOURCES)}.")
    source = SOURCES[name]
    if where is None and not source.hub:
        raise BadParams(f"{name} is not on the hub; say which folder it lies in.")
    return load_source(
        name,
        source,
        where if where is not None else source.hub,
        split=split,
        options=options,
        revision=revision,
        allow_partial=allow_partial,
        shares=shares,
        seed=seed,
    )
