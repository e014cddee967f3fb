"""Which part of a set of one's own a sample belongs to, for ever the same."""

import hashlib
import math
from collections.abc import Mapping
from typing import get_args

from hauberk.data.samples import Split
from hauberk.errors import BadParams


def check_shares(shares: Mapping[Split, float]) -> None:
    """Check that shares name splits and make a whole.

    Raises
    ------
    BadParams
        If they do not.
    """
    unknown = sorted(set(shares) - set(get_args(Split)))
    if unknown:
        raise BadParams(f"shares name {unknown}; a split is {', '.join(get_args(Split))}.")
    whole = math.fsum(shares.values())
    if not all(share > 0 for share in shares.values()) or not math.isclose(whole, 1.0):
        raise BadParams(f"shares are {dict(shares)}; each must be above 0, and their sum 1.")


def share_of(pair_id: str, shares: Mapping[Split, float], seed: int = 0) -> Split:
    """Tell the split of a pair: twins fall into the same one, whatever else is in the set.

    Parameters
    ----------
    pair_id : what a sample shares with its twins
    shares : part of all pairs that a split receives, in the order in which they are dealt out
    seed : another one deals anew

    Notes
    -----
    The first 8 bytes of sha256(seed/pair_id) are a number in [0, 1), uniform over pairs; so a
    share is met on average, not exactly, and a pair keeps its split when others are added.
    """
    digest = hashlib.sha256(f"{seed}/{pair_id}".encode()).digest()
    drawn = int.from_bytes(digest[:8], "big") / 2**64
    below = 0.0
    for split, share in shares.items():
        below += share
        if drawn < below:
            return split
    return split  # rounding: the shares' sum may lie a little below 1
