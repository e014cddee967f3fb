"""Finding and masking unsafe patches, on tiny random encoders."""

import io
from dataclasses import replace

import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import normalize

from hauberk.concepts import UNSAFE, ConceptBank, build_bank, said
from hauberk.defenses.patch_transport import (
    LITERAL,
    PatchTransport,
    TransportSetting,
    boxes_of,
    calibrated_tau,
    patch_scores,
    patch_weights,
    sinkhorn,
)
from hauberk.errors import BadBundle, BadRequest, TamperedBundle, WrongModel
from hauberk.requests import Request

NOWHERE, EVERYWHERE = float("-inf"), float("inf")


def clip_of(seed=0):
    """A CLIP with random weights, 24 pixels a side."""
    from hauberk.lab import clip as lab

    size = {"side": 24, "vision_width": 16, "text_width": 16, "projection": 8, "vision_layers": 2}
    recipe = lab.Recipe(**size, text_layers=1, heads=2, seed=seed)
    tokenizer = lab.tokenizer_of()
    return lab.network_of(tokenizer, recipe), lab.processor_of(tokenizer, recipe.side)


@pytest.fixture(scope="module")
def encoder():
    return clip_of()


@pytest.fixture(scope="module")
def bank(encoder):
    return build_bank(*encoder, said(["bomb", "gun"]), said(["lamp", "ball", "nothing"]))


def noise(size, seed=0, mode="RGB"):
    torch.manual_seed(seed)
    width, height = size
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def problems(seed=0):
    torch.manual_seed(seed)
    cost = 1 - torch.randn(6, 9, 5, dtype=torch.float64).clamp(-2, 2) * 0.05 - 0.2
    a, b = torch.rand(6, 9, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    return cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


@pytest.mark.parametrize("epsilon", [0.1, 0.02, 0.01])
def test_plans_meet_their_marginals_and_are_those_of_pot(epsilon):
    cost, a, b = problems()
    plan = sinkhorn(cost, a, b, epsilon=epsilon, iterations=2000)
    torch.testing.assert_close(plan.sum(2), a, atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.sum(1), b, atol=1e-5, rtol=0)
    oracle = ot.batch.solve_batch(
        cost, epsilon, a=a, b=b, max_iter=20_000, tol=1e-12, method="log_sinkhorn", grad="detach"
    )
    torch.testing.assert_close(plan, oracle.plan, atol=1e-6, rtol=0)


def test_float32_and_the_default_iterations_meet_the_marginals():
    cost, a, b = (part.float() for part in problems())
    plan = sinkhorn(cost, a, b, epsilon=0.02, iterations=TransportSetting().iterations)
    torch.testing.assert_close(plan.sum(2), a, atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.sum(1), b, atol=1e-5, rtol=0)


def test_the_raw_score_is_the_weight_of_a_patch_times_its_mean_cost(bank):
    """Why the literal threshold means something at one number of patches and categories alone."""
    torch.manual_seed(0)
    patches = normalize(torch.randn(3, 9, 8), dim=-1)
    raw = patch_scores(patches, bank, LITERAL)
    per_mass = patch_scores(patches, bank, replace(LITERAL, score="per_mass"))
    cosines = patches @ normalize(bank.alone().features.mean(1), dim=-1).T
    weights = patch_weights(cosines, bank.scale, "as_printed")
    torch.testing.assert_close(raw, per_mass * weights * bank.unsafe, atol=1e-5, rtol=1e-4)


def test_a_relaxed_score_means_the_same_in_every_picture_and_a_balanced_one_does_not(bank):
    torch.manual_seed(0)
    patches = normalize(torch.randn(1, 9, 8), dim=-1)
    balanced = TransportSetting(problem="joint", score="per_mass")
    for setting, same in ((TransportSetting(epsilon=0.05), True), (balanced, False)):
        among_nine = patch_scores(patches, bank, setting)[:, :4]
        among_four = patch_scores(patches[:, :4], bank, setting)
        assert torch.allclose(among_nine, among_four, atol=1e-5) is same


def test_relaxed_transport_is_cheapest_for_its_entropy(bank):
    torch.manual_seed(0)
    epsilon, patch = 0.05, normalize(torch.randn(1, 1, 8), dim=-1)
    cost = 1 - (patch @ normalize(bank.features.mean(1), dim=-1).T)[0, 0]

    def objective(plan):
        return (plan * cost).sum(-1) + epsilon * (plan * plan.log()).sum(-1)

    plan = (-cost / epsilon).softmax(-1)
    others = (plan.log() + 0.1 * torch.randn(200, len(cost))).softmax(-1)
    assert (objective(others) >= objective(plan)).all()
    share = patch_scores(patch, bank, TransportSetting(epsilon=epsilon))
    torch.testing.assert_close(share[0, 0], plan[bank.unsafe :].sum())


def test_weights_follow_the_equation_or_the_sentence_below_it():
    sure, unsure = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.3, 0.3, 0.3])
    cosines = torch.stack([sure, unsure]).unsqueeze(0)
    for kind, heavier in (("as_printed", 1), ("low_entropy", 0)):
        weights = patch_weights(cosines, 10.0, kind)[0]
        assert weights.argmax() == heavier
        assert weights.sum().item() == pytest.approx(1)
    assert patch_weights(cosines, 10.0, "uniform").tolist() == [[0.5, 0.5]]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 8))
