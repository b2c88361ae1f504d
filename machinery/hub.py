"""Files of the Hugging Face hub: from the cache without any request, else downloaded.

Read fetch. HF_HOME is the cache's folder, HF_ENDPOINT selects a mirror, HF_TOKEN opens gated
models, HTTPS_PROXY and its relatives name a proxy, and HF_HUB_OFFLINE=1 forbids requests.
"""

import fnmatch
import functools
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from machinery.config import UserError, load_table, one_line
from machinery.files import read_json

REPLY_SECONDS = 10  # for the hub to begin a reply

CURES = load_table("hub_errors")  # {pattern of an error of the client: the cure}


def fetch(name: str, patterns: list[str], needed: list[str],
          check: Callable[[list[str]], None] = lambda names: None) -> Path:
    """The folder with the files of a hub repository that match `patterns`; a path's own folder.

    If the cache has them, no request is made, so the hub may be down. needed: "a|b" for each file
    without which a cached copy is incomplete; files that an index lists are needed, too. check: is
    called with the names of all files before they are downloaded. Raises UserError.
    """
    if os.path.exists(name):
        return Path(name)
    started = False
    try:
        folder = cached(name, patterns, needed)
        if folder:
            return folder
        reason = out_of_reach()
        if reason:
            raise LocalEntryNotFoundError(reason)
        # some of the client's requests have no time limit: a silent hub would be waited for forever
        get_session().event_hooks["request"].append(limit_time)
        files = HfApi().model_info(name, timeout=REPLY_SECONDS).siblings
        check([file.rfilename for file in files])
        started = True
        return Path(snapshot_download(name, allow_patterns=patterns))
    except UserError:
        raise
    except Exception as error:  # the libraries of the client raise many kinds
        what = "could not be downloaded"
        cure = "check the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror"
        if started:
            what = "its download was interrupted"
            cure = "run the same command again: it continues with the files that are missing"
        causes = "".join(f"{type(cause).__name__} {cause}" for cause in chain(error))
        cure = next((text for key, text in CURES.items() if re.search(key, causes)), cure)
        raise UserError(f"{name!r} is not a path here, and {what}: {type(error).__name__}: "
                        f"{one_line(error)[:200]}: {cure}") from error


@functools.cache
def out_of_reach() -> str | None:
    """Why the hub cannot be asked, or None. Its client would retry for minutes."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    proxied = urllib.request.getproxies().keys() & {hub.scheme, "all"}
    if proxied and not urllib.request.proxy_bypass(hub.hostname):
        return None  # only the client can ask through a proxy
    try:
        socket.create_connection((hub.hostname, hub.port or hub.scheme), timeout=3).close()
    except OSError:
        return f"the hub does not answer ({constants.ENDPOINT})"
    return None


def cached(name: str, patterns: list[str], needed: list[str]) -> Path | None:
    """The folder of a repository in the cache, if it is complete."""
    try:  # the client knows the list of files if it has downloaded them, and compares
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # transformers fetches single files, without such a list
    there = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.exists()]
    for index in folder.glob("*.safetensors.index.json"):
        listed = set(read_json(index)["weight_map"].values())
        needed = [*needed, *(file for file in listed if matches(file, patterns))]
    complete = all(any(matches(file, choice.split("|")) for file in there) for choice in needed)
    return folder if complete else None


def matches(file: str, patterns: list[str]) -> bool:
    """Does the name of a file match one of the patterns?"""
    return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def limit_time(request) -> None:
    """Give a request of the client the time limits that it lacks."""
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {key: value or REPLY_SECONDS for key, value in limits.items()}


def chain(error: BaseException | None) -> list[BaseException]:
    """An error and what caused it."""
    return [error, *chain(error.__cause__ or error.__context__)] if error else []
