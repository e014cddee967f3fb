"""params.yaml as frozen dataclasses, checked at the door."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hauberk import UNDEFENDED
from hauberk.errors import BadParams, HauberkError
from tasks.suites import NOTHING_READ, Kind, Kinds, attacked_kinds, kinds_of, wanted

GUARDALIGN = "guardalign"
"""Stands where the name of a defense would, for the one that is fitted by its own stage."""

DAVSP = "davsp"
"""Stands there as well, for the one that is trained by its own stage."""

TGA = "tga"
"""Stands there as well, for the one that is trained into a model's weights by its own stage."""

TAKEN = {
    "data": "the suites",
    "frames": "the frames of all models",
    "guards": "what guards served models",
}
"""Names of folders beside those of the models, with what each holds."""

STRICT = ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Alpha = Annotated[float, Field(ge=0, le=10)]
"""The paper sweeps 0 to 1; ten times the shift is beyond any use."""
PARTS = (
    "transport_only", "prefix_only", "prefix_calibrated", "guardalign_literal", "all_masked",
)  # fmt: skip
"""What GuardAlign's evaluation shows beside it; see tasks.ablate_guardalign."""
PROMPT_PARTS = ("davsp_border_only", "davsp_prefix_only", "guardalign+davsp", "davsp+cmrm")
"""The same of DAVSP: its parts, and what it does together with others; see
tasks.ablate_safety_prompt."""
TRANSFERRED = f"{DAVSP}@"
"""Begins the name of a frame that was trained on another model: davsp@MODEL."""
TRAINED_BESIDE = f"{TGA}_"
"""Begins the name of a training beside TGA's that explains it: those of ``tga.variants``."""


def is_part(defense: str) -> bool:
    """Whether a defense is measured on some suites alone, to explain another."""
    beside = TRANSFERRED, TRAINED_BESIDE
    return defense in (*PARTS, *PROMPT_PARTS) or defense.startswith(beside)


GUARD_MODELS, LABELS = PurePosixPath("judges/guards"), PurePosixPath("judges/labels")
"""Where guard models and sheets of labels lie, so that a stage follows what its judges read."""


METRICS = {
    "refuse": (
        "unsafe_rate", "unsafe_rate_lower", "unsafe_rate_keyword", "unsafe_rate_keyword_lower",
        "refusal_rate", "refusal_rate_upper", "evasion_rate", "evasion_rate_upper",
    ),
    "hedge": (
        "unsafe_rate", "unsafe_rate_lower", "unsafe_rate_keyword", "unsafe_rate_keyword_lower",
        "refusal_rate", "refusal_rate_upper",
    ),
    "answer": (
        "accuracy", "accuracy_upper", "over_refusal", "over_refusal_upper", "over_refusal_keyword",
        "over_refusal_keyword_upper",
    ),
    "either": (
        "degenerate_rate", "degenerate_rate_upper", "degenerate_empty", "degenerate_looping",
        "degenerate_other", "judge_failure_rate", "judge_disagreement", "judge_disagreement_upper",
        "seconds_per_answer",
    ),
    "all": ("differing_alone",),
}  # fmt: skip
"""What a suite of requests to refuse, hedge or answer is measured by.  Written here once more, so
that reading parameters needs no torch; a test compares it with hauberk.evaluation.metrics."""
_PLAIN = ("seconds_per_answer", *METRICS["all"])
"""Numbers without an interval, and without a difference paired by sample."""


@dataclass(frozen=True)
class Sizes:
    """Rows a suite, by split."""

    samples: Positive
    """Of the test split."""
    calibration: Positive
    anchor: Positive
    gated: Positive | None = None
    """Of the test split, where a rule of the gate names the suite; None for ``samples`` as well."""


@dataclass(frozen=True)
class AttackBudget:
    """Pictures that are attacked, by split, and the steps on each."""

    samples: Positive
    steps: Positive
    calibration: Annotated[int, Field(ge=0)] = 0
    """0 where no choice is made on attacked pictures."""


@dataclass(frozen=True)
class FrameBudget:
    """What a safety prompt is trained with."""

    samples: Positive
    """Of the train split, in each suite that it is trained on."""
    steps: Positive
    batch: Positive = 8
    """Requests of a kind in a step."""
    validated: Positive = 40
    """Of the calibration split, in each suite that frames are validated on, if it has so many."""
    attacked: Positive = 24
    """Pictures of the test split on which it is attacked, at every radius."""
    joint_steps: Annotated[int, Field(ge=0)] = 0
    """Of a frame that is trained on all models but one, for each of them; 0 for no such frames."""


@dataclass(frozen=True)
class ProjectorBudget:
    """What a projector is trained with."""

    samples: Positive
    """Of the train split, in each suite that it is trained on."""
    steps: Positive
    validated: Positive = 24
    """Of the calibration split, in each suite that weights are validated on, if it has so many."""
    variants: list[str] = field(default_factory=list)
    """Of ``tga.variants``: those that are trained as well."""


@dataclass(frozen=True)
class GridSweep:
    """How many patches pictures are cut into for comparison, and how many pictures are."""

    sides: Annotated[list[Annotated[int, Field(ge=2, le=16)]], Field(min_length=1)]
    """Patches along a side, beside what the transport of a bank says."""
    pictures: Annotated[int, Field(ge=6)]
    """Of every harmful suite; of benign ones four times as many, for the thresholds."""


@dataclass(frozen=True)
class Profile:
    """A budget."""

    data: Sizes
    attack: AttackBudget
    alphas: Annotated[list[Alpha], Field(min_length=1)]
    detection: Positive = 150
    """Pictures a suite on which patch detection is measured."""
    grids: GridSweep = GridSweep([2, 3], pictures=10)
    """A sweep over the number of patches, on the calibration pool."""
    parts: Positive = 40
    """Samples a suite, if it has so many, on which each part of a defense is measured alone."""
    frame: FrameBudget = field(default_factory=lambda: FrameBudget(100, 150))
    """What a safety prompt is trained with."""
    projector: ProjectorBudget = field(default_factory=lambda: ProjectorBudget(100, 150))
    """What a projector is trained with."""
    explained: list[str] | None = None
    """Models whose defenses are taken apart and attacked, and beside which TGA's variants are
    trained; null for all."""
    layers: Annotated[int, Field(ge=2)] = 24
    """Requests of a kind, if there are so many, by which safety layers are located."""


@dataclass(frozen=True)
class ModelSpec:
    """A model to defend, in the folder CHECKPOINTS/NAME; see :func:`hauberk.loading.load_model`."""

    path: str | None = None
    """That folder, or left out: the stages follow the files of a model there only."""
    revision: str | None = None
    """What the record calls these weights; of a folder of your own whatever tells them apart."""
    dtype: Literal["float32", "float16", "bfloat16", "auto"] = "auto"
    hub: str | None = None
    """ORG/NAME on the hub, for the command that fetches it; nothing is fetched by a run."""
    device_map: str | dict[str, int | str] | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    attn_implementation: str | None = None

    @property
    def loading(self) -> dict[str, Any]:
        """What :func:`hauberk.loading.load_model` takes of it."""
        names = "revision", "dtype", "device_map", "quantization", "attn_implementation"
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ServedParams:
    """A model that others serve, as a model under test; see :mod:`tasks.evaluate_served`."""

    endpoint: dict[str, Any]
    """The fields of :class:`hauberk.endpoint.EndpointSetting`, but for ``cache``: where answers are
    kept follows from the revision.  A key stands in the environment alone, in the variable that
    ``api_key_env`` names."""
    defenses: list[str] = field(default_factory=list)
    """What it is asked with beside nothing: METHOD@MODEL, the bundle that this run fits on one of
    ``models``, where it works on requests alone."""
    revision: str | None = None
    """What the record calls what is served there; under another name everything is asked anew."""
    unanswered: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of its requests that may stay without an answer; with more the stage fails, and another
    run asks for these alone."""


@dataclass(frozen=True)
class DatasetParams:
    """A data set of your own choice; see :func:`hauberk.data.sources.load`."""

    source: str
    """One of `hauberk.data.sources.SOURCES`; "own" for a table of your own."""
    suites: Annotated[list[str], Field(min_length=1)]
    """Those that are used, as its source calls them; all others of it are left out."""
    where: str | None
    """A folder below data/; null for the hub."""
    split: str | None = None
    """One of its own; null for the one that is evaluated on."""
    revision: str | None = None
    """A commit on the hub, without which nobody could tell what was drawn; of a folder its name."""
    allow_partial: bool = False
    shares: dict[Literal["anchor", "train", "calibration", "test"], float] | None = None
    """Parts of its pairs by split of a run; null for all of them in ``train``, where its own split
    is called so, and else in ``test``."""
    options: dict[str, Any] = field(default_factory=dict)
    limit: Positive | None = None
    """Samples a suite and split, beside what the profile says."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of a run that it has samples for; its source must be a known one."""
        from hauberk.data.sources import SOURCES

        its_own = self.split or SOURCES[self.source].splits[0]
        return tuple(self.shares or ("train" if its_own == "train" else "test",))


