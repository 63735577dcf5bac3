"""
Serve a local Hub: the protocol of the `huggingface_hub` client, served from a folder by the standard library. All
tests that push to the Hub or download from it use this server.

It runs in the test's process, or in a separate process that can be killed:

    with Hub() as hub:
        HfApi(endpoint=hub.address, token="hf_write").create_repo("someone/toy")
        run("train_reftr.py", ..., **hub.environment("hf_write", home))

    with HubProcess(folder, faults=[("die", "PUT")]) as hub: ...

The content of large (LFS) files has a second address on the same server, to which clients must not send a token.
Multipart uploads and Xet are not supported: `HF_HUB_DISABLE_XET=1` must be set before the client is imported, and
`environment` sets it.
"""

import argparse
import base64
import hashlib
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit


KINDS = ("model", "dataset", "space")
# suffixes of files that are stored as large files regardless of their size, as in the Hub's initial .gitattributes
LARGE = (".safetensors", ".bin", ".pt", ".onnx", ".parquet", ".arrow", ".npz", ".zip", ".png", ".jpg", ".jpeg")
ATTRIBUTES = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE).encode()
BLOCK = 1 << 16
NO_USER = "Invalid username or password."


@dataclass
class Token:
    """The user and the role of a token."""

    user: str
    role: str = "write"


TOKENS = {"hf_write": Token("someone"), "hf_read": Token("someone", "read"), "hf_other": Token("other")}


@dataclass
class Request:
    """A received request; `large` if it was sent to the address of large files."""

    method: str
    path: str
    headers: Mapping[str, str]
    large: bool

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None


@dataclass
class Fault:
    """
    A failure of the next `times` requests whose "METHOD path" matches the pattern.

    `kind`:
        - "status": the request is answered with the status `value` and not served;
        - "slow": the request is served after `value` seconds;
        - "cut": the connection ends in the middle of the request's body, or of the response if there is no body;
        - "mute": the request is served, but the connection ends before the response;
        - "corrupt": a byte of a large file changes during the upload (the Hub refuses the upload);
        - "lose": a large file is accepted, but missing when a commit names it (the Hub refuses the commit);
        - "die": the server's process is killed in the middle of the request's body. For "WRITE path" of a file of the
          server's folder: after the temporary file is written and before it is renamed.
    """

    kind: str
    pattern: str
    times: int = 1
    value: float = 503
    happened: int = 0


class Refusal(Exception):
    """An error response; the client chooses its exception by the `code`."""

    def __init__(self, status: int, message: str, code: str | None = None, **values):
        super().__init__(message)
        self.status, self.values = status, {"error": message, **values}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class File:
    """A file of a commit: `oid` is its git id (of its pointer if large), `sha256` that of its content if large."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def lfs(self) -> dict | None:
        size = len(pointer(self.sha256, self.size)) if self.sha256 else 0
        return {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": size} if size else None

    def describe(self, path: str) -> dict:
        return {"type": "file", "path": path, "oid": self.oid, "size": self.size, "lfs": self.lfs}


@dataclass
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, File]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass
class Repository:
    """A repository and its folder, with `repository.json`, `small/OID` and `large/SHA256`."""

    folder: Path
    kind: str
    id: str
    private: bool = False
    sdk: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Repository":
        values = json.loads(path.read_text())
        for commit in values["commits"]:
            commit["files"] = {name: File(**file) for name, file in commit["files"].items()}
        values["commits"] = [Commit(**commit) for commit in values["commits"]]
        return cls(folder=path.parent, **values)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def address(self) -> str:
        """Return the path of its pages below the Hub's address."""
        return ("" if self.kind == "model" else f"/{self.kind}s") + f"/{self.id}"

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch, a tag or a commit id."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def content(self, file: File) -> Path:
        return self.folder / "large" / file.sha256 if file.sha256 else self.folder / "small" / file.oid


ROUTES = []
REPOSITORY = r"(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>dataset|space)s/)?(?P<id>[^/]+/[^/]+)"


def route(method: str, path: str):
    """Register a function for the requests with this method and a path that matches the pattern."""

    def add(function):
        ROUTES.append((method, re.compile(path), function))
        return function

    return add


