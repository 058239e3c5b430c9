"""Push a model folder to the Hub: checked before, whole or not at all, and safe to run again."""

import json
import logging
import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # of whichever library the client speaks HTTP with
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id

from modeling_fer.hub.facts import public
from modeling_fer.hub.release import (
    ADAPTER,
    CARD,
    RECORDS,
    adapter_base,
    adapter_files,
    check_model,
    endpoint_files,
    is_outdated,
    released_files,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds between attempts. Within each, the client itself tries uploads six times.
PAUSES = (1.0, 4.0)
LONGEST_WAIT = 600  # seconds that a server may ask for
PASSING = {408, 409, 412, 429, 500, 502, 503, 504}  # statuses that another attempt may not meet again
FAILURES = (HTTPError, OSError, RuntimeError, ValueError)


class PushError(OSError):
    """A push that failed; the message says why, that nothing is lost, and what to run again."""


@dataclass(frozen=True)
class Pushed:
    """What the Hub holds after a push.

    Args:
        url: page of the commit.
        sha: its id.
        files: paths in the repository of all files of the release.
        deleted: paths of files of an earlier push that were deleted, as they do not fit this one.
        changed: False where the Hub had all of them already, so that no commit was made.
        adapter: the same of the adapter's own repository, if it has one.
    """

    url: str
    sha: str
    files: tuple[str, ...]
    deleted: tuple[str, ...]
    changed: bool
    adapter: "Pushed | None" = None


def summary(pushed: Pushed) -> str:
    """What was pushed, as a few lines of text."""
    lines = [f"{len(pushed.files)} files: {pushed.url}" if pushed.changed else f"unchanged: {pushed.url}"]
    if pushed.deleted:
        lines.append(f"deleted there, from an earlier push: {', '.join(pushed.deleted)}")
    return "\n".join([*lines, *([f"adapter: {summary(pushed.adapter)}"] if pushed.adapter else [])])


def origin(error: BaseException) -> BaseException:
    """The failure that the client has wrapped in others."""
    while not isinstance(error, HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """Status of the answer that an error is made of, if there was an answer."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def asked_wait(error: BaseException) -> float:
    """Seconds that a server asks to wait, in `Retry-After` or in the Hub's `RateLimit`; 0: none."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    after, limit = headers.get("Retry-After", ""), headers.get("RateLimit", "")
    if after.isdigit():
        return float(after)
    return float(found[1]) + 1 if (found := re.search(r"r=0;t=(\d+)", limit)) else 0.0


def is_passing(error: BaseException) -> bool:
    """Whether another attempt may succeed: no answer, half an answer, or one of the passing statuses."""
    if (status := status_of(error)) is not None:
        return status in PASSING
    return isinstance(error, HTTPError | json.JSONDecodeError)


def explain(failure: BaseException, repo_id: str, endpoint: str) -> tuple[str, str]:
    """What failed, and what mends it, in words."""
    error = origin(failure)
    status = status_of(error)
    told = ": ".join(" ".join(str(e).split()).strip(" .") for e in dict.fromkeys((failure, error)))
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on", "Unset HF_HUB_OFFLINE"
    if isinstance(error, json.JSONDecodeError):
        return f"the answer of {endpoint} was cut short or is no JSON ({told})", "Wait a little"
    if status is None and isinstance(error, HTTPError):
        return f"{endpoint} does not answer ({told})", "Look at the network"
    if status is None:
        return told, "Mend it"
    if status == 401:
        return f"{endpoint} does not know who you are (401)", "Log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return (
            f"your login may not write to {repo_id} (403)",
            "Log in with `hf auth login` and a token that may write there, or choose another name",
        )
    if status in {409, 412}:
        return (
            f"{repo_id} is being changed by someone else, or its name is taken ({status})",
            "Wait a little, or choose another name",
        )
    if status == 429:
        wait = asked_wait(error)
        return "too many requests (429)", f"Wait {wait:.0f} s" if wait else "Wait some minutes"
    if status >= 500:
        return f"{endpoint} is in trouble ({status})", "Wait some minutes"
    return f"{endpoint} refuses ({told})", "Mend it"


def patiently(attempt: Callable[[], T], api: HfApi, repo_id: str, again: str) -> T:
    """Run an attempt, and again after a pause where that may help; it must be safe to run twice.

    Raises:
        PushError: it failed for good.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return attempt()
        except PushError:
            raise
        except FAILURES as error:
            cause = origin(error)
            reason, remedy = explain(error, repo_id, api.endpoint)
            pause, wait = next(pauses, None), asked_wait(cause)
            if pause is None or wait > LONGEST_WAIT or not is_passing(cause):
                raise PushError(
                    f"could not push to {repo_id}: {reason}. Nothing local is lost; a push is one commit, so "
                    f"{repo_id} is as it was or complete. {remedy}, then run again: {again}"
                ) from error
            logger.warning("%s; trying again in %.0f s", reason, max(pause, wait))
            time.sleep(max(pause, wait))


def is_repo_id(name: str) -> bool:
    """Whether a name is `org/name` as the Hub takes it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def find_base(api: HfApi, base: str) -> None:
    """Look for the adapter's base on the Hub.

    Raises:
        PushError: it is not there.
    """
    try:
        api.model_info(base)
    except RepositoryNotFoundError as error:
        if status_of(error) != 404:
            raise
        raise PushError(
            f"{base}, the adapter's base, is not on the Hub; nothing was pushed. Push it first, name another "
            "with --base-model org/name, or leave the adapter out with --no-adapter"
        ) from error


def open_repository(api: HfApi, repo_id: str, revision: str | None, private: bool) -> ModelInfo:
    """What a branch of a repository holds; either is made if it is not there.

    Raises:
        PushError: the repository is public, and was to be private.
    """
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if status_of(error) != 404:  # the Hub tells strangers nothing, not even that there is nothing
            raise
        api.create_repo(repo_id, private=private or None)
        info = api.model_info(repo_id)
    if private and not info.private:
        raise PushError(
            f"{repo_id} is public already, and --private was asked for; nothing was pushed. Make it private "
            "in its settings on the Hub, choose another name, or leave out --private"
        )
    if revision is None:
        return info
    try:
        return api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision)
        return api.model_info(repo_id, revision=revision)


def commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    revision: str | None,
    private: bool,
    again: str,
    kept: tuple[str, ...] = (),
) -> Pushed:
    """Upload files in one commit, which also deletes what an earlier push left there, but for what is kept.

    Each attempt looks at the repository anew: what is there already is not uploaded again, and a commit whose
    answer was lost is found.
    """
    heads: list[str | None] = []
    deleted: set[str] = set()

    def attempt() -> Pushed:
        info = open_repository(api, repo_id, revision, private)
        heads.append(info.sha)
        there = [sibling.rfilename for sibling in info.siblings or []]
        outdated = [name for name in there if name not in {*files, *kept} and is_outdated(name)]
        deleted.update(outdated)
        # Not `upload_folder`: with hf_xet it makes several commits of one folder.
        done = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in outdated),
            ],
            commit_message="Upload model",
            revision=revision,
            parent_commit=info.sha,
        )
        return Pushed(done.commit_url, done.oid, tuple(files), tuple(sorted(deleted)), done.oid != heads[0])

    return patiently(attempt, api, repo_id, again)


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    adapter_repo: str | None = None,
    base_model: str | None = None,
    adapter: bool = True,
    card: bool = True,
) -> Pushed:
    """Push a model folder to the Hub, in one commit; pushing it again goes on where it failed.

    What an earlier push wrote there and this one does not, is deleted; all else there stays.

    Args:
        folder: as training saves it (`RUN/model`), or an export of it: configuration, weights, image
            processor, shipped code; with them go card, metrics, arguments, pictures (`released_files`), and
            what Inference Endpoints run (`endpoint_files`).
        repo_id: `org/name`; made if it is not there.
        private: make it private; a repository that is public already is refused.
        revision: branch to push to, made from main if it is not there; None: main.
        token: of the Hub; None: that of `hf auth login` or `HF_TOKEN`.
        adapter_repo: repository for the LoRA adapter in `folder/adapter`; None: a folder of `repo_id`.
        base_model: Hub id of what the adapter was trained on; None: as it was recorded.
        adapter: False leaves the adapter out.
        card: False leaves the card (README.md) out; one that is on the Hub stays there as it is.

    Raises:
        FileNotFoundError, ValueError: the folder is no whole model, has no card, or the adapter's base is not
            on the Hub.
        PushError: the Hub refused, or could not be reached; nothing local is changed in any case.
    """
    folder = Path(folder)
    for name in (repo_id, adapter_repo):
        if name is not None and not is_repo_id(name):
            raise ValueError(f"{name!r} is no name of a repository on the Hub: pass org/name")
    if adapter_repo == repo_id:
        raise ValueError(f"the adapter cannot lie beside merged weights: not both in {repo_id}")
    flags = {"--revision": revision, "--adapter-repo": adapter_repo, "--base-model": base_model}
    words = ["fer", "push", str(folder), repo_id, *(["--private"] if private else [])]
    words += [word for flag, value in flags.items() if value for word in (flag, value)]
    words += [*([] if adapter else ["--no-adapter"]), *([] if card else ["--no-card"])]
    again = shlex.join(words)

    check_model(folder)
    released = released_files(folder)
    if not card:
        released.pop(CARD, None)
    elif CARD not in released:
        raise FileNotFoundError(
            f"{folder} has no card ({CARD}), without which nobody knows what it is for and what may be done "
            f"with it: run `fer card {folder}` (for an export: that of its model, and export again), or pass "
            "--no-card"
        )
    api = HfApi(token=token)
    records = {name: public(released[name]) for name in RECORDS if name in released}
    files: dict[str, Path | bytes] = {**endpoint_files(folder), **released, **records}
    own: dict[str, Path | bytes] = {}
    if adapter and (folder / ADAPTER).is_dir():
        base = adapter_base(folder, released, base_model)
        own = adapter_files(folder, base, repo_id, adapter_repo, revision)
        patiently(lambda: find_base(api, base), api, repo_id, again)
    elif adapter_repo:
        raise FileNotFoundError(
            f"{folder} has no adapter to push to {adapter_repo}: leave out --adapter-repo"
        )
    if not adapter_repo:
        files |= {f"{ADAPTER}/{name}": content for name, content in own.items()}
    pushed = commit(api, repo_id, files, revision, private, again, () if card else (CARD,))
    if not adapter_repo:
        return pushed
    second = commit(api, adapter_repo, own, revision, private, again)
    return replace(pushed, adapter=second)
