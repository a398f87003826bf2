"""A small Hub on 127.0.0.1: enough of the Hugging Face Hub for the real client to create, push, list and load.

Repositories live in memory. A commit is a mapping of paths to blobs; branches and tags are names of commits.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass
class Repo:
    """A repository: its commits, oldest first, and what points to them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str) -> str:
        """Add a commit to a branch and return its id."""
        parent = self.branches.get(branch, "")
        content = json.dumps([parent, len(self.commits), {path: sha256(blob) for path, blob in files.items()}])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or an id means."""
        return (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "", **content: str) -> None:
        super().__init__(message)
        self.status, self.code, self.content = status, code, {"error": message, **content}


class FakeHub:
    """The server. Use it as a context manager.

    Attributes:
        users: names of the owners of tokens.
        repos: by id.
        requests: method and path of everything asked so far.
        broken: a path that starts with this is answered with an error, as if the connection had gone.
    """

    def __init__(self, users: dict[str, str]) -> None:
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken = ""
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def git_sha(blob: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def etag(path: str, blob: bytes) -> str:
    return sha256(blob) if is_large(path) else git_sha(blob)


REPO = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES = [  # method, path, name of the handler's method
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("GET", r"/api/models", "listing"),
    ("GET", rf"/api/models/{REPO}(/revision/(?P<rev>[^/]+))?", "info"),
    ("GET", rf"/api/models/{REPO}/tree/(?P<rev>[^/]+)", "tree"),
    ("GET", rf"/api/models/{REPO}/refs", "refs"),
    ("POST", rf"/api/models/{REPO}/branch/(?P<name>[^/]+)", "branch"),
    ("POST", rf"/api/models/{REPO}/tag/(?P<rev>[^/]+)", "tag"),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPO}/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs-verify", "lfs_verify"),
    ("GET", rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    """One request: finds its route, checks who asks, answers in JSON or with a file."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.hub.broken and path.startswith(self.hub.broken):
                raise Refused(400, "the connection broke")
            route = ((name, re.fullmatch(pattern, path)) for kind, pattern, name in ROUTES if kind == method)
            name, match = next(((name, match) for name, match in route if match), ("", None))
            if match is None:
                raise Refused(404, f"no route {method} {path}")
            found = {key: value for key, value in match.groupdict().items() if value is not None}
            if "rev" in found:
                found["rev"] = unquote(found["rev"])
            answer = getattr(self, name)(body, **found)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
            self._send(refused.status, refused.content, headers)
            return
        if isinstance(answer, tuple):
            self._send(200, *answer)
        else:
            self._send(200, answer, {})

    def _send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks --------------------------------------------------------------------------------------------------------

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        token = given.removeprefix("Bearer ")
        if token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _writer(self, repo_id: str) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if repo_id.split("/")[0] != user:
            raise Refused(403, f"you may not write to {repo_id}")

    def _repo(self, repo_id: str) -> Repo:
        user = self._user()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and repo_id.split("/")[0] != user):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _files(self, repo_id: str, rev: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(repo_id)
        oid = repo.find(rev)
        if oid is None:
            raise Refused(404, f"no revision {rev}", "RevisionNotFound")
        return oid, repo.commits[oid]

    # Routes ----------------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        user = self._user()
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        self._writer(repo_id)
        if repo_id in self.hub.repos:
            raise Refused(409, "exists", url=f"{self.hub.url}/{repo_id}")
        repo = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "main")
        self.hub.repos[repo_id] = repo
        return {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}

    def validate(self, body: bytes) -> Any:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            known = isinstance(yaml.safe_load(header[1]), dict) if header else False
        except yaml.YAMLError:
            known = False
        if not known:
            raise Refused(400, "no metadata")
        return {"errors": [], "warnings": []}

    def whoami(self, body: bytes) -> Any:
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": []}

    def listing(self, body: bytes) -> Any:
        author = self.query.get("author", [""])[0]
        user = self._user()
        names = [name for name, repo in self.hub.repos.items() if not repo.private or name.split("/")[0] == user]
        return [self.info(b"", name) for name in names if not author or name.startswith(f"{author}/")]

    def info(self, body: bytes, repo: str, rev: str = "main") -> Any:
        oid, files = self._files(repo, rev)
        card = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), re.DOTALL)
        data = yaml.safe_load(card[1]) if card else {}
        return {
            "id": repo,
            "modelId": repo,
            "sha": oid,
            "private": self.hub.repos[repo].private,
            "tags": data.get("tags", []),
            "pipeline_tag": data.get("pipeline_tag"),
            "library_name": data.get("library_name"),
            "cardData": data,
            "siblings": [{"rfilename": path} for path in files],
            "lastModified": "2024-01-01T00:00:00.000Z",
        }

    def tree(self, body: bytes, repo: str, rev: str) -> Any:
        _, files = self._files(repo, rev)
        return [{"type": "file", "path": path, "size": len(blob), "oid": git_sha(blob)} for path, blob in files.items()]

    def refs(self, body: bytes, repo: str) -> Any:
        found = self._repo(repo)
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in found.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in found.tags.items()]
        return {"branches": heads, "converts": [], "tags": tags}

    def branch(self, body: bytes, repo: str, name: str) -> Any:
        self._writer(repo)
        found = self._repo(repo)
        if name in found.branches:
            raise Refused(409, "branch exists")
        found.branches[name] = found.branches["main"]
        return {}

    def tag(self, body: bytes, repo: str, rev: str) -> Any:
        self._writer(repo)
        oid, _ = self._files(repo, rev)
        self.hub.repos[repo].tags[json.loads(body)["tag"]] = oid
        return {}

    def preupload(self, body: bytes, repo: str, rev: str) -> Any:
        self._writer(repo)
        _, there = self._files(repo, rev)
        paths = [file["path"] for file in json.loads(body)["files"]]
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large(path) else "regular",
                    "shouldIgnore": False,
                    "oid": etag(path, there[path]) if path in there else None,
                }
                for path in paths
            ]
        }

    def lfs_batch(self, body: bytes, repo: str) -> Any:
        self._writer(repo)
        objects = []
        for item in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs-verify"},
            }
            objects.append({**item, **({} if item["oid"] in self.hub.objects else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> Any:
        if sha256(body) != oid:
            raise Refused(400, "the content is not what was announced")
        self.hub.objects[oid] = body
        return {}

    def lfs_verify(self, body: bytes) -> Any:
        if json.loads(body)["oid"] not in self.hub.objects:
            raise Refused(404, "no such object")
        return {}

    def commit(self, body: bytes, repo: str, rev: str) -> Any:
        self._writer(repo)
        _, there = self._files(repo, rev)
        files = dict(there)
        for line in body.decode().splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.objects[item["value"]["oid"]]
        oid = self.hub.repos[repo].commit(files, rev)
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}

    def resolve(self, body: bytes, repo: str, rev: str, path: str) -> Any:
        oid, files = self._files(repo, rev)
        if path not in files:
            raise Refused(404, f"no file {path}", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag(path, files[path])}"'}
        if is_large(path):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(files[path]))}
        return files[path], headers
