"""A Hub on loopback: real HTTP for the real client, one that fails where a test asks it to.

It speaks what `huggingface_hub` needs to push and pull with `HF_ENDPOINT`: who am I, create, info, branches,
tree, preupload, LFS batch and upload, commit, resolve. A commit is one step, as on the Hub. All is in memory.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import close_session, constants

TOKEN = "hf_of_the_tests"
NAMESPACES = ("tester", "org")
LARGE = (".safetensors", ".onnx", ".bin")
WAIT = 7  # seconds that a 429 asks for


class RefusedError(Exception):
    """An answer that is no success: status, the Hub's code for it, and words."""

    def __init__(self, status, words, code=None, **content):
        super().__init__(words)
        self.status, self.code, self.content = status, code, {"error": words, **content}


def require(there, *refusal, **content):
    if not there:
        raise RefusedError(*refusal, **content)


@dataclass(frozen=True)
class Stored:
    """One file of a commit."""

    data: bytes
    large: bool = False

    @property
    def blob(self):
        """Id of the file in git; of a large file, that of its pointer is made from its hash alone."""
        content = self.sha256.encode() if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    def described(self):
        """What tree and info say of it."""
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": 134}
        return {"size": len(self.data), "oid": self.blob, "blobId": self.blob} | (
            {"lfs": lfs} if self.large else {}
        )


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, Stored]