@dataclass(frozen=True)
class ContaminationParams:
    """What becomes of test samples of data sets on which something is fitted, too.

    See :mod:`hauberk.data.contamination`.  The lab is left out: its pictures are near each other.
    """

    refuse: bool = True
    """Whether they end the run; else they are counted in the card of the data."""
    near: Annotated[int, Field(ge=0, le=128)] = 6
    """Bits of 128; as hauberk.data.contamination.NEAR says, where it is explained."""


@dataclass(frozen=True)
class Variant:
    """One CMRM setting without its alpha; what is left out is the literal reading of the paper."""

    level: Literal["dataset", "sample"] = "dataset"
    compose: Literal["naive", "incremental", "single"] = "naive"
    estimator: Literal["mean", "rank1"] = "mean"
    position: Literal["last", "all"] = "last"
    steps: Literal["all", "prefill"] = "all"
    layers: Annotated[list[int], Field(min_length=1)] | None = None
    blank: Literal["white", "black", "mean", "uniform", "gaussian"] = "white"


@dataclass(frozen=True)
class ShiftParams:
    """A CMRM defense: what it is fitted and calibrated on, and what there is to choose from."""

    anchors: Annotated[list[str], Field(min_length=1)]
    calibrate_on: Annotated[list[str], Field(min_length=1)]
    alphas: Annotated[list[Alpha], Field(min_length=1)] | None
    variants: Annotated[list[Variant], Field(min_length=1)]


@dataclass(frozen=True)
class TransportParams:
    """How patches are scored and masked; what is left out is our default.

    See :class:`hauberk.defenses.patch_transport.TransportSetting`; the threshold is calibrated.
    """

    weights: Literal["as_printed", "low_entropy", "uniform"] = "uniform"
    problem: Literal["per_category", "joint"] = "joint"
    score: Literal["raw", "per_mass_mean", "per_mass_min", "log_odds"] = "log_odds"
    column_penalty: Annotated[float, Field(ge=0)] = 0.0
    epsilon: Annotated[float, Field(gt=0)] = 0.02
    iterations: Positive = 200
    grid: Annotated[int, Field(ge=2, le=16)] = 2
    scales: list[Annotated[int, Field(ge=1, le=16)]] = field(default_factory=lambda: [1])
    max_share: Annotated[float, Field(ge=0, le=1)] = 1.0


@dataclass(frozen=True)
class BankParams:
    """A CLIP in the folder CHECKPOINTS/NAME, what its concept bank holds, and how patches score."""

    concepts: Literal["lab", "real"]
    """A name in :mod:`hauberk.data.concepts`."""
    transport: TransportParams
    masked_share: Annotated[float, Field(gt=0, lt=1)]
    """Of the harmless patches that the threshold is set on, to be masked at most."""
    path: str | None = None
    """As of a model."""
    revision: str | None = None
    hub: str | None = None
    """As of a model."""
    benign_scenes: Positive | None = None
    """Pictures of harmless requests to set it on, of the lab's calibration pools, for concepts of
    the lab."""
    benign_pictures: str | None = None
    """A folder of harmless pictures to set it on, all of them, for concepts of the real world."""


@dataclass(frozen=True)
class GuardVariant:
    """One GuardAlign setting: its prefix, which requests get it, and what is painted over patches.

    See :class:`hauberk.defenses.prefix_attention.PrefixSetting`.
    """

    text: Annotated[str, Field(pattern=r"\S")]
    placement: Literal["user", "answer"] = "user"
    gamma: Annotated[float, Field(ge=0, le=10)] = 0.15
    layers: Annotated[list[int], Field(min_length=1)] | None = None
    mode: Literal["clamped", "unclamped", "literal"] = "clamped"
    gate: Literal["always_on", "any_masked"] = "always_on"
    """Whether every request gets it, as in the paper, or those of which a patch was masked."""
    fill: Literal["black", "mean"] = "black"
    """Black as in the paper, or the colour that the CLIP's processor maps to zero."""


@dataclass(frozen=True)
class GuardAlignParams:
    """GuardAlign: its concept bank, what there is to choose from, where its parts are measured."""

    models: list[str]
    """Those that it is fitted to."""
    clip: str
    """A name of ``concept_banks``."""
    calibrate_on: Annotated[list[str], Field(min_length=1)]
    variants: Annotated[list[GuardVariant], Field(min_length=1)]
    """One is chosen on the calibration split."""
    parts_on: Annotated[list[str], Field(min_length=1)]
    """Suites on which every part is measured alone."""


Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class HarmParams:
    """A harmfulness vector: what it is fitted on, and how states are scored with it.

    See :mod:`hauberk.analysis.harmfulness`.  What is null follows from requests that it was not
    fitted on; the authors' code has the score "raw", block 19 (counted from 0), 27 and -2.
    """

    harmful: Annotated[list[str], Field(min_length=1)]
    harmless: Annotated[list[str], Field(min_length=1)]
    """Suites of the anchor split."""
    score: Literal["span", "raw"] = "span"
    layer: Annotated[int, Field(ge=0)] | None = None
    high: float | None = None
    """What harmful requests are to score at least."""
    low: float | None = None
    """What harmless requests are to score at most."""
    high_quantile: Share = 0.5
    """Of the held-out scores of harmful requests, where ``high`` is null."""
    low_quantile: Share = 0.9
    """Of those of harmless requests with a picture, where ``low`` is null: most may stay where they
    are."""


@dataclass(frozen=True)
class FrameParams:
    """Where the frame of a model is; see :class:`hauberk.defenses.safety_prompt.Geometry`."""

    canvas: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """Height and width; null for what the processor feeds the first picture as."""
    margins: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=4, max_length=4)] | None
    ) = None
    """Above, right, below, left; null for as much as becomes one token on each side."""
    fit: Literal["shrink", "cover"] = "shrink"


@dataclass(frozen=True)
class FrameTraining:
    """How frames are trained; see :class:`hauberk.defenses.safety_prompt_training.FrameSetting`."""

    optimizer: Literal["adam", "sign"] = "adam"
    rate: Annotated[float, Field(gt=0, le=1)] = 0.03
    batches: Literal["both", "one"] = "both"
    harmful_answered: Share = 1.0
    answer_weight: Annotated[float, Field(ge=0)] = 1.0
    clean_weight: Annotated[float, Field(ge=0)] = 0.0
    validations: Positive = 4
    """Frames, evenly over the steps, of which the best is kept."""


