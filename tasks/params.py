"""params.yaml as frozen dataclasses, checked at the door."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from hauberk.errors import BadParams

STRICT = ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(ge=0, le=10)]
"""The paper sweeps 0 to 1; ten times the shift is beyond any use."""


@dataclass(frozen=True)
class Sizes:
    """Rows a suite, by split."""

    samples: Positive
    calibration: Positive
    anchor: Positive


@dataclass(frozen=True)
class Profile:
    """A budget."""

    data: Sizes
    alphas: Annotated[list[Alpha], Field(min_length=1)]


@dataclass(frozen=True)
class ModelSpec:
    """A model to defend: local folder or hub id, its revision, and the precision to load it in."""

    path: str
    revision: str | None
    dtype: Literal["float32", "float16", "bfloat16", "auto"]


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
    calibrate_on: Annotated[list[str], Field(min_length=2)]
    alphas: list[Alpha] | None
    variants: Annotated[list[Variant], Field(min_length=1)]


@dataclass(frozen=True)
class Generation:
    """How answers are generated, always greedily."""

    batch_size: Positive
    max_new_tokens: Positive
    checked_alone: Positive
    """Answers of a run that are generated again with batch size 1 and compared."""


@dataclass(frozen=True)
class Registry:
    """Which defense of which model goes to production, through the gate."""

    promote: dict[str, str]


@dataclass(frozen=True)
class Params:
    """The whole file.  An unknown key anywhere in it is an error."""

    seed: int
    profile: str
    threads: Positive
    profiles: dict[str, Profile]
    models: Annotated[dict[str, ModelSpec], Field(min_length=1)]
    suites: Annotated[list[str], Field(min_length=1)]
    defenses: dict[str, ShiftParams]
    evaluate: Generation
    gate: list[dict[str, Any]]
    registry: Registry

    @property
    def budget(self) -> Profile:
        """The profile in force."""
        return self.profiles[self.profile]


for _section in (
    Sizes, Profile, ModelSpec, Variant, ShiftParams, Generation, Registry, Params,
):  # fmt: skip
    _section.__pydantic_config__ = STRICT  # type: ignore[attr-defined]


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Raises
    ------
    BadParams
        Naming every wrong key by its dotted path, with the value, what would be right, and what
        to do.
    """
    import yaml

    if not path.is_file():
        raise BadParams(f"{path} does not exist; start in the root of the project.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadParams(f"{path} is not YAML: {error}; correct the file.") from None
    try:
        # Through JSON, where strict still lets a mapping become a dataclass.
        text = json.dumps(content, default=str, skipkeys=True)
        params = TypeAdapter(Params).validate_json(text)
    except ValidationError as error:
        problems = [_sentence(detail) for detail in error.errors()]
    else:
        problems = list(_contradictions(params, path.parent))
    if problems:
        raise BadParams(f"{path}:\n  " + "\n  ".join(problems) + f"\nCorrect {path.name}.")
    return params


def _sentence(detail: Any) -> str:
    key = ".".join(map(str, detail["loc"])) or "(file)"
    if detail["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key; known here are {', '.join(_known(detail['loc'])) or 'none'}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{key}: missing"
    return f"{key}: {detail['input']!r} is wrong: {detail['msg'].lower()}"


def _known(location: tuple[Any, ...]) -> list[str]:
    """List the keys that are right where an unknown one stands."""
    sections: dict[tuple[str, int], Any] = {
        ("profiles", 3): Profile,
        ("profiles", 4): Sizes,
        ("models", 3): ModelSpec,
        ("defenses", 3): ShiftParams,
        ("defenses", 5): Variant,
        ("evaluate", 2): Generation,
        ("registry", 2): Registry,
    }
    section = sections.get((str(location[0]), len(location)), Params)
    return [field.name for field in fields(section)]


def _contradictions(params: Params, root: Path) -> Iterator[str]:
    """Yield what is well-formed but cannot be run."""
    from hauberk.data.lab import SUITES
    from registry.errors import BadRule
    from registry.gate import rules_from

    if params.profile not in params.profiles:
        yield f"profile: {params.profile!r} is not one of {', '.join(params.profiles)}"
    yield from _unknown("suites", params.suites, SUITES)
    for name, defense in params.defenses.items():
        here = f"defenses.{name}"
        if name == "none":
            yield f"{here}: 'none' is the undefended model; give the defense another name"
        yield from _unknown(f"{here}.anchors", defense.anchors, SUITES)
        yield from _unknown(f"{here}.calibrate_on", defense.calibrate_on, SUITES)
        for index, variant in enumerate(defense.variants):
            yield from _bad_layers(f"{here}.variants.{index}", variant, params.models, root)
    for model, spec in params.models.items():
        if _is_local(spec.path) and not (root / spec.path / "config.json").is_file():
            yield (
                f"models.{model}.path: {spec.path!r} holds no config.json; give a folder that "
                "`save_pretrained` wrote, or a hub id"
            )
    try:
        rules_from(params.gate)
    except BadRule as error:
        yield from map(str.strip, str(error).removeprefix("params.yaml:").strip().splitlines())
    for model, chosen in params.registry.promote.items():
        yield from _unknown("registry.promote", [model], params.models)
        yield from _unknown(f"registry.promote.{model}", [chosen], params.defenses)


def _unknown(key: str, names: list[str], known: Mapping[str, Any]) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{key}: {name!r} is not one of {', '.join(known)}"


def _bad_layers(
    key: str, variant: Variant, models: Mapping[str, ModelSpec], root: Path
) -> Iterator[str]:
    if variant.compose == "single" and len(variant.layers or []) != 1:
        yield f"{key}.layers: {variant.layers!r} is wrong: compose 'single' takes exactly one layer"
    for model, spec in models.items():
        blocks = _blocks_of(root / spec.path / "config.json")
        outside = [n for n in variant.layers or [] if n < 0 or (blocks and n >= blocks)]
        if outside:
            last = "..." if blocks is None else blocks - 1
            yield f"{key}.layers: {outside} are outside 0..{last}, the decoder blocks of {model}"


def _blocks_of(config: Path) -> int | None:
    """The number of decoder blocks, from a local config; None for a model that is not local."""
    if not config.is_file():
        return None
    content = json.loads(config.read_text())
    found = content.get("text_config", content).get("num_hidden_layers")
    return found if isinstance(found, int) else None


def _is_local(path: str) -> bool:
    """A hub id is NAME or OWNER/NAME; the project's own models lie under lab/."""
    return path.startswith(("lab/", ".", "/", "~")) or path.count("/") > 1
