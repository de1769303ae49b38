"""A stand-in of the Hugging Face Hub's HTTP API on loopback: what pushing and loading one model repository needs.

It keeps what matters of the real thing: commits are immutable and content addressed, large files travel by Git LFS and
are refused when their bytes do not match their SHA-256, only the owner's token may write, and a README whose metadata
block is not valid stops the push. It leaves out Xet storage (a client falls back to LFS with HF_HUB_DISABLE_XET=1),
pull requests, datasets, Spaces and everything that is not about one model repository; a request outside is answered
404 and remembered in `Hub.unknown`, so a test can tell that nothing was asked in vain. Large files lie on a second
port under another name of this machine, as the Hub's lie on another host: a client reads their metadata from the
redirect and follows it without a token.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "user"
TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".npz", ".npy", ".pt")
REGULAR_BYTES_MAX = 10 * 2**20
# The Hub refuses a licence it does not know; the identifiers a language or image model usually has.
LICENSES = """
    apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gpl-3.0
    lgpl-3.0 agpl-3.0 mpl-2.0 isc unlicense openrail creativeml-openrail-m bigscience-openrail-m openrail++ llama2
    llama3 llama3.1 llama3.2 llama3.3 gemma other unknown
"""
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Refusal(Exception):
    """An error answer: status, the Hub's error code, and what a person reads."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Question(NamedTuple):
    """What a request says beside its path."""

    body: bytes
    query: dict[str, list[str]]

    def json(self) -> Any:
        return json.loads(self.body)


class Answer(NamedTuple):
    """A successful answer."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def json(cls, value: Any) -> "Answer":
        return cls(json.dumps(value).encode(), headers={"Content-Type": "application/json"})


@dataclass(frozen=True, slots=True)
class File:
    """A file of a commit; `lfs` says that git holds only a pointer and the bytes lie in LFS storage."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        size = len(self.content)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()
        blob = pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def info(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id, **lfs}


Tree = dict[str, File]


@dataclass(slots=True)
class Repo:
    """A model repository: branches point to commits, commits to trees; neither ever changes once written."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)

    def resolve(self, revision: str) -> tuple[str, Tree]:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision!r}")
        return sha, self.commits[sha]

    def commit(self, branch: str, tree: Tree, summary: str) -> str:
        listing = sorted((path, file.blob_id) for path, file in tree.items())
        parent = self.branches.get(branch, "")
        sha = hashlib.sha1(repr((parent, summary, listing)).encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha


def card_problems(readme: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a README's metadata block, by the rules of the Hub that concern a model."""
    block = re.match(r"---\r?\n(.*?)\r?\n?---(\r?\n|$)", readme, re.DOTALL)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["the metadata block must be a mapping"], []
    errors = []
    for key in ("tags", "base_model", "datasets", "language", "license", "metrics"):
        value = data.get(key, [])
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in values) or (key == "tags" and not isinstance(value, list)):
            errors.append(f'"{key}" must be text or a list of texts, not {value!r}')
        elif key in ("base_model", "datasets"):
            errors += [f'"{key}": {item!r} is not the id of a repository' for item in values if not _is_id(item)]
        elif key == "license":
            errors += [
                f'"license": {item!r} is not a licence the Hub lists' for item in values if item not in LICENSES.split()
            ]
    for entry in data.get("model-index", []):
        if not (isinstance(entry, dict) and isinstance(entry.get("name"), str)):
            errors.append('"model-index" entries need a "name"')
        elif not all({"task", "dataset", "metrics"} <= set(result) for result in entry.get("results", [])):
            errors.append('"model-index" results need "task", "dataset" and "metrics"')
    return errors, []


def _is_id(text: str) -> bool:
    return REPO_ID.fullmatch(text) is not None