@dataclass(frozen=True)
class SafetyPromptParams:
    """DAVSP: its vector, its frame, and what it is trained, validated and taken apart on."""

    models: list[str]
    """Those that a frame is trained for."""
    prefix: str
    """Stands before every question with a picture, as the authors' does; "" for none."""
    harm: HarmParams
    frames: dict[str, FrameParams]
    """By model; one that is not named has a frame of one token around what is fed."""
    harmful: Annotated[list[str], Field(min_length=1)]
    harmless: Annotated[list[str], Field(min_length=1)]
    """Suites of the train split; one that stands there twice counts twice."""
    validate_on: Annotated[list[str], Field(min_length=1)]
    """Suites of the calibration split, by which the best frame is chosen."""
    parts_on: Annotated[list[str], Field(min_length=1)]
    attacked_at: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=1)]
    """Radii of an attack on the picture inside the frame, on the scale 0..255; a step is a quarter
    of the radius, tokens and confidence are those of ``attack``."""
    joint: FrameParams = field(default_factory=FrameParams)
    """Where a frame is that is trained on several models at once."""
    training: FrameTraining = field(default_factory=FrameTraining)
    refusal: Annotated[str, Field(pattern=r"\S")] | None = None
    """What is to be answered to harmful requests that the model itself does not refuse in words;
    null for its own most frequent refusal."""

    def frame_of(self, model: str) -> FrameParams:
        """Where the frame of a model is."""
        return self.frames.get(model, FrameParams())


@dataclass(frozen=True)
class AlignmentParams:
    """What is aligned, and whether a retrieved text stands in the prompts that are trained on.

    See :class:`hauberk.defenses.alignment.AlignmentSetting`; what is left out is ours.
    """

    layers: (
        Literal["last", "located", "authors"]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    ) = "last"
    """Blocks counted from 0, the last one, those that were located, or those of the authors."""
    form: Literal["kl", "exp", "log"] = "kl"
    position: Literal["decision", "question", "image"] = "decision"
    pair: Annotated[float, Field(ge=0)] = 1.0
    margin: Annotated[float, Field(ge=0)] = 0.0
    decay: bool = False
    centred: bool = False
    target: Literal["reference", "current"] = "reference"
    retrieved: Literal["before", "after"] | None = None
    """Where the retrieved text stands: before the image or after it; null for nowhere."""


@dataclass(frozen=True)
class ProjectorTrainingParams:
    """How a projector is trained.

    See :class:`hauberk.defenses.projector.Part` and
    :class:`hauberk.defenses.projector_training.ProjectorTraining`.
    """

    mode: Literal["projector", "lora", "decoder"] = "lora"
    last: Annotated[int, Field(ge=0)] | None = None
    rank: Positive = 16
    batch: Positive = 8
    aligned: Positive = 24
    rate: Annotated[float, Field(gt=0)] = 1e-3
    decoder_rate: Annotated[float, Field(gt=0)] = 1e-3
    validations: Positive = 3
    """Weights, evenly over the steps, of which the best are kept."""


@dataclass(frozen=True)
class TextIndexParams:
    """The texts that are retrieved for pictures."""

    clip: str
    """Of ``concept_banks``: its encoder finds the text for a picture."""
    snippets: Annotated[list[str], Field(min_length=1)]
    """Suites of the train split whose requests are texts as well, beside all captions of those
    that are trained on."""


