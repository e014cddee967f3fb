"""From what a user names to a folder: one of their own, or one that the hub fills."""

import re
from collections.abc import Sequence
from pathlib import Path

from hauberk.errors import BadData

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(where: str | Path, files: Sequence[str], revision: str | None) -> tuple[Path, str]:
    """Find the folder of a data set; one of the hub is downloaded, or found where it was kept.

    Parameters
    ----------
    where : folder, or id on the hub such as ``owner/name``
    files : patterns of the files that are needed of it
    revision : of a data set on the hub; its newest where None

    Returns
    -------
    folder : Path
    commit : str
        Of a data set on the hub, what was downloaded; "" of a folder.

    Raises
    ------
    BadData
        If there is no such folder, or the hub does not hand the files out.
    """
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder.resolve(), ""
    if folder.exists() or not _HUB_ID.fullmatch(str(where)):
        raise BadData(
            f"{where}: is no folder; give the folder of the data set, or its id on the hub, "
            "OWNER/NAME."
        )
    return _download(str(where), files, revision)


def _download(name: str, files: Sequence[str], revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/datasets/{name}"
    try:
        folder = snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=list(files)
        )
    except GatedRepoError as error:
        raise BadData(
            f"{name}: must be asked for ({_first_line(error)}); accept its terms at {page} and log "
            "in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise BadData(f"{name}: has no revision {revision!r}; {page} lists them.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise BadData(
            f"{name}: is no folder here and no data set on the hub; correct the name, or log in "
            "with `hf auth login` if it is not public."
        ) from None
    except Exception as error:  # every way in which a network, a server or a disk can fail
        wanted = ", ".join(files)
        raise BadData(
            f"{name}: is no folder here, and the hub does not hand it out "
            f"({_first_line(error)}).  Fetch {wanted} of {page} where it can be reached, for "
            f"example with `hf download {name} --repo-type dataset --local-dir FOLDER`, put them "
            "into one folder, and give that folder."
        ) from None
    return Path(folder), Path(folder).name


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
