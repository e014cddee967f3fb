"""Transport of patches to concepts: plans are plans, and masks land where the patches were."""

import io
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ot.batch import solve_batch
from PIL import ExifTags, Image
from torch.nn.functional import normalize

from hauberk.concepts import build_bank
from hauberk.defenses.patch_transport import (
    AS_PRINTED,
    PatchTransport,
    TransportSetting,
    calibrate_threshold,
    entropy_weights,
    mask_image,
    patch_boxes,
    patch_grid,
    patch_scores,
    sinkhorn,
)
from hauberk.errors import BadRequest
from hauberk.requests import Request, mean_color

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
GRIDS = (2, 3, 4, 6, 8)
BALANCED = {"column_penalty": math.inf}
SETTINGS = [
    TransportSetting(),
    TransportSetting(grid=3, scales=(1, 2), problem="per_category"),
    TransportSetting(grid=3, scales=(), score="per_mass_mean", weights="as_printed", **BALANCED),
    TransportSetting(scales=(), score="per_mass_min", weights="low_entropy", column_penalty=0.05),
    TransportSetting(problem="per_category", score="per_mass_min", precision="float64"),
    AS_PRINTED,
]


@pytest.fixture(scope="module")
def bank(tiny_clip):
    return build_bank(
        tiny_clip.model, tiny_clip.processor,
        categories=("a bomb", "a knife", "a gun", "the words bomb"),
        reference=("a ball", "a cup", "nothing"),
        templates=("a picture of {} .", "{}", "there is {}"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def detect(tiny_clip, bank):
    return lambda setting: PatchTransport(tiny_clip.model, tiny_clip.processor, bank, setting)


def noise(*size, seed=0):
    pixels = np.random.default_rng(seed).integers(1, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [noise(24, 24), noise(50, 31, seed=1), noise(7, 90, seed=2), noise(61, 60, seed=3)]


def problems(seed, count=6, n=9, m=12, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return normalize(torch.randn(*shape, 16, generator=rng, dtype=dtype), dim=-1)

    cost = 1 - unit(count, n) @ unit(count, m).transpose(1, 2)
    rows = torch.rand(count, n, generator=rng, dtype=dtype).softmax(1)
    columns = torch.rand(count, m, generator=rng, dtype=dtype).softmax(1)
    return cost, rows, columns


# --- plans ------------------------------------------------------------------------------------


@given(st.integers(0, 2**20))
def test_plans_meet_their_marginals(seed):
    for dtype in (torch.float32, torch.float64):
        cost, rows, columns = problems(seed, dtype=dtype)
        plan = sinkhorn(cost, rows, columns, epsilon=0.1, iterations=500)
        assert (plan >= 0).all()
        torch.testing.assert_close(plan.sum(2), rows, atol=1e-5, rtol=0)
        torch.testing.assert_close(plan.sum(1), columns, atol=1e-5, rtol=0)


@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_plans_equal_those_of_pot(epsilon):
    cost, rows, columns = problems(1)
    found = sinkhorn(cost, rows, columns, epsilon=epsilon, iterations=3000)
    oracle = solve_batch(cost, epsilon, rows, columns, max_iter=5000, tol=1e-12,
                         method="log_sinkhorn", grad="detach").plan  # fmt: skip
    torch.testing.assert_close(found, oracle, atol=1e-6, rtol=0)
    assert oracle.max() > 1e-2


def test_a_problem_is_solved_in_a_batch_as_alone():
    cost, rows, columns = problems(2)
    together = sinkhorn(cost, rows, columns, epsilon=0.05)
    for index in range(len(cost)):
        alone = sinkhorn(*(x[index : index + 1] for x in (cost, rows, columns)), epsilon=0.05)
        torch.testing.assert_close(together[index], alone[0], atol=1e-12, rtol=0)


def test_a_row_without_weight_carries_nothing_and_changes_nothing():
    cost, rows, columns = problems(3)
    padded = torch.cat([cost, cost[:, :1]], dim=1), torch.cat([rows, 0 * rows[:, :1]], dim=1)
    plan = sinkhorn(*padded, columns, epsilon=0.05)
    torch.testing.assert_close(plan[:, :-1], sinkhorn(cost, rows, columns, epsilon=0.05))
    assert plan[:, -1].abs().max() == 0


def test_without_a_column_penalty_a_plan_is_a_softmax_and_a_large_one_balances_it():
    cost, rows, columns = problems(4)
    free = sinkhorn(cost, rows, columns, epsilon=0.1, column_penalty=0.0)
    torch.testing.assert_close(free, rows.unsqueeze(2) * (-cost / 0.1).softmax(2))
    errors = []
    for penalty in (0.0, 0.1, 1.0, 100.0):
        plan = sinkhorn(cost, rows, columns, epsilon=0.1, column_penalty=penalty, iterations=2000)
        torch.testing.assert_close(plan.sum(2), rows)
        errors.append((plan.sum(1) - columns).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


# --- weights and scores -----------------------------------------------------------------------


def test_weights_have_the_sum_one_and_the_two_readings_opposite_orders(bank):
    features = normalize(torch.randn(5, 9, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = {
        mode: entropy_weights(features, bank.features, mode=mode, logit_scale=20.0)
        for mode in ("as_printed", "low_entropy", "uniform")
    }
    for weights in found.values():
        torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert torch.equal(found["as_printed"].argsort(1), found["low_entropy"].argsort(1).flip(1))
    assert found["uniform"].unique().numel() == 1
    sure = normalize(bank.features.mean(1)[:1], dim=-1)
    unsure = normalize(normalize(bank.features.mean(1), dim=-1).sum(0, keepdim=True), dim=-1)
    two = entropy_weights(torch.stack([sure, unsure], 1), bank.features, mode="as_printed",
                          logit_scale=100.0)  # fmt: skip
    assert two[0, 0] < two[0, 1]


def test_the_printed_score_is_the_cost_of_one_plan_for_every_category(bank):
    features = normalize(torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    found = patch_scores(features, bank, AS_PRINTED)
    rows = entropy_weights(features, bank.features, mode="as_printed",
                           logit_scale=bank.logit_scale).double()  # fmt: skip
    columns = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    expected = torch.zeros(3, 9, dtype=torch.float64)
    for category in bank.features.double():
        cost = 1 - features.double() @ category.T
        plan = solve_batch(cost, AS_PRINTED.epsilon, rows, columns, max_iter=5000, tol=1e-12,
                           method="log_sinkhorn", grad="detach").plan  # fmt: skip
        expected += (plan * cost).sum(-1)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("problem", ["per_category", "joint"])
@pytest.mark.parametrize("score", ["raw", "per_mass_mean", "per_mass_min", "log_odds"])
def test_both_solvers_give_the_same_scores(bank, problem, score):
    features = normalize(torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(2)), dim=-1)
    plain = {"problem": problem, "score": score, "epsilon": 0.1, "precision": "float64"} | BALANCED
    ours, theirs = (
        patch_scores(features, bank, TransportSetting(**plain, solver=solver, iterations=2000))
        for solver in ("bmm", "pot")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert ours.std() > 0


@pytest.mark.parametrize("problem", ["per_category", "joint"])
def test_a_patch_that_looks_like_an_unsafe_concept_has_the_lowest_score(bank, problem):
    unsafe, harmless = bank.features.mean(1)[:1], bank.reference_features.mean(1)[:3]
    features = normalize(torch.cat([harmless, unsafe]), dim=-1)[None]
    for weights in ("uniform", "as_printed", "low_entropy"):
        scores = patch_scores(features, bank, TransportSetting(problem=problem, weights=weights))
        assert scores.argmin() == 3


# --- pictures ---------------------------------------------------------------------------------


@given(SIZES, st.sampled_from(GRIDS))
def test_patches_cover_every_pixel_and_repeat_one_only_where_pixels_are_too_few(size, grid):
    covered = np.zeros(size[::-1], dtype=int)
    for left, top, right, bottom in patch_boxes(size, grid):
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    if min(size) >= grid:
        assert covered.max() == 1
    assert [crop.size for crop in patch_grid(noise(*size), grid)] == [
        (right - left, bottom - top) for left, top, right, bottom in patch_boxes(size, grid)
    ]


def test_the_last_row_and_column_take_the_remainder():
    boxes = patch_boxes((20, 11), 3)
    assert boxes[0] == (0, 0, 6, 3)
    assert boxes[-1] == (12, 6, 20, 11)
    assert boxes[2] == (12, 0, 20, 3)


@given(SIZES, st.sampled_from(GRIDS), st.integers(0, 2**20))
def test_masks_land_on_the_pixels_of_their_patches_and_on_no_other(size, grid, seed):
    image = noise(*size)
    masked = np.random.default_rng(seed).random(grid**2) < 0.4
    before, after = np.asarray(image), np.asarray(mask_image(image, masked.tolist()))
    hidden = np.zeros(size[::-1], dtype=bool)
    for (left, top, right, bottom), one in zip(patch_boxes(size, grid), masked, strict=True):
        hidden[top:bottom, left:right] |= one
    assert (after[hidden] == 0).all()
    assert (after[~hidden] == before[~hidden]).all()
    assert (np.asarray(image) == before).all()
    assert (mask_image(image, [False] * grid**2)) is image


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_pictures_together_score_as_one_by_one_and_in_any_order(detect, setting):
    together = detect(setting).scores(PICTURES)
    assert together.shape == (4, setting.grid**2)
    assert together.isfinite().all()
    assert together.std() > 0
    alone = torch.cat([detect(setting).scores([picture]) for picture in PICTURES])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
    back = detect(setting).scores(PICTURES[::-1])
    torch.testing.assert_close(together, back.flip(0), atol=2e-4, rtol=1e-4)
    detector = detect(setting)
    detector.batch_size = 5
    torch.testing.assert_close(together, detector.scores(PICTURES), atol=2e-4, rtol=1e-4)


def test_a_scale_adds_its_scores_where_it_overlaps_a_patch(detect):
    one, two, both = (
        detect(TransportSetting(grid=grid, scales=scales)).scores(PICTURES)
        for grid, scales in ((1, ()), (2, ()), (4, (1, 2)))
    )
    fine = detect(TransportSetting(grid=4, scales=())).scores(PICTURES)
    added = two.view(4, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    torch.testing.assert_close(both, fine + added + one, atol=1e-4, rtol=1e-4)
    mixed = detect(TransportSetting(grid=3, scales=(2,))).scores(PICTURES)
    own = detect(TransportSetting(grid=3, scales=())).scores(PICTURES)
    torch.testing.assert_close((mixed - own)[:, 4], two.mean(1), atol=1e-4, rtol=1e-4)


def test_what_stands_at_the_ends_of_a_wide_patch_is_seen(detect):
    wide = Image.new("RGB", (400, 20), "white")
    marked = wide.copy()
    marked.paste("black", (0, 0, 60, 20))  # a square cut from the middle would not hold it
    plain, other = detect(TransportSetting(grid=1, scales=())).scores([wide, marked])
    assert (plain - other).abs().item() > 1e-3


def test_at_minus_infinity_nothing_is_masked_and_at_infinity_everything(detect):
    request = Request("what is this ?", tuple(PICTURES))
    for setting in (TransportSetting(), AS_PRINTED):
        off = detect(setting).with_setting(threshold=-math.inf)
        assert off.rewrite(request) is request
        assert all(new is old for new, old in zip(off.masked(PICTURES).images, PICTURES,
                                                  strict=True))  # fmt: skip
        everything = detect(setting).with_setting(threshold=math.inf)
        black = everything.rewrite(request)
        assert black.text == request.text
        for new, old in zip(black.images, PICTURES, strict=True):
            assert new.size == old.size
            assert not np.asarray(new).any()
    assert off.rewrite(Request("no picture")).images == ()


def test_a_threshold_masks_the_patches_up_to_it_in_the_colour_of_the_setting(detect, tiny_clip):
    scores = detect(TransportSetting()).scores(PICTURES)
    threshold = scores.flatten().sort().values[5].item()
    detector = detect(TransportSetting(threshold=threshold, fill="mean"))
    found = detector.masked(PICTURES)
    assert torch.equal(found.patches, scores <= threshold)
    assert found.spared == 0
    color = mean_color(tiny_clip.processor)
    for picture, image, hidden in zip(PICTURES, found.images, found.patches, strict=True):
        assert (image is picture) == (not hidden.any())
        for box, one in zip(patch_boxes(picture.size, 2), hidden, strict=True):
            if one:
                assert image.crop(box).getcolors() == [
                    ((box[2] - box[0]) * (box[3] - box[1]), color)
                ]


def test_the_cap_masks_the_most_unsafe_patches_and_counts_the_others(detect):
    scores = detect(TransportSetting(grid=3)).scores(PICTURES)
    capped = detect(TransportSetting(grid=3, threshold=math.inf, max_share=0.34)).masked(PICTURES)
    assert capped.patches.sum(1).tolist() == [3] * 4
    assert capped.spared == 4 * 6
    for row, hidden in zip(scores, capped.patches, strict=True):
        assert row[hidden].max() <= row[~hidden].min()
    none = detect(TransportSetting(threshold=math.inf, max_share=0.0)).masked(PICTURES)
    assert none.patches.sum() == 0
    assert none.spared == 4 * 4


def test_the_gate_opens_where_a_patch_was_masked_or_always(detect):
    request = Request("what is this ?", (PICTURES[0],))
    for gate, threshold, opens in (("always_on", -math.inf, True), ("any_masked", math.inf, True),
                                   ("any_masked", -math.inf, False)):  # fmt: skip
        detector = detect(TransportSetting(gate=gate, threshold=threshold))
        assert detector.opens_gate(request, detector.rewrite(request)) == opens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_clip_in_half_precision_scores_nearly_the_same(tiny_clip, bank, detect, dtype):
    whole = detect(TransportSetting()).scores(PICTURES)
    tiny_clip.model.to(dtype)
    try:
        half = detect(TransportSetting()).scores(PICTURES)
    finally:
        tiny_clip.model.to(torch.float32)
    assert half.dtype == torch.float32
    assert (half - whole).abs().max() < 0.5 * whole.std()


def test_siglip_takes_the_same_way(tiny_siglip):
    bank = build_bank(tiny_siglip.model, tiny_siglip.processor, categories=("a bomb",),
                      reference=("a ball",), templates=("{}",))  # fmt: skip
    detector = PatchTransport(
        tiny_siglip.model, tiny_siglip.processor, bank, TransportSetting(threshold=math.inf)
    )
    assert detector.scores(PICTURES).isfinite().all()
    assert detector.masked(PICTURES).patches.all()


# --- odd pictures -----------------------------------------------------------------------------


def saved(image, form, **options):
    content = io.BytesIO()
    image.save(content, form, **options)
    return Image.open(io.BytesIO(content.getvalue()))


def animated():
    frames = [Image.new("P", (30, 20), index) for index in (1, 2)]
    for index, frame in enumerate(frames):
        frame.putpalette(bytes([0, 0, 0, 250, 0, 0, 0, 250, 0] + [index] * 3))
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def turned():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return saved(noise(40, 20), "JPEG", exif=exif)


ODD = {
    "one pixel": lambda: noise(1, 1),
    "a strip": lambda: noise(5000, 20),
    "a column": lambda: noise(3, 900),
    "greyscale": lambda: noise(30, 20).convert("L"),
    "16 bits": lambda: Image.fromarray(np.full((20, 30), 40000, dtype=np.uint16)),
    "bilevel": lambda: noise(30, 20).convert("1"),
    "CMYK": lambda: noise(30, 20).convert("CMYK"),
    "palette": lambda: noise(30, 20).convert("P"),
    "alpha": lambda: noise(30, 20).convert("RGBA"),
    "animated": animated,
    "turned": turned,
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures_are_scored_and_masked_in_their_own_size(detect, kind):
    for grid in (2, 6):
        detector, picture = detect(TransportSetting(grid=grid)), ODD[kind]()
        scores = detector.scores([picture])[0]
        assert scores.isfinite().all()
        masking = detector.with_setting(threshold=scores.sort().values[0].item())
        found = masking.masked([picture])
        (image,) = found.images
        assert image.mode == "RGB"
        assert image.size == picture.size
        box = patch_boxes(picture.size, grid)[int(scores.argmin())]
        assert found.patches[0, scores.argmin()]
        assert not np.asarray(image.crop(box)).any()
        nothing = detector.with_setting(threshold=-1e9).masked([picture])
        assert nothing.images[0] is picture


def test_the_frame_that_shows_counts_and_exif_turns_nothing(detect):
    moving, detector = animated(), detect(TransportSetting(threshold=-1e9))
    first = detector.scores([moving])
    moving.seek(1)
    assert not torch.allclose(first, detector.scores([moving]))
    plain, rotated = noise(40, 20), turned()
    same = saved(plain, "JPEG")
    torch.testing.assert_close(detector.scores([rotated]), detector.scores([same]))


def test_what_cannot_be_read_is_refused_by_its_place(detect):
    content = io.BytesIO()
    noise(60, 60).save(content, "JPEG")
    cut = Image.open(io.BytesIO(content.getvalue()[: len(content.getvalue()) // 2]))
    floats = Image.fromarray(np.zeros((4, 4), dtype=np.float32))
    detector = detect(TransportSetting(threshold=math.inf))
    for broken, message in (
        (cut, "picture 1: its file cannot be read"),
        (floats, "picture 1: a picture of mode 'F'"),
        (Image.new("RGB", (0, 5)), r"picture 1: \(0, 5\) pixels are none"),
    ):
        with pytest.raises(BadRequest, match=message):
            detector.rewrite(Request("what is this ?", (PICTURES[0], broken)))


# --- thresholds and settings ------------------------------------------------------------------


@given(
    st.lists(st.integers(-5, 5) | st.floats(-5, 5, width=32), min_size=1, max_size=300),
    st.floats(0.001, 0.5),
)
def test_a_calibrated_threshold_masks_at_most_the_share_and_the_next_score_would_not(values, share):
    scores = np.array(values, dtype=np.float32)
    tau = calibrate_threshold(scores, share)
    found = (torch.from_numpy(scores) <= tau).float().mean().item()
    assert found <= share + 1e-6
    above = scores[scores > tau]
    assert (scores <= above.min()).mean() > share - 1e-6


def test_wrong_calibrations_and_settings_are_refused(bank, tiny_clip):
    for scores, share in (([], 0.1), ([1.0, math.nan], 0.1), ([1.0], 0.0), ([1.0], 1.0)):
        with pytest.raises(ValueError, match=r"scores|share"):
            calibrate_threshold(scores, share)
    for changes, message in (
        ({"grid": 0}, "grid 0"), ({"scales": (2, 0)}, "scales"), ({"epsilon": 0.0}, "epsilon"),
        ({"column_penalty": -1.0}, "column_penalty"), ({"iterations": 0}, "iterations"),
        ({"max_share": 1.5}, "max_share 1.5"), ({"threshold": math.nan}, "threshold"),
        ({"solver": "pot"}, "solver 'pot' solves balanced problems"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TransportSetting(**changes)
    alone = build_bank(tiny_clip.model, tiny_clip.processor, categories=("a bomb",),
                       templates=("{}",))  # fmt: skip
    with pytest.raises(ValueError, match="reference"):
        PatchTransport(tiny_clip.model, tiny_clip.processor, alone, TransportSetting())
    with pytest.raises(ValueError, match="reference"):
        patch_scores(torch.zeros(1, 4, 16), alone, TransportSetting())
    with pytest.raises(ValueError, match="5 patches"):
        mask_image(PICTURES[0], [True] * 5)


def test_a_setting_is_plain_data():
    for setting in SETTINGS:
        assert TransportSetting(**asdict(setting)) == setting
        told = asdict(setting) | {"scales": list(setting.scales)}
        assert TransportSetting(**told) == setting