@dataclass
class Repository:
    """Commits by their id, branches by their name, large files by their hash whether committed or not."""

    private: bool
    history: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)

    def add(self, branch, title, files):
        parent = self.branches.get(branch)
        words = json.dumps(
            [parent, title, {name: file.blob for name, file in files.items()}, len(self.history)]
        )
        sha = hashlib.sha1(words.encode()).hexdigest()
        self.history[sha] = Commit(sha, parent, title, files)
        self.branches[branch] = sha
        return sha

    def at(self, revision):
        sha = self.branches.get(revision, revision)
        require(sha in self.history, 404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.history[sha]


@dataclass
class Hub:
    """What a test sees of the server.

    Args:
        url: endpoint.
        environment: variables with which a clean process takes this for the Hub.
        repositories: by name, `datasets/` and `spaces/` before those of other kinds.
        requests: method and path of every request so far.
    """

    url: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    faults: Iterator = field(default_factory=lambda: itertools.repeat(None))

    def files(self, repo_id, revision="main"):
        """Contents by path."""
        return {name: file.data for name, file in self.repositories[repo_id].at(revision).files.items()}

    def commits(self, repo_id, revision="main"):
        """Commits of a branch, the oldest first; that of the repository's creation is the first."""
        found, repository = [], self.repositories[repo_id]
        sha = repository.at(revision).sha
        while sha:
            found.insert(0, repository.history[sha])
            sha = found[0].parent
        return found

    def fail(self, n, what, times=1):
        """Let the `n`-th request from now fail, counted from 1, and those after it up to `times` (None: all).

        `what`: a status to answer with; "drop", the connection ends and nothing was done; or "truncate", it
        was done, and half of the answer comes.
        """
        failing = itertools.repeat(what) if times is None else itertools.repeat(what, times)
        self.faults = itertools.chain(itertools.repeat(None, n - 1), failing, itertools.repeat(None))

    def mend(self):
        """No more failures."""
        self.faults = itertools.repeat(None)

    def count(self, method, pattern=""):
        """Requests so far whose path matches."""
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)

    # -- requests: each takes the match of its path, the query and the body, and returns what is sent as JSON

    def repository(self, found):
        name = unquote(found["repo"])
        kind = found.groupdict().get("kind") or "models"
        key = name if kind == "models" else f"{kind}/{name}"
        require(key in self.repositories, 404, "Repository not found", "RepoNotFound")
        return self.repositories[key]

    def who_am_i(self, found, query, body):
        return {"type": "user", "name": NAMESPACES[0], "orgs": [{"name": n} for n in NAMESPACES[1:]]}

    def create(self, found, query, body):
        asked = json.loads(body)
        owner = asked.get("organization") or NAMESPACES[0]
        require(owner in NAMESPACES, 403, f"You don't have the rights to create a model under {owner}")
        kind = asked.get("type") or "model"
        key = f"{owner}/{asked['name']}" if kind == "model" else f"{kind}s/{owner}/{asked['name']}"
        url = f"{self.url}/{key}"
        require(key not in self.repositories, 409, "You already created this repo", url=url)
        repository = Repository(private=asked.get("visibility") == "private" or asked.get("private") is True)
        repository.add("main", "initial commit", {".gitattributes": Stored(b"*.safetensors filter=lfs\n")})
        self.repositories[key] = repository
        return {"url": url}

    def info(self, found, query, body):
        repository = self.repository(found)
        commit = repository.at(unquote(found["rev"] or "main"))
        metadata = {}
        if "README.md" in commit.files:
            text = commit.files["README.md"].data.decode()
            if front := re.match(r"---\n(.*?)\n---\n", text, re.DOTALL):
                metadata = yaml.safe_load(front[1]) or {}
        return {
            "id": unquote(found["repo"]),
            "sha": commit.sha,
            "private": repository.private,
            "tags": metadata.get("tags") or [],
            "cardData": metadata,
            "pipeline_tag": metadata.get("pipeline_tag"),
            "library_name": metadata.get("library_name"),
            "siblings": [
                {"rfilename": name, **(file.described() if "blobs" in query else {})}
                for name, file in sorted(commit.files.items())
            ],
        }

    def refs(self, found, query, body):
        branches = self.repository(found).branches
        refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in branches.items()]
        return {"branches": refs, "tags": [], "converts": []}

    def log(self, found, query, body):
        repository, commits = self.repository(found), []
        sha = repository.at(unquote(found["rev"])).sha
        while sha:
            commit = repository.history[sha]
            row = {"id": sha, "title": commit.title, "message": "", "authors": []}
            commits.append({**row, "date": "2024-01-01T00:00:00.000Z"})
            sha = commit.parent
        return commits

    def branch(self, found, query, body):
        repository, name = self.repository(found), unquote(found["rev"])
        require(name not in repository.branches, 409, f"Branch {name} exists already")
        start = (json.loads(body) if body else {}).get("startingPoint", "main")
        repository.branches[name] = repository.at(start).sha
        return {}

    def tree(self, found, query, body):
        files = self.repository(found).at(unquote(found["rev"])).files
        root = f"{unquote(found['path'])}/" if found["path"] else ""
        below = {name: file for name, file in files.items() if name.startswith(root)}
        require(below, 404, f"{root} does not exist", "EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        folders = {
            f"{root}{'/'.join(parts[:depth])}"
            for parts in (name.removeprefix(root).split("/") for name in below)
            for depth in range(1, len(parts))
            if recursive or depth == 1
        }
        shown = {
            name: file for name, file in below.items() if recursive or "/" not in name.removeprefix(root)
        }
        return [
            {"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)
        ] + [{"type": "file", "path": name, **file.described()} for name, file in sorted(shown.items())]

    def paths(self, found, query, body):
        files = self.repository(found).at(unquote(found["rev"])).files
        asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        return [{"type": "file", "path": name, **files[name].described()} for name in asked if name in files]

    def check_card(self, found, query, body):
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        if not front:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            yaml.safe_load(front[1])
        except yaml.YAMLError as error:
            raise RefusedError(400, "Invalid YAML", errors=[{"message": str(error)}], warnings=[]) from error
        return {"errors": [], "warnings": []}

    def preupload(self, found, query, body):
        there = self.repository(found).at(unquote(found["rev"])).files
        answer = []
        for asked in json.loads(body)["files"]:
            known = there.get(asked["path"])
            large = asked["path"].endswith(LARGE) or asked["size"] > 10_000_000
            oid = None if known is None else known.sha256 if known.large else known.blob
            mode = "lfs" if large else "regular"
            answer.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def batch(self, found, query, body):
        repository, objects = self.repository(found), []
        place = f"{self.url}/large/{found['repo']}"
        for asked in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{place}/{asked['oid']}"},
                "verify": {"href": f"{place}/{asked['oid']}/verify"},
            }
            known = asked["oid"] in repository.large
            objects.append(
                {"oid": asked["oid"], "size": asked["size"]} | ({} if known else {"actions": actions})
            )
        return {"transfer": "basic", "objects": objects}

    def upload(self, found, query, body):
        require(
            hashlib.sha256(body).hexdigest() == found["oid"], 400, "The content is not what was announced"
        )
        self.repository(found).large[found["oid"]] = body

    def verify(self, found, query, body):
        known = self.repository(found).large.get(found["oid"])
        require(known is not None and len(known) == json.loads(body)["size"], 422, "The upload is not whole")
        return {}

    def commit(self, found, query, body):
        repository, branch = self.repository(found), unquote(found["rev"])
        require(branch in repository.branches, 404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = repository.branches[branch]
        moved = header.get("parentCommit", parent) != parent
        require(not moved, 412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.history[parent].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                require(value["oid"] in repository.large, 400, f"No content of {value['path']} was uploaded")
                files[value["path"]] = Stored(repository.large[value["oid"]], large=True)
            elif line["key"] == "deletedFile":
                gone = files.pop(value["path"], None)
                require(gone, 404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                require(line["key"] == "header", 400, f"Unknown operation {line['key']}")
        sha = repository.add(branch, header["summary"], files)
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.url}/{unquote(found['repo'])}/commit/{sha}",
            "hookOutput": "",
        }


REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO}"
KIND = r"/(?:(?P<kind>datasets|spaces)/)?"
ROUTES = [
    ("GET", r"/api/whoami-v2", Hub.who_am_i),
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.check_card),
    ("GET", rf"{API}(?:/revision/(?P<rev>[^/]+))?", Hub.info),
    ("GET", rf"{API}/refs", Hub.refs),
    ("GET", rf"{API}/commits/(?P<rev>[^/]+)", Hub.log),
    ("GET", rf"{API}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", Hub.tree),
    ("POST", rf"{API}/paths-info/(?P<rev>[^/]+)", Hub.paths),
    ("POST", rf"{API}/branch/(?P<rev>[^/]+)", Hub.branch),
    ("POST", rf"{API}/preupload/(?P<rev>[^/]+)", Hub.preupload),
    ("POST", rf"{API}/commit/(?P<rev>[^/]+)", Hub.commit),
    ("POST", rf"{KIND}{REPO}\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", rf"/large/{REPO}/(?P<oid>[0-9a-f]+)", Hub.upload),
    ("POST", rf"/large/{REPO}/(?P<oid>[0-9a-f]+)/verify", Hub.verify),
]
RESOLVE = rf"{KIND}{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *arguments):
        pass

    def do(self):
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
            fault = next(self.hub.faults)
        if fault == "drop":
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if isinstance(fault, int):
            headers = {"RateLimit": f'"api";r=0;t={WAIT}'} if fault == 429 else {}
            self.answer(fault, json.dumps({"error": "asked to fail"}).encode(), headers)
            return
        try:
            with self.hub.lock:
                status, content, headers = self.respond(body)
        except RefusedError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            status, content = error.status, json.dumps(error.content).encode()
        self.answer(status, content, headers, fault == "truncate")

    do_GET = do_POST = do_PUT = do_HEAD = do  # noqa: N815, the names that http.server calls

    def answer(self, status, content, headers, truncated=False):
        lines = {"Content-Type": "application/json", "Content-Length": len(content), **headers}
        head = f"HTTP/1.1 {status} {self.responses.get(status, ['Asked'])[0]}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        sent = content if self.command != "HEAD" else b""
        if truncated and sent:
            sent = sent[: len(sent) // 2]
        elif truncated:
            head = head[: len(head) // 2]
        self.wfile.write(head.encode() + (b"" if truncated and not sent else b"\r\n") + sent)
        self.close_connection = self.close_connection or truncated

    def respond(self, body):
        split = urlsplit(self.path)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command in {"GET", "HEAD"} and (found := re.fullmatch(RESOLVE, split.path)):
            self.may_see(found, known)
            return self.resolve(found)
        for method, pattern, handle in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, split.path)):
                if handle is not Hub.upload:  # its address is a secret, as that of a bucket
                    if method == "GET" and "repo" in found.groupdict():
                        self.may_see(found, known)
                    else:
                        require(known, 401, "Invalid username or password.")
                answer = handle(self.hub, found, parse_qs(split.query), body)
                return 200, b"" if answer is None else json.dumps(answer).encode(), {}
        raise RefusedError(404, f"This server knows no {self.command} {self.path}")

    def may_see(self, found, known):
        """A stranger cannot tell a private repository from none; the client takes either 401 for none."""
        stranger = (401, "Invalid username or password.", "RepoNotFound")
        try:
            hidden = self.hub.repository(found).private
        except RefusedError:
            require(known, *stranger)
            raise
        require(known or not hidden, *stranger)

    def resolve(self, found):
        commit = self.hub.repository(found).at(unquote(found["rev"]))
        path = unquote(found["path"])
        if path not in commit.files:
            refusal = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, b"", {"X-Repo-Commit": commit.sha, **refusal}
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.blob}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), int(asked[2] or len(file.data) - 1)
            require(start < len(file.data), 416, "Range not satisfiable")
            headers["Content-Range"] = f"bytes {start}-{end}/{len(file.data)}"
            return 206, file.data[start : end + 1], headers
        return 200, file.data, headers


@contextlib.contextmanager
def hub_server(tmp_path: Path) -> Iterator[Hub]:
    """Serve an empty Hub; caches of processes with its `environment` lie in `tmp_path`."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        hub.environment = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def taken_for_the_hub(hub: Hub, monkeypatch) -> Iterator[None]:
    """Let the client in this process, which has read its environment already, talk to a server."""
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # one that was opened with another environment
        yield
    close_session()