class Handler(http.server.BaseHTTPRequestHandler):
    """Handle a connection. Methods with a `route` serve requests and return the value of the JSON response."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    hub: "Hub"

    # requests and responses

    def serve(self):
        self.line = f"{self.command} {self.path}"
        large = self.headers.get("Host") == urlsplit(self.hub.large_address).netloc
        self.asked = Request(self.command, self.path, self.headers, large)
        self.hub.requests.append(self.asked)
        self.blocks = self.read_blocks()
        try:
            if fault := self.hub.due(self.line, "slow"):
                time.sleep(fault.value)
            try:
                if fault := self.hub.due(self.line, "status"):
                    raise Refusal(int(fault.value), "The Hub is out of order.")
                value = self.find_route()
            except Refusal as refusal:
                self.answer(refusal.status, refusal.values, refusal.headers)
            else:
                if value is not None:
                    self.answer(200, value)
        except ConnectionError:  # caused by the client or by a fault
            self.close_connection = True
        except Exception as error:
            self.hub.errors.append(error)
            raise

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def find_route(self):
        path = urlsplit(self.path).path
        for method, pattern, function in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := pattern.fullmatch(path)):
                arguments = {name: value and unquote(value) for name, value in match.groupdict().items()}
                if "kind" in arguments:
                    arguments["kind"] = arguments["kind"] or "model"
                return function(self, **arguments)
        raise Refusal(404, f"This Hub does not serve {self.command} {path}")

    def read_blocks(self) -> Iterator[bytes]:
        """Yield the body of the request in blocks. An incomplete body raises, so that it is never accepted."""
        left = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.due(self.line, "cut", "die") if left else None
        half = left // 2 if fault else 0
        while left > half:
            size = min(left - half, BLOCK)
            block = self.rfile.read(size)
            if len(block) < size:
                raise ConnectionResetError("the client ended in the middle")
            left -= size
            yield block
        if fault:
            self.end(fault)

    def end(self, fault: Fault):
        if fault.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("a fault that was asked for")

    def answer(self, status: int, value=None, headers: dict | None = None, path: Path | None = None):
        """Respond with JSON, or with the file at `path` or its requested range."""
        for _ in self.blocks:
            pass
        if fault := self.hub.due(self.line, "mute"):
            self.end(fault)
        headers = {"Content-Type": "application/json", **(headers or {})}
        start, content = 0, b"" if value is None else json.dumps(value).encode()
        size = len(content)
        if path is not None:
            size = path.stat().st_size
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                start, stop = int(match[1]), min(int(match[2] or size - 1) + 1, size)
                if start >= size:
                    return self.answer(416, None, {"Content-Range": f"bytes */{size}"})
                status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
                size = stop - start
        self.send_response(status)
        for name, text in {**headers, "Content-Length": size}.items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if path is not None:
            with path.open("rb") as file:
                file.seek(start)
                content = file.read(size)
        fault = self.hub.due(self.line, "cut") if self.command == "GET" else None
        self.wfile.write(content[: len(content) // 2] if fault else content)
        if fault:
            self.wfile.flush()
            self.end(fault)
        return None

    def log_message(self, *_):
        pass

    def json(self):
        return json.loads(b"".join(self.blocks))

    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}

    # permissions

    def user(self) -> Token | None:
        token = self.asked.token
        if token is not None and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def check_writer(self, owner: str):
        user = self.user()
        if user is None:
            # the client recognizes this 401 by an https address, or by the code
            raise Refusal(401, NO_USER, "RepoNotFound")
        if user.role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if user.user != owner:
            raise Refusal(403, f"You don't have the rights to write under the namespace {owner!r}.")

    def repository(self, kind: str, id: str, write: bool = False) -> Repository:
        user, repository = self.user(), self.hub.repositories.get((kind, id))
        if repository is None or (repository.private and (user is None or user.user != repository.owner)):
            if user is None:
                raise Refusal(401, NO_USER, "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self.check_writer(repository.owner)
        return repository

    # routes

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        """`HfApi.whoami`"""
        user = self.user()
        if user is None:
            raise Refusal(401, NO_USER)
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
        return {"type": "user", "id": user.user, "name": user.user, "fullname": user.user, "orgs": [], "auth": access}

    @route("POST", "/api/repos/create")
    def create(self):
        """`HfApi.create_repo`"""
        values = self.json()
        kind = values.get("type") or "model"
        owner = values.get("organization") or getattr(self.user(), "user", None)
        self.check_writer(owner)
        id = f"{owner}/{values['name']}"
        with self.hub.lock:
            repository = self.hub.repositories.get((kind, id))
            if repository is not None:
                url = self.hub.address + repository.address
                raise Refusal(409, f"You already created this {kind} repo", url=url)
            repository = self.hub.create(kind, id, values.get("visibility") == "private", values.get("sdk"))
        return {"url": self.hub.address + repository.address, "name": id, "id": id}

    @route("GET", rf"/api/{REPOSITORY}/auth-check(?P<write>/write)?")
    def auth_check(self, kind, id, write):
        """`HfApi.auth_check`"""
        self.repository(kind, id, write=bool(write))
        return {}

    @route("POST", "/api/validate-yaml")
    def validate_card(self):
        """`HfApi.upload_folder` and `create_commit` of a README.md: check only the delimiters of its metadata"""
        content = self.json()["content"]
        if not content.startswith("---\n"):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        if not re.search(r"\n---\s*(\n|$)", content):
            raise Refusal(400, "Invalid metadata in README.md.", errors=[{"message": "metadata without an end"}])
        return {"errors": [], "warnings": []}

    @route("GET", rf"/api/{REPOSITORY}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, kind, id, revision):
        """`HfApi.repo_info`, `snapshot_download` of a branch, `pipeline(model=ID)`"""
        repository = self.repository(kind, id)
        commit = repository.at(revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query():
            for sibling, file in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": file.size, "blobId": file.oid, "lfs": file.lfs}
        values = {"id": id, "author": repository.owner, "sha": commit.oid, "private": repository.private}
        values |= {"siblings": siblings, "gated": False, "disabled": False, "likes": 0, "downloads": 0, "tags": []}
        if repository.sdk:
            values["sdk"] = repository.sdk
        if "README.md" in commit.files:
            card = repository.content(commit.files["README.md"]).read_text().split("\n---", 1)[0]
            values |= re.findall(r"^(pipeline_tag|library_name): *(\S+)", card, re.MULTILINE)
        return values

    @route("GET", rf"/api/{REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, kind, id, revision, folder):
        """`HfApi.list_repo_tree`, `list_repo_files`, `snapshot_download`"""
        files = self.repository(kind, id).at(revision).files
        start = f"{folder}/" if folder else ""
        deep = self.query().get("recursive", "").lower() == "true"
        found = {}
        for path, file in sorted(files.items()):
            if path.startswith(start):
                steps = path[len(start) :].split("/")
                for depth in range(1, len(steps) if deep else min(2, len(steps))):
                    name = start + "/".join(steps[:depth])
                    found[name] = {"type": "directory", "path": name, "oid": git_oid(name.encode()), "size": 0}
                if deep or len(steps) == 1:
                    found[path] = file.describe(path)
        if folder and not found:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        begin = int(self.query().get("cursor", 0))
        end = begin + self.hub.page_size
        following = f"{self.hub.address}{urlsplit(self.path).path}?recursive={deep}&cursor={end}"
        headers = {"Link": f'<{following}>; rel="next"'} if end < len(found) else {}
        self.answer(200, list(found.values())[begin:end], headers)

    @route("POST", rf"/api/{REPOSITORY}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind, id, revision):
        """`HfApi.get_paths_info`, and copies of a commit"""
        files = self.repository(kind, id).at(revision).files
        paths = parse_qs(b"".join(self.blocks).decode()).get("paths", [])
        found = [files[path].describe(path) for path in paths if path in files]
        folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
        return found + [{"type": "directory", "path": path, "oid": git_oid(path.encode())} for path in folders]

    @route("GET", rf"/api/{REPOSITORY}/refs")
    def refs(self, kind, id):
        """`HfApi.list_repo_refs`"""
        repository = self.repository(kind, id)

        def describe(group, refs):
            return [{"name": name, "ref": f"refs/{group}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        branches, tags = describe("heads", repository.branches), describe("tags", repository.tags)
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    @route("POST", rf"/api/{REPOSITORY}/(?P<group>branch|tag)/(?P<name>[^/]+)")
    def add_ref(self, kind, id, group, name):
        """`HfApi.create_branch` (its start is in the body), `create_tag` (its name is in the body)"""
        repository, values = self.repository(kind, id, write=True), self.json()
        refs, start = repository.branches, values.get("startingPoint") or "main"
        if group == "tag":
            refs, start, name = repository.tags, name, values["tag"]
        with self.hub.lock:
            if name in refs:
                raise Refusal(409, f"The {group} {name!r} exists already")
            refs[name] = repository.at(start).oid
            self.hub.save(repository)
        return {}

    @route("POST", r"/api/(?P<kind>space)s/(?P<id>[^/]+/[^/]+)/variables")
    def add_variable(self, kind, id):
        """`HfApi.add_space_variable`"""
        repository, values = self.repository(kind, id, write=True), self.json()
        with self.hub.lock:
            repository.variables[values["key"]] = values["value"]
            self.hub.save(repository)
        return {name: {"key": name, "value": value} for name, value in repository.variables.items()}

    @route("POST", rf"/api/{REPOSITORY}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind, id, revision):
        """`HfApi.preupload_lfs_files` and `create_commit`: which files are large, and which already exist"""
        files = self.repository(kind, id, write=True).at(revision).files
        answers = []
        for item in self.json()["files"]:
            path, there = item["path"], files.get(item["path"])
            large = item["size"] > self.hub.large_size or path.lower().endswith(LARGE)
            large = large or b"\0" in base64.b64decode(item["sample"])
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({"path": path, **mode, "oid": (there.sha256 or there.oid) if there else None})
        return {"files": answers}

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/batch")
    def batch(self, kind, id):
        """`HfApi.preupload_lfs_files` and `create_commit`: the upload addresses of missing large files"""
        repository = self.repository(kind, id, write=True)
        answers = []
        for item in self.json()["objects"]:
            answers.append(answer := {"oid": item["oid"], "size": item["size"]})
            if item["size"] > self.hub.max_size:
                answer["error"] = {"code": 422, "message": f"larger than {self.hub.max_size} bytes"}
            elif not (repository.folder / "large" / item["oid"]).exists():
                put = f"{self.hub.large_address}/{kind}s/{id}/{item['oid']}?size={item['size']}"
                verify = f"{self.hub.address}{repository.address}.git/info/lfs/objects/verify"
                answer["actions"] = {"upload": {"href": put}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": answers}

    @route("PUT", rf"/{REPOSITORY}/(?P<sha256>[0-9a-f]{{64}})")
    def put(self, kind, id, sha256):
        """`HfApi.preupload_lfs_files` and `create_commit`: the content of a large file, whose address is a secret"""
        repository = self.hub.repositories[kind, id]
        corrupt = self.hub.due(self.line, "corrupt")
        size, digest = 0, hashlib.sha256()
        with self.hub.writing(repository.folder / "large" / sha256) as file:
            for block in self.blocks:
                if corrupt:
                    block, corrupt = bytes([block[0] ^ 1]) + block[1:], None
                size += len(block)
                digest.update(block)
                file.write(block)
            if (size, digest.hexdigest()) != (int(self.query()["size"]), sha256):
                raise Refusal(400, "BadDigest: the content is not what was announced")
        if self.hub.due(self.line, "lose"):
            self.hub.lost.add(sha256)
            (repository.folder / "large" / sha256).unlink()
        self.answer(200, None, {"ETag": f'"{sha256}"'})

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/verify")
    def verify(self, kind, id):
        """`HfApi.preupload_lfs_files` and `create_commit`: whether a large file has arrived"""
        repository, values = self.repository(kind, id, write=True), self.json()
        if values["oid"] not in self.hub.lost and not (repository.folder / "large" / values["oid"]).exists():
            raise Refusal(404, "Object does not exist")
        return {}

    @route("POST", rf"/api/{REPOSITORY}/commit/(?P<revision>[^/]+)")
    def commit(self, kind, id, revision):
        """`HfApi.create_commit`, `upload_file`, `upload_folder`, `push_to_hub`"""
        repository = self.repository(kind, id, write=True)
        items = [json.loads(line) for line in b"".join(self.blocks).splitlines()]
        with self.hub.lock:
            oid = self.hub.commit(repository, items, revision)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.address}{repository.address}/commit/{oid}"}

    @route("GET", rf"{PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, kind, id, revision, path):
        """`hf_hub_download`, `file_exists`, `from_pretrained`: a small file, or the address of a large one"""
        repository = self.repository(kind, id)
        commit = repository.at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers |= headers
            raise refusal
        if file.sha256:
            headers |= {"X-Linked-Size": file.size, "X-Linked-ETag": f'"{file.sha256}"', "ETag": f'"{file.oid}"'}
            location = f"{self.hub.large_address}/{kind}s/{id}/{file.sha256}"
            self.answer(302, None, {**headers, "Location": location})
        else:
            headers |= {"ETag": f'"{file.oid}"', "Content-Type": "text/plain"}
            self.answer(200, None, headers, repository.content(file))

    @route("GET", rf"/{REPOSITORY}/(?P<sha256>[0-9a-f]{{64}})")
    def large(self, kind, id, sha256):
        """`hf_hub_download`, `from_pretrained`: the content of a large file, whose address is a secret"""
        path = self.hub.repositories[kind, id].folder / "large" / sha256
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{sha256}"', "Content-Type": "application/octet-stream"}
        self.answer(200, None, headers, path)


class Endpoint:
    """A server with an `address` for clients."""

    address: str

    def environment(self, token: str | None = None, home: str | os.PathLike | None = None) -> dict[str, str]:
        """Return the environment variables that make a command use this Hub, with its cache in `home`."""
        names = {"HF_ENDPOINT": self.address, "HF_TOKEN": token or "", "HF_HUB_DISABLE_XET": "1"}
        names |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if home is not None:
            names |= {"HF_HOME": str(home), "HF_HUB_CACHE": str(Path(home) / "hub")}
        return names

    def use(self, monkeypatch, token: str = ""):
        """
        Make the client of this process use this Hub, without a delay between its retries. The cache folder does not
        change: pass a `cache_dir`.
        """
        template = self.address + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": self.address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_TOKEN_PATH": os.devnull}
        for name, value in {**values, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", token)
        for module in ("utils._http", "file_download"):
            no_waiting = types.SimpleNamespace(sleep=lambda seconds: None)
            monkeypatch.setattr(f"huggingface_hub.{module}.time", no_waiting)


class Hub(Endpoint):
    """
    Run the server in threads of this process.

    Args:
        state (*optional*): the folder of the server's data, by default a temporary one. An existing one is reused.
        port (`int`, *optional*, defaults to 0): the port; 0 chooses a free one.
        tokens (*optional*): the valid tokens, `TOKENS` by default.
        large_size (`int`, *optional*, defaults to 10 MB): size above which every file is a large one.
        max_size (`int`, *optional*, defaults to 50 GB): size above which files are refused.
        page_size (`int`, *optional*, defaults to 1000): number of files per page of a list.

    `requests` are the received requests, `repositories` maps (kind, id) to repositories, and `errors` are exceptions
    of the server itself; the first one is raised at the end of the `with` block.
    """

    def __init__(
        self,
        state: str | os.PathLike | None = None,
        port: int = 0,
        tokens: dict[str, Token] | None = None,
        large_size: int = 10_000_000,
        max_size: int = 50_000_000_000,
        page_size: int = 1000,
    ):
        self.temporary = tempfile.TemporaryDirectory() if state is None else None
        self.state = Path(state or self.temporary.name)
        self.tokens, self.large_size, self.max_size, self.page_size = tokens or TOKENS, large_size, max_size, page_size
        self.lock = threading.RLock()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[Exception] = []
        self.lost: set[str] = set()
        self.names = itertools.count()
        shutil.rmtree(self.state / "aside", ignore_errors=True)  # unfinished files of a killed server
        (self.state / "aside").mkdir(parents=True)
        loaded = [Repository.load(path) for path in self.state.glob("*/*/*/repository.json")]
        self.repositories = {(repository.kind, repository.id): repository for repository in loaded}
        handler = type("HubHandler", (Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.large_address = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        if self.temporary is not None:
            self.temporary.cleanup()
        if self.errors:
            raise self.errors[0]

    # for tests

    def fault(self, kind: str, pattern: str, times: int = 1, **value) -> Fault:
        """Add a `Fault` and return it; its `happened` counts its occurrences."""
        if kind == "die":
            raise ValueError("A server in this process cannot die alone: use HubProcess.")
        self.faults.append(Fault(kind, pattern, times, **value))
        return self.faults[-1]

    def files(self, id: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision of a repository, path -> content."""
        repository = self.repositories[kind, id]
        return {path: repository.content(file).read_bytes() for path, file in repository.at(revision).files.items()}

    def head(self, id: str, kind: str = "model") -> str:
        """Return the id of the latest commit of the main branch."""
        return self.repositories[kind, id].branches["main"]

    # for the handler

    def due(self, line: str, *kinds: str) -> Fault | None:
        """Return a fault of one of these kinds that applies to a request, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.kind in kinds and fault.happened < fault.times and re.search(fault.pattern, line):
                    fault.happened += 1
                    return fault
        return None

    @contextmanager
    def writing(self, path: Path) -> Iterator[BinaryIO]:
        """Open a temporary file that is renamed when it is complete, so that a kill keeps the previous file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.state / "aside" / str(next(self.names))
        try:
            with aside.open("wb") as file:
                yield file
            if self.due(f"WRITE {path.relative_to(self.state)}", "die"):
                os.kill(os.getpid(), signal.SIGKILL)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def save(self, repository: Repository):
        values = asdict(repository)
        del values["folder"]
        with self.writing(repository.folder / "repository.json") as file:
            file.write(json.dumps(values).encode())

    def create(self, kind: str, id: str, private: bool, sdk: str | None) -> Repository:
        repository = Repository(self.state / f"{kind}s" / id, kind, id, private, sdk, branches={"main": ""})
        attributes = {"path": ".gitattributes", "content": base64.b64encode(ATTRIBUTES).decode()}
        first = [{"key": "header", "value": {"summary": "initial commit"}}, {"key": "file", "value": attributes}]
        self.commit(repository, first)
        self.repositories[kind, id] = repository
        return repository

    def commit(self, repository: Repository, items: list[dict], branch: str = "main") -> str:
        """
        Add a commit to a branch atomically: everything is checked first, and the new `repository.json` replaces the
        previous one in one step.
        """
        if branch not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, *operations = items
        if header["key"] != "header" or not header["value"].get("summary"):
            raise Refusal(400, "A commit begins with a header that has a summary")
        parent = repository.branches[branch]
        if not parent.startswith(header["value"].get("parentCommit") or ""):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.at(parent).files) if parent else {}
        for item in operations:
            key, value = item["key"], item["value"]
            path = value["path"].rstrip("/")
            if key == "file":
                content = base64.b64decode(value["content"], validate=True)
                if len(content) > self.large_size:
                    raise Refusal(400, f"Your push was rejected because {path} is no LFS file and large.")
                files[path] = File(git_oid(content), len(content))
                with self.writing(repository.content(files[path])) as file:
                    file.write(content)
            elif key == "lfsFile":
                there = repository.folder / "large" / value["oid"]
                if not there.exists() or value.get("size", there.stat().st_size) != there.stat().st_size:
                    raise Refusal(400, f"Your push was rejected because the LFS object of {path} does not exist.")
                size = there.stat().st_size
                files[path] = File(git_oid(pointer(value["oid"], size)), size, value["oid"])
            elif key in ("deletedFile", "deletedFolder"):
                gone = [path] if path in files else []
                if key == "deletedFolder":
                    gone = [name for name in files if name.startswith(f"{path}/")]
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
            else:
                raise Refusal(400, f"This Hub does not know {key!r} in a commit")
        message = header["value"]["summary"]
        oids = {path: file.oid for path, file in files.items()}
        oid = hashlib.sha1(json.dumps([parent, message, oids, len(repository.commits)]).encode()).hexdigest()
        branches = {**repository.branches, branch: oid}
        commits = [*repository.commits, Commit(oid, parent or None, message, files)]
        self.save(Repository(**{**vars(repository), "branches": branches, "commits": commits}))
        repository.commits, repository.branches = commits, branches  # in this order: a branch's commit must exist
        return oid