@dataclass(slots=True)
class Hub:
    """The state behind the API, and one method an endpoint.

    Attributes:
        url: where the API listens.
        storage: where large files lie.
        repos: repositories by id.
        lfs: large files by SHA-256.
        requests: every request line in order, "PUT /lfs/2c26...".
        unknown: those of them that no endpoint of ours matched.
    """

    url: str = ""
    storage: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise Refusal(404, "RepoNotFound", f"no repository {repo_id!r}")
        return self.repos[repo_id]

    def file(self, repo_id: str, revision: str, path: str) -> tuple[str, File]:
        sha, tree = self.repo(repo_id).resolve(revision)
        if path not in tree:
            raise Refusal(404, "EntryNotFound", f"no file {path!r} in {repo_id} at {sha}")
        return sha, tree[path]

    # ---- reading ------------------------------------------------------------------------------------------------

    def whoami(self, _: Question) -> Answer:
        return Answer.json({"type": "user", "name": USER, "orgs": []})

    def info(self, _: Question, repo_id: str, revision: str = "main") -> Answer:
        sha, tree = self.repo(repo_id).resolve(revision)
        return Answer.json({"id": repo_id, "sha": sha, "private": False, "siblings": [{"rfilename": p} for p in tree]})

    def tree(self, question: Question, repo_id: str, revision: str, folder: str = "") -> Answer:
        _, tree = self.repo(repo_id).resolve(revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in sorted(tree.items()) if path.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound", f"no folder {folder!r}")
        if question.query.get("recursive") == ["true"]:
            return Answer.json([file.info(path) for path, file in inside.items()])
        folders = dict.fromkeys(prefix + rest.split("/")[0] for p in inside if "/" in (rest := p[len(prefix) :]))
        here = [file.info(path) for path, file in inside.items() if "/" not in path[len(prefix) :]]
        return Answer.json([{"type": "directory", "path": name, "size": 0, "oid": ""} for name in folders] + here)

    def resolve(self, _: Question, repo_id: str, revision: str, path: str) -> Answer:
        sha, file = self.file(repo_id, revision, path)
        if not file.lfs:
            return Answer(file.content, headers={"X-Repo-Commit": sha, "ETag": f'"{file.blob_id}"'})
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return Answer(
            status=302, headers={"X-Repo-Commit": sha, "Location": f"{self.storage}/lfs/{file.sha256}", **linked}
        )

    def lfs_get(self, _: Question, oid: str) -> Answer:
        if oid not in self.lfs:
            raise Refusal(404, "EntryNotFound", f"no object {oid}")
        return Answer(self.lfs[oid], headers={"ETag": f'"{oid}"'})

    # ---- writing ------------------------------------------------------------------------------------------------

    def validate_yaml(self, question: Question) -> Answer:
        errors, warnings = card_problems(question.json()["content"])
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return Answer.json(answer)._replace(status=400 if errors else 200)

    def create(self, question: Question) -> Answer:
        wanted = question.json()
        repo_id = f"{wanted['organization'] or USER}/{wanted['name']}"
        if not repo_id.startswith(f"{USER}/"):
            raise Refusal(403, "Forbidden", f"{USER} may not create {repo_id}")
        status = 409 if repo_id in self.repos else 200
        if status == 200:
            self.repos[repo_id] = Repo()
            self.repos[repo_id].commit("main", {}, "initial commit")
        return Answer.json({"id": repo_id, "url": f"{self.url}/{repo_id}"})._replace(status=status)

    def branch(self, question: Question, repo_id: str, branch: str) -> Answer:
        repo = self.repo(repo_id)
        if branch in repo.branches:
            raise Refusal(409, "Conflict", f"branch {branch!r} exists")
        repo.branches[branch] = repo.resolve(question.json().get("startingPoint", "main"))[0]
        return Answer.json({})

    def preupload(self, question: Question, repo_id: str, revision: str) -> Answer:
        _, tree = self.repo(repo_id).resolve(revision)

        def plan(wanted: dict[str, Any]) -> dict[str, Any]:
            path, size = wanted["path"], wanted["size"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or size > REGULAR_BYTES_MAX else "regular"
            oid = None if path not in tree else tree[path].sha256 if tree[path].lfs else tree[path].blob_id
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return Answer.json({"files": [plan(wanted) for wanted in question.json()["files"]]})

    def lfs_batch(self, question: Question, repo_id: str) -> Answer:
        self.repo(repo_id)

        def plan(wanted: dict[str, Any]) -> dict[str, Any]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] in self.lfs:
                return known
            verify = f"{self.url}/{repo_id}.git/info/lfs/objects/verify"
            upload = f"{self.storage}/lfs/{wanted['oid']}"
            return {**known, "actions": {"upload": {"href": upload}, "verify": {"href": verify}}}

        return Answer.json({"transfer": "basic", "objects": [plan(wanted) for wanted in question.json()["objects"]]})

    def lfs_put(self, question: Question, oid: str) -> Answer:
        if hashlib.sha256(question.body).hexdigest() != oid:
            raise Refusal(400, "BadRequest", f"the bytes sent are not object {oid}")
        self.lfs[oid] = question.body
        return Answer()

    def lfs_verify(self, question: Question, repo_id: str) -> Answer:
        self.repo(repo_id)
        wanted = question.json()
        if len(self.lfs.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "EntryNotFound", f"object {wanted['oid']} is not here whole")
        return Answer.json({})

    def commit(self, question: Question, repo_id: str, branch: str) -> Answer:
        repo = self.repo(repo_id)
        parent, tree = repo.resolve(branch)
        lines = [json.loads(line) for line in question.body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", parent) != parent:
            raise Refusal(412, "PreconditionFailed", f"{branch} has moved on to {parent}")
        tree = dict(tree)
        for key, value in ((line["key"], line["value"]) for line in lines if line["key"] != "header"):
            if key == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile" and len(self.lfs.get(value["oid"], b"")) == value["size"]:
                tree[value["path"]] = File(self.lfs[value["oid"]], lfs=True)
            elif key == "deletedFile" and value["path"] in tree:
                del tree[value["path"]]
            else:
                raise Refusal(400, "BadRequest", f"cannot {key} {value['path']!r}")
        if "README.md" in tree and (problems := card_problems(tree["README.md"].content.decode())[0]):
            raise Refusal(400, "BadRequest", "; ".join(problems))
        sha = repo.commit(branch, tree, header["summary"])
        return Answer.json({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"})


REPO = r"([\w.-]+/[\w.-]+)"
Endpoint = Callable[..., Answer]
# Method, path, endpoint, and whether it wants the owner's token. An upload address is signed and wants none, as there.
ROUTES: tuple[tuple[str, str, Endpoint, bool], ...] = (
    ("GET", "/api/whoami-v2", Hub.whoami, True),
    ("GET", f"/api/models/{REPO}", Hub.info, False),
    ("GET", f"/api/models/{REPO}/revision/([^/]+)", Hub.info, False),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", Hub.tree, False),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)/([^/]+)", Hub.tree, False),
    ("GET", f"/{REPO}/resolve/([^/]+)/(.+)", Hub.resolve, False),
    ("GET", "/lfs/([0-9a-f]{64})", Hub.lfs_get, False),
    ("POST", "/api/validate-yaml", Hub.validate_yaml, False),
    ("POST", "/api/repos/create", Hub.create, True),
    ("POST", f"/api/models/{REPO}/branch/([^/]+)", Hub.branch, True),
    ("POST", f"/api/models/{REPO}/preupload/([^/]+)", Hub.preupload, True),
    ("POST", f"/api/models/{REPO}/commit/([^/]+)", Hub.commit, True),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Hub.lfs_batch, True),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", Hub.lfs_verify, True),
    ("PUT", "/lfs/([0-9a-f]{64})", Hub.lfs_put, False),
)


class Handler(BaseHTTPRequestHandler):
    """HTTP in and out; what an answer says is the Hub's business."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: unbuffered headers and body meet Nagle's delay

    def answer(self) -> None:
        url = urlsplit(self.path)
        question = Question(self.body(), parse_qs(url.query))
        try:
            with self.hub.lock:
                self.hub.requests.append(f"{self.command} {url.path}")
                reply = self.route(url.path, question)
        except Refusal as refusal:
            text = json.dumps({"error": str(refusal)}).encode()
            reply = Answer(text, refusal.status, {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)})
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_GET = do_POST = do_PUT = answer

    def route(self, path: str, question: Question) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, endpoint, private in ROUTES:
            if verb == method and (match := re.fullmatch(pattern, path)):
                if private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise Refusal(401, "Unauthorized", "Invalid credentials in Authorization header")
                return endpoint(self.hub, question, *map(unquote, match.groups()))
        self.hub.unknown.append(f"{method} {path}")
        raise Refusal(404, "NotFound", f"this stand-in has no {method} {path}")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(self.chunks())
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: `Hub.requests` is the log."""


@contextmanager
def serve() -> Iterator[Hub]:
    """An empty Hub on two free ports of loopback, for as long as the block runs."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    ports = [server.server_address[1] for server in servers]
    hub.url, hub.storage = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
