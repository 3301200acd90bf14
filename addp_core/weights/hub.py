"""Files of the Hugging Face Hub: hf://owner/repository, hf://owner/repository/file, and what its errors mean."""

from pathlib import Path
from typing import Any

from addp_core.base.errors import UserError
from addp_core.base.paths import MODEL_FILE

HUB_PREFIX = "hf://"
EXPECTED = f"hf://owner/repository/file, or hf://owner/repository for its {MODEL_FILE}"


def download(source: str) -> Path:
    """Fetch a file from the Hub, or find it in the local cache.

    Args:
        source: "hf://owner/repository/file"; without a file, model.safetensors. After the repository's name,
            "@revision" may name a branch, a tag or a commit.

    Raises:
        UserError: if there is no such file, no access to it, or no network and no copy in the cache.
    """
    owner, _, rest = source.removeprefix(HUB_PREFIX).partition("/")
    repository, _, name = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not owner or not repository:
        raise UserError(f"{source}: expected {EXPECTED}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place: dict[str, Any] = {"repo_id": f"{owner}/{repository}", "revision": revision or None}
    try:
        return Path(hf_hub_download(filename=name or MODEL_FILE, **place))
    except hub_errors() as error:
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if missing:
            raise UserError(f"{source}: has no {name or MODEL_FILE}{_files(place)}; expected {EXPECTED}") from error
        raise UserError(
            f"{source}: cannot be downloaded ({hub_reason(error)}); expected a reachable hub file or a local path"
        ) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises for a request that fails: refused, without network, or with a wrong name."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    client: Any = HfHubHTTPError.__bases__  # of its HTTP client, which is another one in other versions
    return (EntryNotFoundError, *client, OSError, ValueError)


def hub_reason(error: Exception) -> str:
    """Return in a few words why a request has failed."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "its owner has to grant access first, on its page"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one; `hf auth login` or HF_TOKEN gives access"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the token is not accepted; `hf auth login` stores another one"
    if status == 403:
        return "the token does not allow it"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _files(place: dict[str, Any]) -> str:
    """Return the names of the files in a repository, for an error message."""
    from huggingface_hub import list_repo_files

    try:
        names = [name for name in list_repo_files(**place) if not name.startswith(".")]
    except hub_errors():
        return ""
    return f" (found {', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else ""
