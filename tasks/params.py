"""What params.yaml holds, as frozen dataclasses; see tasks.params_file for how it is read."""

from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

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
    rate: Annotated[float, Field(gt=0, le=1)] = 0.03
    """Of a step, in pixels of [0, 1]; of joint frames too."""
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
    bounded: Annotated[list[str], Field(min_length=1)] | None = None
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
