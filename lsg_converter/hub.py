"""Pushing a checkpoint to the Hugging Face Hub: one commit, or nothing."""

import re
import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import build_hf_headers

from .options import TargetError, first_line


def full_name(name: str, token: str | bool | None) -> str:
    """`owner/name` for a repository's name, whose owner may be left out: it is the token's. Raises TargetError."""
    if "/" in name:
        return name
    try:
        return f"{HfApi(token=token).whoami()['name']}/{name}"
    except Exception as error:
        got, advice = _explain(error)
        raise TargetError(
            f"--push_to_hub: {name!r} has no owner yet: {got}; {advice}, or give --hub_model_id"
        ) from None


def push(folder: Path, repo_id: str, *, private: bool, token: str | bool | None, message: str) -> str:
    """Push everything in `folder` to a model repository, which is created where it does not exist.

    Args:
        folder: a checkpoint; it is only read.
        repo_id: `owner/name`, or `name` alone, which is then the token owner's.
        private: whether a new repository is private; one that exists stays as it is.
        token: a token of the Hub; None or True is the one of this machine.
        message: what the commit says.

    Returns:
        The repository, as `owner/name`.

    Raises:
        TargetError: where it fails; then a new repository is deleted again, as it is where this is interrupted.
    """
    api, name, created, secret = HfApi(token=token), repo_id, False, ""
    try:
        secret = build_hf_headers(token=token).get("authorization", "").removeprefix("Bearer ")
        if not re.fullmatch("[!-~]+", secret):
            raise LocalTokenNotFoundError("there is no token, or it has a space or a line break")
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
        try:
            name, created = api.create_repo(repo_id, private=private).repo_id, True
        except HfHubHTTPError as error:
            # 409: it exists. 403: the token may not create it, but may write to it where it exists.
            if error.response.status_code not in (403, 409):
                raise
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and not api.model_info(name).private:
                raise ValueError("it exists already, and is public") from None
        # Not upload_folder, which may split a folder into several commits.
        api.create_commit(name, additions, commit_message=message)
        return name
    except BaseException as error:
        left = f"; the new repository {name!r} is left, delete it" if created and not _deleted(api, name) else ""
        if not isinstance(error, Exception):
            raise
        got, advice = _explain(error)
        got = got.replace(secret, "***") if secret else got
        command = f"hf upload {name} {shlex.quote(str(folder))}{' --private' if private else ''}"
        raise TargetError(
            f"--push_to_hub: {name!r} cannot be pushed: {got}; {advice}, then `{command}`{left}; "
            f"the checkpoint is complete in {folder}"
        ) from error


def _deleted(api: HfApi, name: str) -> bool:
    try:
        api.delete_repo(name, missing_ok=True)
    except Exception:  # what failed the push, such as no connection, fails this too
        return False
    return True


def _explain(error: BaseException) -> tuple[str, str]:
    """What was got, in one line, and what to do."""
    if isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    status, got = None, first_line(error)
    if isinstance(error, HfHubHTTPError):
        # The first line of its own text may be nothing but the request's id.
        status = error.response.status_code
        got = first_line(OSError(f"{status} {error.server_message or error.response.reason_phrase}"))
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return got, "log in with a token that may write there (`hf auth login`)"
    return got, "check the name and the connection"