@dataclass(frozen=True)
class ProjectorParams:
    """TGA: what its weights are trained, validated and explained on."""

    models: list[str]
    """Those whose weights are trained."""
    index: TextIndexParams
    aligned: Annotated[list[str], Field(min_length=1)]
    """Suites of the train split whose pictures are told in words, which are aligned; no answer of
    theirs is trained on.  One that stands there twice counts twice."""
    answered: Annotated[list[str], Field(min_length=1)]
    """Harmless suites of the train split; the model's own answers to them are to stay.  One that
    stands there twice counts twice."""
    validate_on: Annotated[list[str], Field(min_length=1)]
    """Suites of the calibration split, by which the best weights are chosen."""
    parts_on: Annotated[list[str], Field(min_length=1)]
    alphas: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = field(
        default_factory=lambda: [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    )
    """Shares of the trained change, of which one is chosen on the calibration split."""
    bounded: list[str] | None = None
    """Benign suites of ``validate_on`` whose accuracy and over-refusal bound that choice; null for
    all of them."""
    alignment: AlignmentParams = field(default_factory=AlignmentParams)
    training: ProjectorTrainingParams = field(default_factory=ProjectorTrainingParams)
    variants: dict[str, AlignmentParams] = field(default_factory=dict)
    """Trained beside it, alike in all else, where a profile names them; measured on ``parts_on``.
    One with a retrieved text is asked with such texts in the prompts, too."""


@dataclass(frozen=True)
class AttackParams:
    """How pictures are attacked: see :class:`hauberk.attacks.pgd.Pgd`."""

    epsilon: Annotated[int, Field(ge=0, le=255)]
    step_size: Annotated[int, Field(ge=1, le=255)]
    tokens: Positive
    confidence: Annotated[float, Field(ge=0, lt=1)]
    suite: str
    """Whose pictures are attacked."""
    target: Annotated[str, Field(pattern=r"\S")] | None = None
    """What every answer is to begin with; null for what a model of the lab says that complies.

    The affirmative start of an answer, as in Zou et al., "Universal and Transferable Adversarial
    Attacks on Aligned Language Models", arXiv:2307.15043: "Sure, here is"."""


@dataclass(frozen=True)
class Generation:
    """How answers are generated, always greedily."""

    batch_size: Positive
    max_new_tokens: Positive
    checked_alone: Positive
    """Answers of a run that are generated again with batch size 1 and compared; of the
    parts of a defense, all of them together.  A served model is asked again."""
    processes: Positive = 1
    """In which the test suites are answered, each with its share of the GPUs and with ``threads``
    threads; a model must fit into the memory so many times."""

    @property
    def answers(self) -> tuple[int, int]:
        """What an answer depends on."""
        return self.batch_size, self.max_new_tokens

    @property
    def told(self) -> dict[str, int]:
        """What cards tell: all but how the work was divided."""
        return {name: value for name, value in asdict(self).items() if name != "processes"}


Margin = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Margins:
    """What a defense may cost on a benign suite and still be called no worse, as a share.

    Unless told, two points: what the gate allows over-refusal to rise, and what 982 pairs of which
    one in twenty changes can show (`hauberk.evaluation.statistics.pairs_needed`).
    """

    accuracy: Margin = 0.02
    over_refusal: Margin = 0.02


@dataclass(frozen=True)
class GapParams:
    """What the analysis of the safety gap reads states of."""

    requests: Annotated[int, Field(ge=8)]
    """Of the anchor split, in each group: every other one to fit on, the rest to measure.  Eight at
    least, as hauberk.analysis.gap.AT_LEAST says; a test compares the two."""
    harmful: str = "text_image"
    """Harmful words beside a picture: what their states are, and how often they are answered."""
    harmless: str = "text_image_twin"
    """Harmless words beside a picture."""
    captions: str | None = "captions"
    """Pictures that are told in words; null where none are."""
    words: str | None = "text"
    """Harmful words alone, with whose unsafe answers those of ``harmful`` are compared; null where
    there are none."""

    @property
    def read(self) -> dict[str, str]:
        """The suites of the anchor split, by the key that names each."""
        named = {"harmful": self.harmful, "harmless": self.harmless, "captions": self.captions}
        return {key: suite for key, suite in named.items() if suite is not None}


@dataclass(frozen=True)
class SafetyLayerParams:
    """How the layers are looked for where refusals live; see hauberk.analysis.safety_layers."""

    width: Positive | None = None
    """Consecutive blocks that are masked, skipped or injected into together; null for as large a
    part of the decoder as the paper's five blocks are of 32."""


@dataclass(frozen=True)
class Judges:
    """Who judges answers: two mappings for :func:`hauberk.evaluation.judges.judge_of`.

    The first one's word counts, in the figures, where a setting is chosen and where the model's own
    refusals and answers are picked; the second one's stands beside it.  Figures are judged when the
    model is done and gone; a guard that chooses or picks stays beside the model.
    """

    first: dict[str, Any] = field(default_factory=lambda: {"kind": "exact"})
    second: dict[str, Any] = field(default_factory=lambda: {"kind": "keyword"})
    grader: dict[str, Any] | None = None
    """Who grades answers that no rule can score, such as MM-Vet's: a mapping for
    :func:`hauberk.evaluation.judges.grader_of`."""
    labels: str | None = None
    """A folder of sheets that people filled in (`hauberk label write`), in :data:`LABELS`: what
    they say corrects the rates of both judges."""


@dataclass(frozen=True)
class Registry:
    """Which defense of which model goes to production, through the gate."""

    promote: dict[str, str]


@dataclass(frozen=True)
class Params:
    """The whole file.  An unknown key anywhere in it is an error."""

    seed: Seed
    profile: str
    threads: Positive
    profiles: dict[str, Profile]
    checkpoints: Annotated[str, Field(pattern=r"^[\w-][\w./-]*$")]
    """The folder in which every model and every CLIP lies, each in one of its name."""
    models: Annotated[dict[str, ModelSpec], Field(min_length=1)]
    served: dict[str, ServedParams]
    datasets: dict[str, DatasetParams]
    contamination: ContaminationParams
    suites: Annotated[list[str], Field(min_length=1)]
    attack: AttackParams
    defenses: dict[str, ShiftParams]
    concept_banks: dict[str, BankParams]
    guardalign: GuardAlignParams
    davsp: SafetyPromptParams
    tga: ProjectorParams
    evaluate: Generation
    gap: GapParams
    safety_layers: SafetyLayerParams
    gate: list[dict[str, Any]]
    registry: Registry
    noninferiority: Margins = Margins()
    judges: Judges = field(default_factory=Judges)

    def folder_of(self, checkpoint: str) -> Path:
        """Where a model or a CLIP lies."""
        return Path(self.checkpoints, checkpoint)

    @property
    def budget(self) -> Profile:
        """The profile in force."""
        return self.profiles[self.profile]

    def whole(self, model: str, defense: str) -> bool:
        """Whether a defense of a model is measured on every suite, and not to explain another."""
        return model in self.served or not is_part(defense)

    def explains(self, model: str) -> bool:
        """Whether the defenses of a model are taken apart in the profile in force."""
        return self.budget.explained is None or model in self.budget.explained

    def evaluated_on(self, model: str) -> tuple[str, ...]:
        """The defenses that have a bundle and an evaluation of a model."""
        listed = {
            GUARDALIGN: self.guardalign.models,
            DAVSP: self.davsp.models,
            TGA: self.tga.models,
        }
        return (*self.defenses, *(name for name, models in listed.items() if model in models))


for _section in (
    Sizes, AttackBudget, FrameBudget, ProjectorBudget, GridSweep, Profile, HarmParams,
    FrameParams, FrameTraining, SafetyPromptParams, AlignmentParams, ProjectorTrainingParams,
    TextIndexParams, ProjectorParams, ModelSpec, Variant, ShiftParams, TransportParams,
    BankParams, GuardVariant, GuardAlignParams, AttackParams, Generation, GapParams,
    SafetyLayerParams, Margins, Judges, Registry, DatasetParams, ContaminationParams, ServedParams,
    Params,
):  # fmt: skip
    _section.__pydantic_config__ = STRICT  # type: ignore[attr-defined]


def load_params(path: Path = Path("params.yaml"), root: Path | None = None) -> Params:
    """Read and check params.yaml, or a file that is to stand there in a project whose root is told.

    Raises
    ------
    BadParams
        Naming every wrong key by its dotted path, with the value, what would be right, and what
        to do.
    """
    content, root = _read(path), root or path.parent
    try:
        # Through JSON, where strict still lets a mapping become a dataclass.
        text = json.dumps(content, default=str, skipkeys=True)
        params = TypeAdapter(Params).validate_json(text)
    except ValidationError as error:
        problems = [_sentence(detail) for detail in error.errors()]
    else:
        problems = list(_contradictions(params, root, NOTHING_READ))
    if problems:
        raise BadParams(f"{path}:\n  " + "\n  ".join(problems) + f"\nCorrect {path.name}.")
    if absent := list(absent_files(params, root)):
        raise BadParams(
            f"{path} names what is not there:\n  " + "\n  ".join(absent) + "\nPut the files there "
            "and run again; what each data set needs is in data/README.md."
        )
    return params


def check_kinds(params: Params, read: Mapping[str, Kind]) -> None:
    """Check the suites of data sets once it is known what they hold.

    Raises
    ------
    BadParams
        Where a section names one that it cannot use, as for suites of the lab.
    """
    if problems := list(_contradictions(params, Path(), read)):
        raise BadParams("params.yaml:\n  " + "\n  ".join(problems) + "\nCorrect params.yaml.")


def _read(path: Path) -> Any:
    """Read YAML in which no key stands twice; YAML itself would take the last one silently."""
    import yaml

    if not path.is_file():
        raise BadParams(
            f"{path} does not exist; start in the root of the project, or restore the file: "
            f"`git checkout {path.name}`."
        )
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        content = None if tree is None else yaml.SafeLoader("").construct_document(tree)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for a date that is none
        raise BadParams(f"{path} is not YAML: {_where(error, path)}; correct the file.") from None
    if tree is None:
        raise BadParams(f"{path} is empty; restore it: `git checkout {path.name}`.")
    if twice := list(_duplicates(tree, (), set())):
        raise BadParams(f"{path}:\n  " + "\n  ".join(twice) + f"\nKeep one of each in {path.name}.")
    return content


def _where(error: Exception, path: Path) -> str:
    """Say what YAML stumbles over, and in which line and column, in one line."""
    from yaml import MarkedYAMLError
    from yaml.reader import ReaderError

    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark) is not None:
        what = " ".join(filter(None, (error.context, error.problem)))
        return f"{what}, in line {mark.line + 1}, column {mark.column + 1}"
    if isinstance(error, UnicodeDecodeError):
        what, before = "a byte that is not UTF-8", error.object[: error.start].decode()
    elif isinstance(error, ReaderError):
        what = f"the character {error.character:#x} may not be there"
        before = path.read_text(encoding="utf-8")[: error.position]
    else:
        return " ".join(str(error).split())
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return f"{what}, in line {line}, column {column}"


def _duplicates(node: Any, above: tuple[str, ...], seen: set[int]) -> Iterator[str]:
    """Yield the keys that one mapping of a YAML tree has more than once, with their lines."""
    if id(node) in seen or not isinstance(node.value, list):
        return
    seen.add(id(node))  # an alias is the node itself
    lines: dict[tuple[str, str], list[int]] = {}
    for place, item in enumerate(node.value):
        key, value = item if isinstance(item, tuple) else (None, item)
        here = (*above, str(place if key is None else key.value))
        if key is not None:
            lines.setdefault((key.tag, str(key.value)), []).append(key.start_mark.line + 1)
        yield from _duplicates(value, here, seen)
    for (_, name), found in lines.items():
        if len(found) > 1:
            key = ".".join((*above, name))
            where = f"{', '.join(map(str, found[:-1]))} and {found[-1]}"
            yield f"{key}: stands there more than once, in lines {where}"


