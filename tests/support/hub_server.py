"""A small Hugging Face Hub on 127.0.0.1 for tests, kept in memory. It can be told to fail.

It does what `huggingface_hub` needs to create repositories, to commit and to load again.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK


WRITE_TOKEN, READ_TOKEN = "hf_write", "hf_read"
LFS_SUFFIXES = (".safetensors", ".png")


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]
    parent: str | None


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch)
        content = repr((message, parent, len(self.commits), sorted(files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = Commit(message, files, parent)
        self.branches[branch] = sha
        return sha

    def history(self, branch: str = "main") -> list[Commit]:
        """From the first commit on."""
        commits, sha = [], self.branches[branch]
        while sha is not None:
            commits.append(self.commits[sha])
            sha = commits[-1].parent
        return commits[::-1]

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]].files


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class HubServer:
    """Use it as a context manager.

    `repositories` holds what was pushed; `faults` what is to fail: dictionaries of `method`, `path` (a regular
    expression), `times` and `status`. A status is an integer, or one of these words:

    - "drop": closes the connection.
    - "race": lets somebody else's commit come first (`then` is the status after that).
    - "stall": never answers.
    - "lost": does what is asked and does not answer.
    - "html": answers as a login page does.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[dict] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()  # until then, what stalls says nothing
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.httpd.server_port}"

    def __enter__(self):
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.closing.set()
        self.httpd.shutdown()
        self.httpd.server_close()

    def environment(self, home, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """For a fresh process that takes this server for the Hub."""
        values = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the server speaks the older protocol for large files
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return values | ({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.handle_request("GET")

    do_HEAD = do_PUT = do_POST = lambda self: self.handle_request(self.command)

    def handle_request(self, method: str) -> None:
        self.body = self.read_body()
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        self.is_silent, fault = False, None
        with self.hub.lock:
            self.hub.requests.append((method, path))
            try:
                fault = self.take_fault(method, path)
                if fault == "drop":
                    self.hang_up()
                elif fault == "html":
                    self.send_content(b"<!DOCTYPE html><title>Log in</title>", 200, {"Content-Type": "text/html"})
                elif fault != "stall":
                    self.is_silent = fault == "lost"
                    self.answer(method, path)
            except HubError as error:
                headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
                self.send_json({"error": error.message}, error.status, headers)
        if fault == "stall":
            self.hub.closing.wait()
        if fault in ("stall", "lost"):
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def take_fault(self, method: str, path: str) -> str | None:
        for fault in self.hub.faults:
            if fault["method"] == method and re.search(fault["path"], path) and fault.get("times", 1) > 0:
                fault["times"] = fault.get("times", 1) - 1
                if fault["status"] in ("drop", "stall", "lost", "html"):
                    return fault["status"]
                if fault["status"] == "race":
                    repository = self.hub.repositories[re.search(_REPO, path.removeprefix("/api/models/"))[0]]
                    repository.commit("main", "Somebody else's", {**repository.files(), "notes.md": b"Mine"})
                    return fault.get("then")
                raise HubError(fault["status"], fault.get("message", "it was told to fail"))
        return None

    def answer(self, method: str, path: str) -> None:
        for pattern, function in ROUTES:
            match = re.fullmatch(pattern, f"{method} {path}")
            if match:
                function(self, **{name: unquote(value) for name, value in match.groupdict().items() if value})
                return
        raise HubError(404, f"this server has no {method} {path}")

    def send_json(self, value, status: int = 200, headers: dict | None = None) -> None:
        self.send_content(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_content(self, content: bytes, status: int = 200, headers: dict | None = None) -> None:
        if self.is_silent:
            return
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def check_token(self, writing: bool = False) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, WRITE_TOKEN, READ_TOKEN):
            raise HubError(401, "Invalid credentials in Authorization header")
        if writing and token is None:
            raise HubError(401, "Invalid username or password.")
        if writing and token == READ_TOKEN:
            raise HubError(403, "You don't have the rights to create a model under this namespace")
        return token

    def find(self, repo: str, revision: str = "main", writing: bool = False) -> tuple[Repository, str]:
        """The repository, and the commit of a branch or commit."""
        token = self.check_token(writing)
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and token is None):
            raise HubError(404 if token else 401, "Repository not found", "RepoNotFound")
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, sha

    # --- What the Hub does ---

    def whoami(self):
        token = self.check_token()
        role = {WRITE_TOKEN: "write", READ_TOKEN: "read"}.get(token)
        if role is None:
            raise HubError(401, "Invalid username or password.")
        access = {"displayName": "test", "role": role}
        orgs = [{"name": "org", "roleInOrg": "admin"}, {"name": "readers", "roleInOrg": "read"}]
        self.send_json(
            {"name": "me", "type": "user", "orgs": orgs, "auth": {"type": "access_token", "accessToken": access}}
        )

    def create_repository(self):
        self.check_token(writing=True)
        request = json.loads(self.body)
        repo = f"{request.get('organization') or 'me'}/{request['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}", "name": repo}
        if repo in self.hub.repositories:
            self.send_json({"error": "You already created this model repo", **url}, 409)
            return
        # "visibility" is what huggingface_hub 2 sends, "private" what 1 does
        repository = Repository(private=request.get("visibility") == "private" or bool(request.get("private")))
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[repo] = repository
        self.send_json(url)

    def validate_yaml(self):
        match = REGEX_YAML_BLOCK.search(json.loads(self.body)["content"])
        try:
            metadata = yaml.safe_load(match[2]) if match else {}
            errors = [] if isinstance(metadata, dict) else [{"message": "metadata is not a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_branch(self, repo: str, branch: str):
        repository, sha = self.find(repo, json.loads(self.body or b"{}").get("startingPoint", "main"), writing=True)
        if branch in repository.branches:
            raise HubError(409, "Reference already exists")
        repository.branches[branch] = sha
        self.send_json({}, 201)

    def preupload(self, repo: str, revision: str):
        repository, sha = self.find(repo, revision, writing=True)
        files = repository.commits[sha].files
        modes = []
        for file in json.loads(self.body)["files"]:
            is_large = file["path"].endswith(LFS_SUFFIXES)
            oid = _oid(file["path"], files[file["path"]]) if file["path"] in files else None
            modes.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        self.send_json({"files": modes})

    def lfs_batch(self, repo: str):
        self.find(repo, writing=True)
        objects = []
        for each in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"},
                "verify": {"href": f"{self.hub.endpoint}/lfs/verify"},
            }
            objects.append(each if each["oid"] in self.hub.large_files else {**each, "actions": actions})
        self.send_json({"objects": objects, "transfer": "basic"})

    def lfs_upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content is not what was announced")
        self.hub.large_files[oid] = self.body
        self.send_json({})

    def lfs_verify(self):
        request = json.loads(self.body)
        if len(self.hub.large_files.get(request["oid"], b"")) != request["size"]:
            raise HubError(404, "the file is not there")
        self.send_json({})

    def commit(self, repo: str, revision: str):
        repository, sha = self.find(repo, revision, writing=True)
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(repository.commits[sha].files), None
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", sha) != sha:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        new = repository.commit(revision, message, files)
        self.send_json({"success": True, "commitOid": new, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{new}"})

    def model_info(self, repo: str, revision: str = "main"):
        repository, sha = self.find(repo, revision)
        siblings = [{"rfilename": name} for name in repository.commits[sha].files]
        self.send_json({"id": repo, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def refs(self, repo: str):
        repository, _ = self.find(repo)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repository.branches.items()
        ]
        self.send_json({"branches": branches, "tags": [], "converts": []})

    def tree(self, repo: str, revision: str, folder: str = ""):
        repository, sha = self.find(repo, revision)
        prefix, entries = f"{folder}/" if folder else "", {}
        for name, content in repository.commits[sha].files.items():
            if not name.startswith(prefix):
                continue
            if "/" in name[len(prefix) :] and self.query.get("recursive", ["false"])[0].lower() != "true":
                child = prefix + name[len(prefix) :].split("/")[0]
                entries[child] = {"type": "directory", "path": child, "oid": "0" * 40}
            else:
                entries[name] = {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}
                if name.endswith(LFS_SUFFIXES):
                    entries[name]["lfs"] = {"oid": _oid(name, content), "size": len(content), "pointerSize": 130}
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        self.send_json(list(entries.values()), headers={"X-Repo-Commit": sha})

    def resolve(self, repo: str, revision: str, name: str):
        repository, sha = self.find(repo, revision)
        content = repository.commits[sha].files.get(name)
        if content is None:
            headers = {"X-Repo-Commit": sha, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.send_json({"error": "Entry not found"}, 404, headers)
            return
        self.send_content(content, headers={"ETag": f'"{_oid(name, content)}"', "X-Repo-Commit": sha})

    def set_faults(self):
        self.hub.faults[:] = json.loads(self.body)
        self.send_json({})


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LFS_SUFFIXES) else _git_oid(content)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = (
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create_repository),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>[^/]+)", Handler.create_branch),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.lfs_upload),
    (r"POST /lfs/verify", Handler.lfs_verify),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    (rf"GET /api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", Handler.model_info),
    (rf"GET /api/models/{_REPO}/refs", Handler.refs),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree),
    (rf"(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
    (r"POST /_faults", Handler.set_faults),
)
