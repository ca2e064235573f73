"""A stand-in for the hub's HTTP API, as far as publishing and fetching a model need it.

That is: whom a token belongs to, making repositories, and commits, whose large files come before them, as in Git LFS;
what files a repository has, and their contents.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class FakeHub:
    """
    Attributes:
        users: {token: what whoami answers}.
        repositories: by name; "me/x" may be written to by the user or the organisations "me".
        requests: (method, path, token or None) of all that came.
        failures: {(method, pattern of the path): status} of what is to fail, with `complaint`.
        url: where it listens.
    """

    users: dict[str, dict] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    failures: dict[tuple[str, str], int] = field(default_factory=dict)
    complaint: str = "out of order"
    large: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def add_user(self, token: str, name: str, organisations=(), role="write") -> None:
        organisations = [{"type": "org", "name": one} for one in organisations]
        auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
        self.users[token] = {"type": "user", "name": name, "orgs": organisations, "auth": auth}

    def called(self, pattern: str) -> int:
        return sum(re.search(pattern, path) is not None for _, path, _ in self.requests)

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, dict]:
        """Status and JSON."""
        for (wanted, pattern), status in self.failures.items():
            if wanted == method and re.search(pattern, path):
                return status, {"error": self.complaint}
        if upload := re.fullmatch(r"/large/(\w+)", path):  # elsewhere: the address itself is the permission
            assert token is None and hashlib.sha256(body).hexdigest() == upload[1]
            self.large[upload[1]] = body
            return 200, {}
        user = self.users.get(token)
        if user is None:
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return 200, user
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(user, json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self._info(user, found[1])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/main", path):
            files = self.repositories[found[1]].files
            return 200, [{"type": "file", "path": p, "size": len(f), "oid": "0" * 40} for p, f in files.items()]
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body)) if self._may_write(user, found[1]) else self._forbidden()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            if not self._may_write(user, found[1]):
                return self._forbidden()
            return self._preupload(json.loads(body)) if found[2] == "preupload" else self._commit(found[1], body)
        return 404, {"error": f"no {path}"}

    def file(self, path: str) -> tuple[int, bytes, dict[str, str]] | None:
        """Status, content and headers of a file's address; None for other addresses."""
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", path)
        if not found:
            return None
        repo, name = self.repositories.get(found[1]), found[2]
        if repo is None or name not in repo.files:
            return 404, b"", {"X-Error-Code": "EntryNotFound" if repo else "RepoNotFound"}
        digest = hashlib.sha256(repo.files[name]).hexdigest()
        return 200, repo.files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": "2" * 40}

    def _may_write(self, user: dict, repo: str) -> bool:
        names = [user["name"], *(one["name"] for one in user["orgs"])]
        return repo.split("/")[0] in names and user["auth"]["accessToken"]["role"] != "read"

    def _forbidden(self) -> tuple[int, dict]:
        return 403, {"error": "you do not have the rights"}

    def _create(self, user: dict, wanted: dict) -> tuple[int, dict]:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if not self._may_write(user, repo):
            return self._forbidden()
        status = 409 if repo in self.repositories else 200
        self.repositories.setdefault(repo, Repository(private=wanted.get("visibility") == "private"))
        return status, {"url": f"{self.url}/{repo}"}

    def _info(self, user: dict, repo: str) -> tuple[int, dict]:
        found = self.repositories.get(repo)
        if found is None or (found.private and not self._may_write(user, repo)):
            return 404, {"error": "Repository not found"}
        return 200, {"id": repo, "private": found.private, "sha": "0" * 40}

    def _preupload(self, wanted: dict) -> tuple[int, dict]:
        modes = [(one["path"], "lfs" if one["path"].endswith(".safetensors") else "regular") for one in wanted["files"]]
        return 200, {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}

    def _batch(self, wanted: dict) -> tuple[int, dict]:
        uploads = [
            {**one, "actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}} for one in wanted["objects"]
        ]
        return 200, {"transfer": "basic", "objects": uploads}

    def _commit(self, repo: str, body: bytes) -> tuple[int, dict]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.repositories[repo].commits.append(value["summary"])
            elif line["key"] == "file":
                self.repositories[repo].files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[repo].files[value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40}


@contextmanager
def running(hub: FakeHub):
    """Within it the hub listens on a port of this machine, at `hub.url`."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            authorization = self.headers.get("Authorization")
            token = authorization.removeprefix("Bearer ") if authorization else None
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, token))
            if found := hub.file(path):
                return self._send_file(*found)
            status, content = hub.answer(self.command, path, token, self._body())
            text = json.dumps(content).encode()
            self.send_response(status)
            if "error" in content:
                self.send_header("X-Error-Message", content["error"])
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_HEAD = do_GET = do_POST = do_PUT = handle_any

        def _send_file(self, status: int, content: bytes, headers: dict[str, str]):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def logged_in(name: str, token: str, monkeypatch, folder, organisations=()):
    """Within it a stand-in is known to this process as the hub, and `name` is logged in there."""
    hub = FakeHub()
    hub.add_user(token, name, organisations)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol has no stand-in; LFS does the same
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no_login"))
    with running(hub):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        yield hub