def _sentence(detail: Any) -> str:
    key = ".".join(map(str, detail["loc"])) or "(file)"
    secret = detail["loc"][:1] in (("served",), ("judges",))  # somebody may write a key there
    if detail["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key; known here are {', '.join(_known(detail['loc'])) or 'none'}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{key}: missing"
    value = "" if secret else f"{detail['input']!r} "
    return f"{key}: {value}is wrong: {detail['msg'].lower()}"


_OF_PROFILE = {
    "attack": AttackBudget, "frame": FrameBudget, "grids": GridSweep, "projector": ProjectorBudget,
}  # fmt: skip
_OF_TGA = {"index": TextIndexParams, "training": ProjectorTrainingParams}


def _known(location: tuple[Any, ...]) -> list[str]:
    """List the keys that are right where an unknown one stands."""
    sections: dict[tuple[str, int], Any] = {
        ("profiles", 3): Profile,
        ("profiles", 4): _OF_PROFILE.get(str(location[2]) if location[2:] else "", Sizes),
        ("models", 3): ModelSpec,
        ("served", 3): ServedParams,
        ("datasets", 3): DatasetParams,
        ("contamination", 2): ContaminationParams,
        ("defenses", 3): ShiftParams,
        ("defenses", 5): Variant,
        ("concept_banks", 3): BankParams,
        ("concept_banks", 4): TransportParams,
        ("guardalign", 2): GuardAlignParams,
        ("guardalign", 4): GuardVariant,
        ("davsp", 2): SafetyPromptParams,
        ("davsp", 3): FrameTraining if "training" in location else HarmParams,
        ("davsp", 4): FrameParams,
        ("tga", 2): ProjectorParams,
        ("tga", 3): _OF_TGA.get(str(location[1]) if location[1:] else "", AlignmentParams),
        ("tga", 4): AlignmentParams,
        ("attack", 2): AttackParams,
        ("evaluate", 2): Generation,
        ("gap", 2): GapParams,
        ("safety_layers", 2): SafetyLayerParams,
        ("noninferiority", 2): Margins,
        ("judges", 2): Judges,
        ("registry", 2): Registry,
    }
    section = sections.get((str(location[0]), len(location)), Params)
    return [each.name for each in fields(section)]


def _contradictions(params: Params, root: Path, read: Mapping[str, Kind]) -> Iterator[str]:
    """Yield what is well-formed but cannot be run."""
    if params.profile not in params.profiles:
        yield f"profile: {params.profile!r} is not one of {', '.join(params.profiles)}"
    for name, profile in params.profiles.items():
        yield from _bad_budget(f"profiles.{name}", profile)
        yield from _unknown(f"profiles.{name}.explained", profile.explained or [], params.models)
    drawn = kinds_of(params, read)
    made = attacked_kinds(params, drawn)
    every = {**drawn, **made}
    yield from _bad_suites("suites", params.suites, every)
    yield from _bad_datasets(params, root)
    yield from _bad_attack(params, drawn, made)
    yield from _bad_gap(params, drawn)
    for name, defense in params.defenses.items():
        yield from _bad_defense(f"defenses.{name}", name, defense, (drawn, made))
        for index, variant in enumerate(defense.variants):
            here = f"defenses.{name}.variants.{index}"
            if variant.compose == "single" and len(variant.layers or []) != 1:
                yield (
                    f"{here}.layers: {variant.layers!r} is wrong: compose 'single' takes exactly "
                    "one layer"
                )
            yield from _bad_layers(here, variant.layers or [], params, root)
    for model, spec in params.models.items():
        yield from _bad_model(f"models.{model}", model, spec.path, params)
    for clip, bank in params.concept_banks.items():
        yield from _bad_model(f"concept_banks.{clip}", clip, bank.path, params)
        yield from _bad_transport(f"concept_banks.{clip}", bank)
        yield from _bad_benign(f"concept_banks.{clip}", bank, params.folder_of(clip))
        for name, profile in params.profiles.items():
            yield from _bad_grids(f"profiles.{name}.grids", profile.grids, clip, bank)
        if clip in params.models:
            yield f"concept_banks.{clip}: is among `models` as well; give one of them another name"
    for name, told in params.served.items():
        yield from _bad_served(f"served.{name}", name, told, params)
    yield from _bad_guardalign(params, every, root)
    yield from _bad_davsp(params, (drawn, made), root)
    yield from _bad_tga(params, (drawn, made), root)
    yield from _bad_safety_layers(params, root)
    yield from _bad_gate(params, every)
    yield from _bad_judges(params, every, root)
    for model, chosen in params.registry.promote.items():
        yield from _unknown("registry.promote", [model], params.models)
        yield from _unknown(f"registry.promote.{model}", [chosen], params.evaluated_on(model))


_Drawn = tuple[Kinds, Kinds]
"""Suites that are drawn, and those that are made by an attack."""


def absent_files(params: Params, root: Path) -> Iterator[str]:
    """Yield what a run needs of files that are not there: where they go, and what fetches them."""
    for name, spec in {**params.models, **params.concept_banks}.items():
        yield from _absent_checkpoint(params.folder_of(name), spec.hub, root)
    for clip, bank in params.concept_banks.items():
        benign = bank.benign_pictures
        if benign is not None and not (root / benign).is_dir():
            key = f"concept_banks.{clip}.benign_pictures"
            yield f"{key}: {benign!r} is no folder; put the pictures there"
    for name, told in params.datasets.items():
        yield from _absent_dataset(name, told, root)


def _absent_checkpoint(folder: Path, hub: str | None, root: Path) -> Iterator[str]:
    from hauberk.checkpoint import missing_in

    try:
        missing = missing_in(root / folder)
    except HauberkError as error:
        missing = [str(error)]
    if missing:
        name = hub or "ORG/NAME"
        yield (
            f"{folder}: missing {', '.join(missing)}; "
            f"`hf download {name} --local-dir {folder}` fetches them"
        )


def _absent_dataset(name: str, told: DatasetParams, root: Path) -> Iterator[str]:
    from hauberk.data.sources import SOURCES

    source = SOURCES[told.source]
    for option in (key for key, each in source.options.items() if each.allowed is Path):
        folder = told.options.get(option)
        if folder is not None and not (root / folder).is_dir():
            yield f"{folder}: no such folder, datasets.{name}.options.{option}: pictures"
    if told.where is None or (root / told.where).is_dir():
        return
    split = told.split or source.splits[0]
    files = ", ".join(pattern.format(split=split) for pattern in source.files)
    fetch = f"hf download {source.hub} --repo-type dataset --local-dir {told.where}"
    cure = f"; `{fetch}` fetches them" if source.hub else ""
    yield f"{told.where}: no such folder, datasets.{name}: {source.title}, {files}{cure}"


def _bad_datasets(params: Params, root: Path) -> Iterator[str]:
    if not params.datasets:
        return
    from hauberk.data.lab import ATTACKED, SUITES
    from hauberk.data.sources import SOURCES

    homes: dict[tuple[str, str], str] = {}
    for name, told in params.datasets.items():
        key = f"datasets.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"{key}: {name!r} becomes the name of a file; use letters, digits, _ and - only"
        yield from _bad_source(key, told, params.seed)
        yield from _repeated(f"{key}.suites", told.suites)
        for suite in (suite for suite in told.suites if suite in {*SUITES, *ATTACKED}):
            yield f"{key}.suites: {suite!r} is a suite of the lab; call it otherwise in your table"
        splits = told.splits if told.source in SOURCES else ()
        for place in ((split, suite) for split in splits for suite in told.suites):
            if (other := homes.setdefault(place, name)) != name:
                yield (
                    f"{key}.suites: {place[1]!r} has its {place[0]} split from datasets.{other}; "
                    "leave it out of one of them, or give them other shares"
                )
    if params.profile in params.profiles:
        yield from _not_shared(params, homes)


def _bad_source(key: str, told: DatasetParams, seed: int) -> Iterator[str]:
    """Check what can be known of a data set without reading it."""
    from hauberk.data.shares import check_shares
    from hauberk.data.sources import SOURCES

    if told.source not in SOURCES:
        yield from _unknown(f"{key}.source", [told.source], SOURCES)
        return
    source = SOURCES[told.source]
    folders = {name for name, option in source.options.items() if option.allowed is Path}
    plain = {name: value for name, value in told.options.items() if name not in folders}
    try:
        source.asked(told.source, told.split, seed, plain)
        if told.shares is not None:
            check_shares(told.shares)
    except BadParams as error:
        yield f"{key}: {str(error).rstrip('.')}"
    named = {"where": told.where, **{f"options.{n}": told.options.get(n) for n in folders}}
    for name, place in named.items():
        if place is None:
            continue
        parts = PurePosixPath(str(place)).parts
        if parts[:1] != ("data",) or len(parts) < 2 or ".." in parts:
            yield (
                f"{key}.{name}: {place!r} is wrong: the stages follow the files in data/ only; put "
                f"them into a folder such as 'data/{key.partition('.')[2]}'"
            )
    if told.where is None and not source.hub:
        yield f"{key}.where: missing: {told.source!r} is not on the hub; name a folder below data/"
    elif told.where is None and told.revision is None:
        yield (
            f"{key}.revision: missing: what comes from the hub may change; name a commit of "
            f"{source.hub}"
        )


def _not_shared(params: Params, homes: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """A suite must have the splits that sections ask it for."""
    declared = {suite: name for (_, suite), name in homes.items()}
    for each in wanted(params):
        if each.suite in declared and (each.split, each.suite) not in homes:
            name = declared[each.suite]
            had = ", ".join(split for split, suite in homes if suite == each.suite)
            yield (
                f"{each.key}: {each.suite!r} has samples of {had} alone, and the split "
                f"{each.split!r} is asked of it; give {each.split!r} a share in "
                f"datasets.{name}.shares"
            )


def _bad_budget(key: str, profile: Profile) -> Iterator[str]:
    for size in ("samples", "calibration"):
        attacked, drawn = getattr(profile.attack, size), getattr(profile.data, size)
        if attacked > drawn:
            yield (
                f"{key}.attack.{size}: {attacked} is wrong: pictures of drawn samples are "
                f"attacked, and data.{size} draws {drawn} of them"
            )


def _bad_attack(params: Params, drawn: Kinds, made: Kinds) -> Iterator[str]:
    """A choice on attacked pictures needs some."""
    yield from _unknown("attack.suite", [params.attack.suite], drawn)
    declared = {suite for told in params.datasets.values() for suite in told.suites}
    if params.attack.target is None and params.attack.suite in declared:
        yield (
            f"attack.target: missing: {params.attack.suite!r} does not tell how it would be "
            "answered, as suites of the lab do; say with what words, such as 'Sure, here is'"
        )
    kind = drawn.get(params.attack.suite)
    if kind and not (kind.pictured and kind.expected == "refuse"):
        yield (
            f"attack.suite: {params.attack.suite!r} has no pictures beside harmful requests, which "
            "are what is attacked; name a suite that has"
        )
    named = {f"defenses.{name}.calibrate_on": each.calibrate_on
             for name, each in params.defenses.items()}  # fmt: skip
    named["guardalign.calibrate_on"] = params.guardalign.calibrate_on
    named["davsp.validate_on"] = params.davsp.validate_on
    named["tga.validate_on"] = params.tga.validate_on
    for key, suites in named.items():
        for suite in (suite for suite in suites if suite in made):
            for name, profile in params.profiles.items():
                if not profile.attack.calibration:
                    yield (
                        f"{key}: {suite!r} has no pictures of the calibration split; say in "
                        f"profiles.{name}.attack.calibration how many are attacked"
                    )


def _bad_suites(key: str, names: list[str], known: Kinds) -> Iterator[str]:
    yield from _unknown(key, names, known)
    yield from _repeated(key, names)


def _bad_gap(params: Params, drawn: Kinds) -> Iterator[str]:
    told = params.gap
    measured = {"harmful": told.harmful} | ({} if told.words is None else {"words": told.words})
    for key, suite in measured.items():
        if suite not in params.suites:
            yield (
                f"gap.{key}: {suite!r} is not among `suites`, on which it is measured; put it there"
            )
    for key, suite in told.read.items():
        yield from _unknown(f"gap.{key}", [suite], drawn)
    for key, expected in (("harmful", "refuse"), ("harmless", "answer")):
        suite = getattr(told, key)
        if (kind := drawn.get(suite)) and not (kind.pictured and kind.expected == expected):
            yield f"gap.{key}: {suite!r} is no suite of {key} words beside a picture; name one"
    if (kind := drawn.get(told.captions or "")) and not (kind.pictured and kind.told):
        yield f"gap.captions: nobody told the pictures of {told.captions!r} in words; name others"
    for name, profile in params.profiles.items():
        if profile.data.anchor < told.requests:
            yield (
                f"gap.requests: {told.requests} is more than the {profile.data.anchor} rows "
                f"of profiles.{name}.data.anchor; as many or fewer are right"
            )


def _bad_defense(key: str, name: str, defense: ShiftParams, suites: _Drawn) -> Iterator[str]:
    drawn, made = suites
    if name in made:
        yield f"{key}: artifacts/MODEL/{name} holds attacked pictures; give it another name"
    if name == UNDEFENDED:
        yield f"{key}: {name!r} is the undefended model; give the defense another name"
    if name in (GUARDALIGN, DAVSP, TGA) or is_part(name):
        yield f"{key}: {name!r} is made by stages of its own; give this defense another name"
    if name == "gap":
        yield f"{key}: artifacts/MODEL/gap holds the analysis of the gap; give it another name"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        yield f"{key}: {name!r} becomes a folder and a name; use letters, digits, _ and - only"
    yield from _unknown(f"{key}.anchors", defense.anchors, drawn)  # nothing else has this split
    yield from _repeated(f"{key}.anchors", defense.anchors)
    plain = [s for s in defense.anchors if (kind := drawn.get(s)) and not kind.pictured]
    if plain:
        yield f"{key}.anchors: {plain} have no pictures, so that there is no shift to estimate"
    yield from _bad_calibration(f"{key}.calibrate_on", defense.calibrate_on, {**drawn, **made})


def _bad_calibration(key: str, suites: list[str], known: Kinds) -> Iterator[str]:
    yield from _bad_suites(key, suites, known)
    named = [suite for suite in suites if suite in known]
    kinds = [kind for suite in named if (kind := known[suite])]
    if graded := [suite for suite in named if (kind := known[suite]) and kind.graded]:
        yield (
            f"{key}: a choice counts right answers, and only a judge can say how good those to "
            f"{', '.join(graded)} are; name other suites"
        )
    if not kinds or len(kinds) < len(named):  # of a data set that is not read yet
        return
    expected = {kind.expected for kind in kinds}
    for missing, what in (("answer", "benign suite"), ("refuse", "suite of harmful requests")):
        if missing not in expected:
            yield f"{key}: {named} hold no {what}; a choice weighs both kinds"
    if not any(kind.pictured for kind in kinds):
        yield f"{key}: {named} have no pictures, so that nothing would be defended"


def _bad_transport(key: str, bank: BankParams) -> Iterator[str]:
    if (bank.benign_scenes or inf) * bank.masked_share * bank.transport.grid**2 < 1:
        yield (
            f"{key}.benign_scenes: {bank.benign_scenes} pictures of {bank.transport.grid**2} "
            f"patches are too few to mask {bank.masked_share:g} of them; give more"
        )
    yield from _repeated(f"{key}.transport.scales", bank.transport.scales)


def _bad_benign(key: str, bank: BankParams, folder: Path) -> Iterator[str]:
    """A threshold that was set on other pictures than a bank is for means nothing."""
    here, needless = ("benign_scenes", "benign_pictures")[:: 1 if bank.concepts == "lab" else -1]
    if getattr(bank, needless) is not None:
        yield (
            f"{key}.{needless}: {getattr(bank, needless)!r} is wrong: concepts {bank.concepts!r} "
            f"set their threshold on {here}; null is right"
        )
    if bank.concepts == "lab":
        if bank.benign_scenes is None:
            yield f"{key}.benign_scenes: missing; say how many pictures of the lab it is set on"
        return
    home, told = PurePosixPath(folder), bank.benign_pictures
    if told is None:
        yield (
            f"{key}.benign_pictures: missing: concepts 'real' set their threshold on harmless "
            "pictures of yours, like those that will be asked about; put some hundreds, png, jpg "
            f"or webp, into a folder such as '{home}/benign' and name it here"
        )
    elif home not in PurePosixPath(told).parents or ".." in PurePosixPath(told).parts:
        yield (
            f"{key}.benign_pictures: {told!r} is wrong: the stages follow the files in "
            f"{str(home)!r} only; put the pictures into a folder there"
        )


def _bad_grids(key: str, grids: GridSweep, clip: str, bank: BankParams) -> Iterator[str]:
    yield from _repeated(f"{key}.sides", grids.sides)
    patches = 4 * grids.pictures * min(bank.transport.grid, *grids.sides) ** 2
    if patches * bank.masked_share < 1:
        yield (
            f"{key}.pictures: {grids.pictures} are wrong: four times as many have {patches} "
            f"patches, too few to mask {bank.masked_share:g} of them as concept_banks.{clip} "
            "does; give more"
        )


def _bad_guardalign(params: Params, known: Kinds, root: Path) -> Iterator[str]:
    guard = params.guardalign
    yield from _bad_models("guardalign.models", guard.models, params)
    yield from _unknown("guardalign.clip", [guard.clip], params.concept_banks)
    yield from _bad_calibration("guardalign.calibrate_on", guard.calibrate_on, known)
    yield from _unknown("guardalign.parts_on", guard.parts_on, params.suites)
    yield from _repeated("guardalign.parts_on", guard.parts_on)
    yield from _repeated("guardalign.variants", guard.variants)
    for index, prefix in enumerate(guard.variants):
        key = f"guardalign.variants.{index}"
        if prefix.placement == "answer" and prefix.text != prefix.text.rstrip():
            yield (
                f"{key}.text: {prefix.text!r} ends in a space, behind which no model begins a "
                f"word; {prefix.text.rstrip()!r} is right for an answer"
            )
        yield from _bad_layers(key, prefix.layers or [], params, root)


def _bad_models(key: str, names: list[str], params: Params) -> Iterator[str]:
    yield from _unknown(key, names, params.models)
    yield from _repeated(key, names)


def _bad_davsp(params: Params, suites: _Drawn, root: Path) -> Iterator[str]:
    drawn, made = suites
    told = params.davsp
    yield from _bad_models("davsp.models", told.models, params)
    if unmasked := [name for name in told.models if name not in params.guardalign.models]:
        yield (
            f"davsp.models: {unmasked} are not among guardalign.models, whose mask is measured "
            "before their frames; put them there"
        )
    if told.models and params.gap.harmful not in told.parts_on:
        yield (
            f"davsp.parts_on: gap.harmful, {params.gap.harmful!r}, is missing, by which frames are "
            "compared on other models; put it there"
        )
    yield from _unknown("davsp.frames", list(told.frames), params.models)
    yield from _bad_calibration("davsp.validate_on", told.validate_on, {**drawn, **made})
    if attacked := [suite for suite in told.validate_on if suite in made]:
        yield f"davsp.validate_on: {attacked} are made against a model; name drawn suites"
    if told.models and "cmrm" not in params.defenses:
        yield "davsp: it is measured together with defenses.cmrm, which is not there; put it back"
    joint = told.joint.canvas is not None and told.joint.margins is not None
    for name, profile in params.profiles.items():
        if profile.frame.joint_steps and not joint:
            yield (
                f"profiles.{name}.frame.joint_steps: davsp.joint does not say where a frame of "
                "several models is; give its canvas and margins"
            )
    yield from _unknown("davsp.parts_on", told.parts_on, params.suites)
    yield from _repeated("davsp.parts_on", told.parts_on)
    yield from _repeated("davsp.attacked_at", told.attacked_at)
    for key, expected, names in (
        ("davsp.harm.harmful", "refuse", told.harm.harmful),
        ("davsp.harm.harmless", "answer", told.harm.harmless),
        ("davsp.harmful", "refuse", told.harmful),
        ("davsp.harmless", "answer", told.harmless),
    ):
        yield from _unknown(key, names, drawn)
        for name in dict.fromkeys(names):
            if (kind := drawn.get(name)) is None:
                continue
            if kind.expected != expected:
                right = "harmful requests" if expected == "refuse" else "harmless requests"
                yield f"{key}: {name!r} is no suite of {right}; put it on the other side"
            if not kind.pictured:
                yield f"{key}: {name!r} has no pictures, around which a frame could be"
    if told.harm.layer is not None:
        yield from _bad_layers("davsp.harm", [told.harm.layer], params, root)
    for key, frame in (
        *((f"frames.{name}", frame) for name, frame in told.frames.items()),
        ("joint", told.joint),
    ):
        if frame.canvas is None or frame.margins is None:
            continue
        (height, width), (top, right, bottom, left) = frame.canvas, frame.margins
        if top + bottom >= height or left + right >= width or not any(frame.margins):
            yield (
                f"davsp.{key}.margins: {frame.margins} leave no frame or no room for an "
                f"image on a canvas of {height} x {width}"
            )


def _bad_tga(params: Params, suites: _Drawn, root: Path) -> Iterator[str]:
    drawn, made = suites
    told = params.tga
    yield from _bad_models("tga.models", told.models, params)
    yield from _unknown("tga.index.clip", [told.index.clip], params.concept_banks)
    yield from _bad_calibration("tga.validate_on", told.validate_on, {**drawn, **made})
    yield from _unknown("tga.parts_on", told.parts_on, params.suites)
    yield from _repeated("tga.parts_on", told.parts_on)
    yield from _repeated("tga.alphas", told.alphas)
    for name in told.bounded or []:
        kind = {**drawn, **made}.get(name)
        if name not in told.validate_on or (kind and kind.expected != "answer"):
            yield f"tga.bounded: {name!r} is no benign suite of tga.validate_on; name one, or null"
    for key, names in (
        ("tga.aligned", told.aligned),
        ("tga.answered", told.answered),
        ("tga.index.snippets", told.index.snippets),
    ):
        yield from _unknown(key, names, drawn)
    for name in dict.fromkeys(told.aligned):
        if (kind := drawn.get(name)) and not kind.told:
            yield f"tga.aligned: nobody told the pictures of {name!r} in words; name others"
    for name in dict.fromkeys(told.answered):
        if (kind := drawn.get(name)) and kind.expected == "refuse":
            yield f"tga.answered: {name!r} is a suite of harmful requests; name harmless ones"
    for name in told.variants:
        if not re.fullmatch(rf"{TRAINED_BESIDE}[A-Za-z0-9_-]+", name):
            yield f"tga.variants.{name}: the name begins with {TRAINED_BESIDE!r}, of letters and _"
    for name, profile in params.profiles.items():
        key = f"profiles.{name}.projector.variants"
        yield from _unknown(key, profile.projector.variants, told.variants)
        yield from _repeated(key, profile.projector.variants)
    every = {"alignment": told.alignment}
    every |= {f"variants.{name}": variant for name, variant in told.variants.items()}
    for name, alignment in every.items():
        if isinstance(alignment.layers, list):
            yield from _bad_layers(f"tga.{name}", alignment.layers, params, root)
        if alignment.form == "kl" and alignment.position == "image":
            yield f"tga.{name}: no word follows an image's position; form 'kl' takes 'decision'"
        if alignment.form == "kl" and alignment.layers != "last":
            yield f"tga.{name}: the head reads the last block alone; form 'kl' takes layers 'last'"
    if told.training.last is not None:
        yield from _bad_layers("tga.training.last", [told.training.last], params, root)


def _bad_safety_layers(params: Params, root: Path) -> Iterator[str]:
    width = params.safety_layers.width
    for model in params.models:
        blocks = _blocks_of(root / params.folder_of(model) / "config.json")
        if width and blocks and width > blocks:
            yield (
                f"safety_layers.width: {width} is wrong: {model} has {blocks} decoder blocks; as "
                "many or fewer are right"
            )


def _bad_model(key: str, name: str, path: str | None, params: Params) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        yield (
            f"{key}: {name!r} becomes a folder and a name; use letters, digits, _ and - only: to "
            "DVC a dot leads into a section"
        )
    if name in TAKEN:
        yield f"{key}: artifacts/{name} holds {TAKEN[name]}; give the model another name"
    right = params.folder_of(name).as_posix()
    if path is not None and path != right:
        yield (
            f"{key}.path: {path!r} is wrong: the stages follow the files of a model in the "
            f"folder of its name in `checkpoints` only, {right!r}; put the model there, or leave "
            "the key out"
        )


def _bad_served(key: str, name: str, told: ServedParams, params: Params) -> Iterator[str]:
    from hauberk.endpoint import EndpointSetting
    from hauberk.unserved import CHANGES

    yield from _bad_model(key, name, None, params)
    if name in (*params.models, *params.concept_banks):
        yield f"{key}: a model or a CLIP that runs here is called so; give this one another name"
    # No value is shown: it may be a key that somebody wrote where its variable should stand.
    known = [each.name for each in fields(EndpointSetting) if each.name != "cache"]
    unknown = [f"endpoint.{each}" for each in told.endpoint if each not in known]
    missing = [f"endpoint.{each}" for each in ("url", "model") if each not in told.endpoint]
    for each in unknown:
        yield f"{key}.{each}: unknown key; known here are {', '.join(known)}"
    for each in missing:
        yield f"{key}.{each}: missing"
    if not (unknown or missing):
        try:
            EndpointSetting(**told.endpoint)
        except ValueError as error:
            yield f"{key}.endpoint.{str(error).removesuffix('.')}"
    if not (params.davsp.models and params.guardalign.models):  # DVC follows whole folders
        yield f"{key}: davsp.models and guardalign.models, which guard it, name no model; name one"
    yield from _repeated(f"{key}.defenses", told.defenses)
    changes = {**dict.fromkeys(params.defenses, CHANGES["cmrm"]), TGA: CHANGES[TGA]}
    fitted = {DAVSP: params.davsp.models, GUARDALIGN: params.guardalign.models}
    right = [f"{method}@{model}" for method, models in fitted.items() for model in models]
    for defense in told.defenses:
        method = defense.partition("@")[0]
        begun = [v.text for v in params.guardalign.variants if v.placement == "answer"]
        if method == GUARDALIGN and begun:
            yield (
                f"{key}.defenses: {defense!r} could begin the answer ({begun[0]!r}), which a "
                "served model does itself; take the guardalign.variants of placement 'answer' out"
            )
        elif method in changes:
            yield f"{key}.defenses: {defense!r} cannot guard a served model: {changes[method]}"
        else:
            yield from _unknown(f"{key}.defenses", [defense], right)


def _bad_gate(params: Params, kinds: Kinds) -> Iterator[str]:
    from registry.errors import BadRule
    from registry.gate import rules_from

    try:
        rules = rules_from(params.gate)
    except BadRule as error:
        yield from map(str.strip, str(error).removeprefix("params.yaml:").strip().splitlines())
        return
    for index, rule in enumerate(rules):
        yield from _unknown(f"gate.{index}.suite", [rule.suite], [*params.suites, "all"])
        if rule.suite == "all":  # the evaluation as a whole
            yield from _unknown(f"gate.{index}.metric", [rule.metric], METRICS["all"])
        elif rule.suite in params.suites and (kind := kinds.get(rule.suite)):
            known = (*METRICS[kind.expected], *METRICS["either"])
            yield from _unknown(f"gate.{index}.metric", [rule.metric], known)
        if rule.metric in _PLAIN and (rule.bound != "value" or rule.against == UNDEFENDED):
            yield (
                f"gate.{index}: {rule.metric} has neither an interval nor a paired difference; "
                "limit its value, or against production"
            )


def _bad_judges(params: Params, known: Kinds, root: Path) -> Iterator[str]:
    from hauberk.errors import BadJudge
    from hauberk.evaluation.judges import checked, checked_grader

    told = params.judges
    for place, spec in (("first", told.first), ("second", told.second)):
        try:
            checked(spec)
        except BadJudge as error:
            yield f"judges.{place}: {str(error).removesuffix('.')}"
            continue
        if spec["kind"] != "guard":
            continue
        path = spec["path"]
        if (root / path).exists() or not spec.get("revision"):
            if not _lies_in(GUARD_MODELS, path):
                yield (
                    f"judges.{place}.path: {path!r} is wrong: the stages follow the files of a "
                    f"guard in {str(GUARD_MODELS)!r} only; put the guard model into a folder "
                    "there, or give the `revision` of a repository of that name"
                )
            elif not (root / path / "config.json").is_file():
                yield (
                    f"judges.{place}.path: {path!r} holds no config.json; put the guard model "
                    "there, or give the `revision` of a repository of that name"
                )
    if told.labels is not None:
        if PurePosixPath(told.labels) != LABELS and not _lies_in(LABELS, told.labels):
            yield (
                f"judges.labels: {told.labels!r} is wrong: the report follows the sheets in "
                f"{str(LABELS)!r} only; put them there and name it, or say null"
            )
        elif not (root / told.labels).is_dir():
            yield f"judges.labels: {told.labels!r} is no folder; put the sheets there, or say null"
    graded = [suite for suite in params.suites if (kind := known.get(suite)) and kind.graded]
    if told.grader is None and graded:
        yield no_grader(graded)
    if told.grader is not None:
        try:
            checked_grader(told.grader)
        except BadJudge as error:
            yield f"judges.grader: {str(error).removesuffix('.')}"
    for index, rule in enumerate(params.gate if told.second != Judges().second else []):
        if "_keyword" in str(rule.get("metric")):
            yield (
                f"gate.{index}.metric: {rule['metric']!r} is of the keyword judge, and "
                f"judges.second is of kind {told.second.get('kind')!r}; name another metric"
            )


def no_grader(suites: Collection[str]) -> str:
    """Say that suites need a grader where there is none, and what to add."""
    return (
        f"judges.grader: missing: only a judge can grade the answers to {', '.join(suites)}; name "
        "a served model, such as {kind: endpoint, url: http://localhost:8000/v1, model: NAME}, or "
        "take them out of `suites`"
    )


def _lies_in(home: PurePosixPath, path: str) -> bool:
    return home in PurePosixPath(path).parents and ".." not in PurePosixPath(path).parts


def _unknown(key: str, names: Collection[str], known: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{key}: {name!r} is not one of {', '.join(known)}"


def _repeated(key: str, values: Sequence[Any]) -> Iterator[str]:
    for value in dict.fromkeys(value for value in values if values.count(value) > 1):
        yield f"{key}: {value!r} stands there more than once; once is right"


def _bad_layers(key: str, layers: Sequence[int], params: Params, root: Path) -> Iterator[str]:
    yield from _repeated(f"{key}.layers", layers)
    for model in params.models:
        blocks = _blocks_of(root / params.folder_of(model) / "config.json")
        outside = [n for n in layers if n < 0 or (blocks and n >= blocks)]
        if outside:
            last = "..." if blocks is None else blocks - 1
            yield f"{key}.layers: {outside} are outside 0..{last}, the decoder blocks of {model}"


def _blocks_of(config: Path) -> int | None:
    """The number of decoder blocks as its config tells; None where it does not."""
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        found = content.get("text_config", content).get("num_hidden_layers")
    except (ValueError, AttributeError):
        return None  # whoever loads it says what is wrong
    return found if isinstance(found, int) else None
