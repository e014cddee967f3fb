"""params.yaml, as far as the order needs it: checked by the stages' own loader, before anything."""

import os
import re
from itertools import count
from pathlib import Path
from typing import Any

from flows.errors import FlowError

_PROFILE = re.compile(r"^profile:[ \t]*([\w.-]+)", re.MULTILINE)


def check(root: Path) -> dict[str, Any]:
    """Read params.yaml after the stages' loader has checked it, unknown keys included.

    Raises
    ------
    hauberk.errors.BadParams
        Naming each wrong key by its dotted path.
    """
    from tasks.params import load_params

    load_params(root / "params.yaml")
    return read(root)


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
        If there is no such file; nothing is written, as with every other error.
    hauberk.errors.BadParams
        Naming each wrong key, or the files that it names and that are not there.
    """
    from tasks.params import load_params

    if not file.is_file():
        raise FlowError(f"{file} does not exist; give a whole file such as params.yaml.")
    load_params(file, root)
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
    import yaml

    path = root / "params.yaml"
    if not path.is_file():
        raise FlowError(f"{path} does not exist; start in the root of the project.")
    try:
        with path.open(encoding="utf-8") as file:
            return dict(yaml.safe_load(file) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise FlowError(f"{path} is not YAML: {why}; correct the file.") from None


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