class HubProcess(Endpoint):
    """Run the server in a separate process on the folder `state`; `faults` are (kind, pattern, times, value)."""

    def __init__(self, state: str | os.PathLike, faults: list[tuple] = (), port: int = 0):
        self.state, self.faults, self.port = state, faults, port

    def __enter__(self) -> "HubProcess":
        options = [str(value) for fault in self.faults for value in ("--fault", *fault)]
        command = [sys.executable, __file__, "--state", str(self.state), "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().strip()
        self.port = int(self.address.rsplit(":", 1)[1])  # reused when the server is started again
        return self

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __exit__(self, *_):
        self.kill()


def main():
    parser = argparse.ArgumentParser(description="Serve a local Hub.")
    parser.add_argument("--state", required=True, help="folder of the server's data")
    parser.add_argument("--port", type=int, default=0)
    fault_help = "KIND PATTERN [TIMES [VALUE]]: see Fault"
    parser.add_argument("--fault", nargs="+", action="append", default=[], help=fault_help)
    arguments = parser.parse_args()
    hub = Hub(arguments.state, arguments.port)
    for kind, pattern, *numbers in arguments.fault:
        hub.faults.append(Fault(kind, pattern, *map(float, numbers)))
    print(hub.address, flush=True)
    hub.server.serve_forever()


if __name__ == "__main__":
    main()
