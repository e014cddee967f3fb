"""params.yaml, as far as the order needs it: checked by the stages' own loader, before anything."""

import os
import re
from collections.abc import Iterator, Mapping
from itertools import count, product
from pathlib import Path
from typing import Any

from flows.errors import FlowError

_PROFILE = re.compile(r"^profile:[ \t]*([\w.-]+)", re.MULTILINE)
_VALUE = re.compile(r"\$\{([\w.]+)\}")


def check(root: Path) -> dict[str, Any]:
    """Read params.yaml after the stages' loader has checked it, unknown keys included.

    Raises
    ------
    hauberk.errors.BadParams
        Naming each wrong key by its dotted path.
    FlowError
        Naming each key that a stage follows and that is left out.
    """
    from tasks.params_file import load_params

    load_params(root / "params.yaml")
    content = read(root)
    check_followed(root, content, "params.yaml")
    return content


def adopt(root: Path, file: Path) -> Path | None:
    """Put a whole file of parameters in the place of params.yaml, after it was checked for there.

    Returns
    -------
    Path or None
        Where the parameters before are kept, for which no others are lost; None when params.yaml
        had these already.

    Raises
    ------
    FlowError
        If there is no such file, or it leaves out a key that a stage follows; nothing is written,
        as with every other error.
    hauberk.errors.BadParams
        Naming each wrong key, or the files that it names and that are not there.
    """
    from tasks.params_file import load_params

    if not file.is_file():
        raise FlowError(f"{file} does not exist; give a whole file such as params.yaml.")
    load_params(file, root)
    check_followed(root, _yaml(file), str(file))
    path = root / "params.yaml"
    wanted, before = file.read_bytes(), path.read_bytes()
    if wanted == before:
        return None
    places = (root / f"params.yaml.before{number or ''}" for number in count())
    kept = next(each for each in places if not each.exists() or each.read_bytes() == before)
    _replace(kept, before)
    _replace(path, wanted)
    return kept


def _replace(path: Path, content: bytes) -> None:
    own = path.with_name(f".{path.name}.{os.getpid()}")
    own.write_bytes(content)
    own.replace(path)


def choose(root: Path, profile: str | None) -> str | None:
    """Check params.yaml and set its profile, if one is given; only the owner of the project may.

    Returns
    -------
    str or None
        The profile before, if it was another one; see `set_profile`.
    """
    check(root)
    return None if profile is None else set_profile(root / "params.yaml", profile)


def read(root: Path) -> dict[str, Any]:
    """Read params.yaml as it is."""
    path = root / "params.yaml"
    if not path.is_file():
        raise FlowError(f"{path} does not exist; start in the root of the project.")
    return _yaml(path)


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        with path.open(encoding="utf-8") as file:
            return dict(yaml.safe_load(file) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise FlowError(f"{path} is not YAML: {why}; correct the file.") from None


def check_followed(root: Path, content: Mapping[str, Any], name: str) -> None:
    """Find what is left out because it has a default, and what DVC cannot follow for that.

    Raises
    ------
    FlowError
        Naming each key that a stage of dvc.yaml follows and that ``content`` lacks.
    """
    stages = _yaml(root / "dvc.yaml")["stages"].values()
    keys = dict.fromkeys(key for stage in stages for key in _followed(stage, content))
    if missing := [key for key in keys if not _has(content, key)]:
        raise FlowError(
            f"{name} leaves out what stages follow: {', '.join(missing)}.\nWrite these keys down, "
            "with the values that the project's own params.yaml has if you have no others."
        )


def _followed(stage: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[str]:
    """Give every key that a stage of dvc.yaml follows: of all its items, and of every profile."""
    variables = {"profile": list(content["profiles"])}
    for name, items in stage.get("matrix", {}).items():
        variables[f"item.{name}"] = list(_filled_in(items, content))
    for key in stage.get("params", []):
        used = _VALUE.findall(key)
        for values in product(*(variables[name] for name in used)):
            told = dict(zip(used, values, strict=True))
            yield _VALUE.sub(lambda found, told=told: told[found[1]], key)


def _filled_in(items: Any, content: Mapping[str, Any]) -> Any:
    """Put in what ``${...}`` of a matrix stands for."""
    if isinstance(items, list):
        return [_filled_in(item, content) for item in items]
    found = _VALUE.fullmatch(items)
    return _at(content, found[1]) if found else items


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def _has(content: Any, key: str) -> bool:
    try:
        _at(content, key)
    except (KeyError, TypeError):
        return False
    return True


def set_profile(path: Path, profile: str) -> str | None:
    """Set the one key `profile`; every other letter of the file stays.

    Returns
    -------
    str or None
        The profile before; None when it was this one already.

    Raises
    ------
    FlowError
        If params.yaml has no such profile; nothing is written.
    """
    known = sorted(read(path.parent).get("profiles", {}))
    if profile not in known:
        raise FlowError(
            f"profile {profile!r} is not in params.yaml; known are {', '.join(known) or 'none'}: "
            "use one of them, or add it under `profiles`."
        )
    text = path.read_text()
    found = _PROFILE.search(text)
    if found is None:
        raise FlowError(f"{path} has no line `profile: ...`; add `profile: {profile}`.")
    if found[1] == profile:
        return None
    _replace(path, (text[: found.start(1)] + profile + text[found.end(1) :]).encode())
    return found[1]