def test_boxes_cover_every_pixel_once(width, height, grid):
    counted = torch.zeros(height, width)
    for left, top, right, bottom in boxes_of((width, height), grid):
        assert left < right
        assert top < bottom
        counted[top:bottom, left:right] += 1
    assert counted.min() >= 1
    if min(width, height) >= grid:
        assert counted.max() == 1


def test_a_threshold_of_minus_infinity_masks_nothing_and_infinity_all(encoder, bank):
    image = noise((50, 31))
    still = PatchTransport(*encoder, bank, TransportSetting(tau=NOWHERE))
    assert still.rewrite(Request("x", (image,))).images[0] is image
    (black,) = PatchTransport(*encoder, bank, TransportSetting(tau=EVERYWHERE)).masked([image])
    assert black.size == image.size
    assert black.getextrema() == ((0, 0),) * 3
    assert image.getextrema() != ((0, 0),) * 3
    plain = Request("x")
    assert still.rewrite(plain) is plain


@pytest.mark.parametrize(
    "setting", [TransportSetting(), TransportSetting(problem="joint", score="per_mass"), LITERAL]
)
def test_a_batch_is_scored_as_each_picture_alone(encoder, bank, setting):
    detector = PatchTransport(*encoder, bank, setting)
    images = [noise((40 + 7 * i, 90 - 5 * i), seed=i) for i in range(5)]
    together = detector.scores(images, batch_size=3)
    alone = torch.cat([detector.scores([image]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.shape == (5, setting.grid**2)
    assert together.std() > 0


def test_the_lowest_scores_are_masked_up_to_the_cap_and_where_they_are(encoder, bank):
    image = noise((50, 40))
    detector = PatchTransport(*encoder, bank, TransportSetting(tau=EVERYWHERE, max_share=0.25))
    scores = detector.scores([image])[0]
    lowest = scores.argsort()[:2].tolist()  # a quarter of 9
    (covered,) = detector.masked([image])
    for index, box in enumerate(boxes_of(image.size, 3)):
        black = covered.crop(box).getextrema() == ((0, 0),) * 3
        assert black == (index in lowest)
        assert black or covered.crop(box).tobytes() == image.crop(box).tobytes()


def test_the_mean_colour_is_what_the_encoder_takes_for_zero(encoder, bank):
    setting = TransportSetting(tau=EVERYWHERE, fill="mean")
    (covered,) = PatchTransport(*encoder, bank, setting).masked([noise((30, 30))])
    pixels = encoder[1](images=[covered], return_tensors="pt")["pixel_values"]
    assert pixels.abs().max() < 0.01


@given(st.integers(0, 5), st.floats(0.01, 0.5))
def test_the_calibrated_threshold_masks_at_most_its_share(seed, share):
    torch.manual_seed(seed)
    benign = torch.rand(40, 9).mul(20).round() / 20  # with many equal scores
    tau = calibrated_tau(benign, share)
    assert (benign.double() <= tau).double().mean() <= share
    following = benign[benign.double() > tau].min()
    assert (benign <= following).double().mean() > share


def test_as_many_patches_are_masked_as_the_threshold_was_calibrated_for(encoder, bank):
    images = [noise((30, 30), seed=seed) for seed in range(12)]
    scores = PatchTransport(*encoder, bank, TransportSetting()).scores(images)
    setting = TransportSetting(tau=calibrated_tau(scores, 0.05))
    masked = PatchTransport(*encoder, bank, setting).masked(images)
    black = [
        image.crop(box).getextrema() == ((0, 0),) * 3
        for image in masked
        for box in boxes_of(image.size, 3)
    ]
    assert sum(black) == int(0.05 * scores.numel()) == 5


def test_too_few_harmless_patches_are_refused():
    with pytest.raises(ValueError, match=r"9 scores.*100 or more"):
        calibrated_tau(torch.rand(9), 0.01)


def odd_pictures():
    """Pictures as users send them."""
    gif, camera = io.BytesIO(), io.BytesIO()
    noise((20, 30)).save(gif, "GIF", save_all=True, append_images=[noise((20, 30), seed=1)])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    noise((60, 40)).save(camera, "JPEG", exif=exif)
    return {
        "1x1": noise((1, 1)),
        "5000x20": noise((5000, 20)),
        "greyscale": noise((30, 30), mode="L"),
        "CMYK": noise((30, 30), mode="CMYK"),
        "palette": noise((30, 30), mode="P"),
        "alpha": noise((30, 30), mode="RGBA"),
        "bilevel": noise((30, 30), mode="1"),
        "animated": Image.open(gif),
        "turned": Image.open(camera),
        "16 bit": Image.new("I;16", (30, 30), 40_000),
    }


@pytest.mark.parametrize("kind", [*odd_pictures()])
def test_pictures_of_every_kind_are_scored_and_masked(encoder, bank, kind):
    image = odd_pictures()[kind]
    setting = TransportSetting(tau=EVERYWHERE)
    (covered,) = PatchTransport(*encoder, bank, setting).masked([image])
    assert covered.size == image.size
    assert covered.convert("RGB").getextrema() == ((0, 0),) * 3


def test_a_picture_that_cannot_be_read_is_refused(encoder, bank):
    whole = io.BytesIO()
    noise((200, 200)).save(whole, "JPEG")
    half = Image.open(io.BytesIO(whole.getvalue()[: whole.tell() // 2]))
    detector = PatchTransport(*encoder, bank, TransportSetting(tau=0.5))
    with pytest.raises(BadRequest, match="200 x 200 cannot be read"):
        detector.masked([half])
    with pytest.raises(BadRequest, match="mode 'F'"):
        detector.masked([noise((20, 20)).convert("L").convert("F")])


@pytest.mark.parametrize(
    "wrong",
    [
        {"grid": 0}, {"weights": "even"}, {"problem": "free"}, {"score": "raw"}, {"epsilon": 0.0},
        {"max_share": 0.0}, {"fill": "red"}, {"iterations": 0},
        {"weights": "low_entropy", "problem": "joint", "score": "raw"},
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_and_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransportSetting(**wrong)


def test_a_relaxed_problem_needs_something_to_compete_with(encoder, bank):
    with pytest.raises(ValueError, match="needs harmless categories"):
        PatchTransport(*encoder, bank.alone(), TransportSetting())
    PatchTransport(*encoder, bank.alone(), LITERAL)


def test_a_bank_comes_back_for_its_encoder_alone(encoder, bank, tmp_path):
    from hauberk.bundle import binding_of

    folder = bank.save(tmp_path / "bank", binding_of(*encoder), data=[])
    found = ConceptBank.load(folder, *encoder)
    assert (found.categories, found.texts, found.unsafe) == (bank.categories, bank.texts, 2)
    assert torch.equal(found.features, bank.features)
    with pytest.raises(WrongModel, match="weights"):
        ConceptBank.load(folder, *clip_of(seed=1))
    (folder / "texts.json").write_text("{}")
    with pytest.raises(TamperedBundle):
        ConceptBank.load(folder, *encoder)


def test_a_bundle_of_something_else_is_no_bank(encoder, tmp_path):
    from hauberk.bundle import Card, binding_of, write_bundle

    card = Card("cmrm", binding_of(*encoder), {}, data=[])
    write_bundle(tmp_path / "other", card, lambda home: None)
    with pytest.raises(BadBundle, match="'cmrm'"):
        ConceptBank.load(tmp_path / "other", *encoder)


def test_features_are_of_unit_length_and_in_the_order_of_the_texts(encoder, bank):
    assert bank.features.shape == (5, 5, 8)
    torch.testing.assert_close(bank.features.norm(dim=-1), torch.ones(5, 5))
    (one,) = build_bank(*encoder, {"gun": bank.texts[1]}).features
    torch.testing.assert_close(one, bank.features[1], atol=1e-5, rtol=1e-5)


def test_contradictory_categories_are_refused(encoder, bank):
    with pytest.raises(ValueError, match="'gun'"):
        build_bank(*encoder, said(["gun"]), said(["gun"]))
    with pytest.raises(ValueError, match="as many variants"):
        replace(bank, texts=(*bank.texts[:-1], ("alone",)))
    with pytest.raises(ValueError, match="shape"):
        replace(bank, features=bank.features[:3])
    with pytest.raises(ValueError, match="unsafe"):
        replace(bank, unsafe=9)


def test_a_siglip_serves_as_well(encoder):
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    words = len(encoder[1].tokenizer)
    text = {**width, "vocab_size": words, "max_position_embeddings": 48, "projection_size": 16}
    vision = {**width, "image_size": 24, "patch_size": 12}
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    siglip_bank = build_bank(siglip, encoder[1], said(UNSAFE), said(["nothing"]))
    assert siglip_bank.features.shape == (20 + 1, 5, 16)
    scores = PatchTransport(siglip, encoder[1], siglip_bank, TransportSetting()).scores(
        [noise((40, 40))]
    )
    assert scores.shape == (1, 9)
    assert ((scores >= 0) & (scores <= 1)).all()
