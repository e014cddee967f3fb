"""Twins stay together, and a pair keeps its split whatever else is dealt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hauberk.data.shares import check_shares, share_of
from hauberk.errors import BadParams

SHARES = {"anchor": 0.2, "calibration": 0.1, "test": 0.7}


def test_shares_are_met_on_average_and_every_split_is_dealt():
    dealt = [share_of(f"pair {index}", SHARES) for index in range(5000)]
    for split, share in SHARES.items():
        assert dealt.count(split) / 5000 == pytest.approx(share, abs=0.02)  # 3 deviations


@given(pair=st.text(), seed=st.integers(0, 99))
def test_a_pair_has_one_split_for_ever_and_one_alone_takes_all(pair, seed):
    assert share_of(pair, SHARES, seed) == share_of(pair, dict(SHARES), seed)
    assert share_of(pair, {"train": 1.0}, seed) == "train"


def test_another_seed_deals_anew():
    first, second = (
        [share_of(f"pair {index}", SHARES, seed) for index in range(200)] for seed in (0, 1)
    )
    assert first != second


def test_a_larger_share_keeps_what_a_smaller_one_had():
    small, large = {"anchor": 0.2, "test": 0.8}, {"anchor": 0.4, "test": 0.6}
    for index in range(300):
        if share_of(str(index), small) == "anchor":
            assert share_of(str(index), large) == "anchor"


@pytest.mark.parametrize("shares", [{}, {"test": 0.9}, {"test": 1.0, "anchor": 0.0}, {"dev": 1.0}])
def test_shares_that_make_no_whole_are_refused(shares):
    with pytest.raises(BadParams, match="shares"):
        check_shares(shares)
