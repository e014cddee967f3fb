"""params.yaml, as far as the order needs it: checked by the stages' own loader, before anything."""

import os
import re
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
    own = path.with_name(f".{path.name}.{os.getpid()}")
    own.write_text(text[: found.start(1)] + profile + text[found.end(1) :])
    own.replace(path)
    return found[1]
