"""The Hugging Face Hub in small, on loopback and in memory, for its real clients.

Nothing in the clients is mocked.

    hub = TestHub()                                    # hub.url is http://127.0.0.1:<a free port>
    hub.put("models", "alice/tiny", {"config.json": b"{}"}, private=True)
    ...                                                # a client in a process of its own
    hub.files("models", "alice/tiny")
    hub.commits("models", "alice/tiny")
    hub.requests
    hub.close()

What a client's process needs in its environment before it imports anything:

    HF_ENDPOINT=hub.url  HF_TOKEN=hf_test_writer
    HF_HOME=<a folder of its own>, but no HF_HUB_CACHE, HF_DATASETS_CACHE
    HF_HUB_DISABLE_XET=1  or, with hf_xet installed, a client uploads by Xet, asking no server
    HF_HUB_OFFLINE=0  TRANSFORMERS_OFFLINE=0  HF_DATASETS_OFFLINE=0, where something has set them
    HF_HUB_DISABLE_TELEMETRY=1  HF_UPDATE_DOWNLOAD_COUNTS=0  NO_PROXY=127.0.0.1, so that nothing
    goes to other hosts

As on the real one, a repo that a client creates starts with a commit of .gitattributes, a private
repo is missing to all but its owner, an unknown token gets 401 even for public repos, and a gated
repo can be listed but not read. Unlike there: no branch but main, no tags, pull requests,
organisations, redirects or pages; one namespace to write to.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

LFS_SUFFIXES = (
    ".arrow",
    ".bin",
    ".gz",
    ".npy",
    ".npz",
    ".parquet",
    ".pkl",
    ".pt",
    ".pth",
    ".safetensors",
    ".zip",
)
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def is_lfs(path, size, sample):
    """Whether the Hub keeps a file outside git; `sample` is its beginning."""
    return path.endswith(LFS_SUFFIXES) or size > 10 * 2**20 or b"\0" in sample


class Refusal(Exception):
    """An answer with an error's status."""

    def __init__(self, status, message, code=None, **headers):
        headers["X-Error-Code"] = code
        headers["X-Error-Message"] = message.encode("ascii", "replace").decode()
        headers = {key: value for key, value in headers.items() if value is not None}
        self.answer = status, headers, json.dumps({"error": message}).encode()


class File:
    """A file's content, and what the Hub says of it."""

    def __init__(self, content, lfs):
        self.content = content
        self.size = len(content)
        self.lfs = lfs
        self.oid = hashlib.sha1(b"blob %d\0" % self.size + content).hexdigest()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.etag = self.sha256 if lfs else self.oid  # by it clients see whether a file has changed
        self.info = {"type": "file", "size": self.size, "oid": self.oid}
        if lfs:
            self.info["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}


class Repo:
    """A repository: its commits, and the objects that LFS has brought."""

    def __init__(self, kind, name, private, gated=False):
        self.kind = kind
        self.name = name
        self.private = private
        self.gated = gated
        self.path = f"datasets/{name}" if kind == "datasets" else name
        self.commits = {}  # sha: {path: File}, the oldest first
        self.objects = {}  # sha256: content

    def commit(self, files):
        """Adds a commit of exactly these files. Returns its sha."""
        # Without a counter: caches outlive servers, and must stay right
        oids = sorted((path, file.oid) for path, file in files.items())
        what = self.path, list(self.commits), oids
        sha = hashlib.sha1(repr(what).encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def at(self, revision):
        """(the sha of a revision, its files)."""
        sha = list(self.commits)[-1] if revision == "main" else revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha]


@dataclass
class Failure:
    """What `TestHub.fail` was asked for: of the requests seen, those after `first` up to `last`."""

    match: str
    status: int | None
    delay: float
    drop: bool | str
    first: int
    last: int
    headers: dict
    seen: int = 0

    @property
    def is_due(self):
        return self.first < self.seen <= self.last


class TestHub:
    __test__ = False  # no test case, despite its name

    def __init__(self):
        self.users = {  # token: name, role
            "hf_test_writer": ("alice", "write"),
            "hf_test_reader": ("rob", "read"),
        }
        self.repos = {}  # (kind, name): Repo, of which `private` and `gated` may be read and set
        self.requests = []  # (method, path with query), also of those that fail
        self.lock = threading.RLock()
        self.server = None
        self.port = 0
        self.up()
        self.url = f"http://127.0.0.1:{self.port}"

    def put(self, kind, name, files, private=False, gated=False):
        """Commits exactly these files, to a new repo if need be.

        `gated` is True, or who may read besides the owner.
        """
        repo = self.repos.setdefault((kind, name), Repo(kind, name, private))
        repo.private = private
        repo.gated = gated
        stored = {}
        for path, content in files.items():
            stored[path] = File(content, is_lfs(path, len(content), content[:512]))
        repo.objects |= {file.sha256: file.content for file in stored.values() if file.lfs}
        return repo.commit(stored)

    def files(self, kind, name, revision="main"):
        """{path: content} of a repo."""
        _, files = self.repos[kind, name].at(revision)
        return {path: file.content for path, file in files.items()}

    def commits(self, kind, name):
        """The shas of a repo's commits, the oldest first."""
        return list(self.repos[kind, name].commits)

    def fail(self, match, status=None, times=1, after=0, retry_after=None, delay=0.0, drop=False):
        """After `after` requests with `match` in "METHOD path", the next `times` (None: all) fail.

        They get `status` (503 if nothing else is asked for), or wait `delay` seconds for their
        answer, or are dropped: half of what they send is read or, where they send nothing, half of
        the answer is sent. With drop="answer" the request is carried out, and half of its answer
        lost.
        """
        if not status and not delay and not drop:
            status = 503
        failure = Failure(
            match=match,
            status=status,
            delay=delay,
            drop=drop,
            first=after,
            last=sys.maxsize if times is None else after + times,
            headers={"Retry-After": retry_after},
        )
        self.failures.append(failure)

    def down(self, after=0, refuse=False):
        """`after` more requests are answered; then connections are closed at once.

        With `refuse` they aren't even accepted.
        """
        self.left = after
        self.refuse = refuse
        if refuse and not after:
            self.close()

    def up(self):
        """Ends `down` and all failures."""
        self.left = None
        self.refuse = False
        self.failures = []
        if self.server:
            return
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.hub = self
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self):
        server = self.server
        self.server = None
        self.left = 0
        if server:
            server.shutdown()
            server.server_close()

    def note(self, method, path):
        """Logs a request. Returns whether the hub is up, and the failure to play."""
        if path == "/api/agent-harnesses":  # asked once in an HF_HOME: not to be counted
            return self.left != 0, None
        with self.lock:
            self.requests.append((method, path))
            if self.left == 0:
                if self.refuse:
                    self.close()
                return False, None
            if self.left:
                self.left -= 1
            hits = [one for one in self.failures if one.match in f"{method} {path}"]
            for failure in hits:
                failure.seen += 1
            return True, next((failure for failure in hits if failure.is_due), None)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests; a method of ROUTES returns what is sent as JSON.

    Or it returns (status, headers, content), or raises a Refusal.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

    def log_message(self, *_):
        """Prints nothing."""

    def handle(self):
        with suppress(ConnectionError):  # a client that went away is no error here
            super().handle()

    def serve(self):
        self.hub = self.server.hub
        length = int(self.headers.get("Content-Length", 0))
        is_up, failure = self.hub.note(self.command, self.path)
        drop = failure and failure.drop
        if failure:
            time.sleep(failure.delay)
        self.body = b""
        if is_up:
            self.body = self.rfile.read(length // 2 if drop is True else length)
        is_whole = is_up and len(self.body) == length
        if drop or not is_whole:
            self.close_connection = True
        if not is_whole or (drop and self.command == "HEAD"):
            return

        status, headers, content = self.answer(failure)
        headers = {"Content-Type": "application/json", "Content-Length": len(content)} | headers
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if drop else content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def answer(self, failure):
        """(status, headers, content) for the request."""
        try:
            if failure and failure.status:
                raise Refusal(failure.status, "A failure on request", **failure.headers)
            with self.hub.lock:
                answer = self.route()
        except Refusal as refusal:
            return refusal.answer
        if isinstance(answer, tuple):
            return answer
        return 200, {}, json.dumps(answer).encode()

    def route(self):
        """Calls the first of ROUTES that fits."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.user, self.role = self.hub.users.get(token, (None, None))
        path, _, self.query = self.path.partition("?")
        for method, pattern, respond in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                return respond(self, *(group and unquote(group) for group in match.groups()))
        raise Refusal(404, f"{self.command} {path} is not part of this server")

    def repo(self, kind, name, write=False):
        """The Repo, if this user may see it and, for `write`, write to it."""
        repo = self.hub.repos.get((kind or "models", name))
        is_own = self.user == name.split("/")[0]
        if not repo or (repo.private and not is_own):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not (is_own and self.role == "write"):
            raise Refusal(
                403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
            )
        return repo

    def harnesses(self):
        return {"standardEnvVars": [], "harnesses": {}}

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def verify(self):
        return {}

    def whoami(self):
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.role}
        return {
            "type": "user",
            "name": self.user,
            "fullname": self.user,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }

    def create(self):
        user = self.whoami()["name"]
        wish = json.loads(self.body)
        kind = "datasets" if wish.get("type") == "dataset" else "models"
        owner = wish.get("organization") or user
        if self.role != "write" or owner != user:
            what = f'a {kind[:-1]} under the namespace "{owner}"'
            raise Refusal(403, f"You don't have the rights to create {what}")
        repo = Repo(kind, f"{owner}/{wish['name']}", wish.get("visibility") == "private")
        answer = {"name": repo.name, "url": f"{self.hub.url}/{repo.path}"}
        if (kind, repo.name) in self.hub.repos:  # the url is for `exist_ok`
            answer["error"] = f"You already created this {kind[:-1]} repo"
            return 409, {}, json.dumps(answer).encode()
        repo.commit({".gitattributes": File(GIT_ATTRIBUTES, False)})
        self.hub.repos[kind, repo.name] = repo
        return answer

    def info(self, kind, name, revision="main"):
        repo = self.repo(kind, name)
        sha, files = repo.at(revision)
        return {
            "id": name,
            "author": name.split("/")[0],
            "sha": sha,
            "private": repo.private,
            "disabled": False,
            "gated": "manual" if repo.gated else False,
            "tags": [],
            "siblings": [{"rfilename": path} for path in files],
        }

    def listing(self, kind, name, revision):
        """What the API says of each file and folder, by path."""
        _, files = self.repo(kind, name).at(revision)
        infos = {}
        for path in files:
            parts = path.split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                infos[folder] = {"type": "directory", "size": 0, "oid": 40 * "0"}
        infos |= {path: file.info for path, file in files.items()}
        return {path: infos[path] | {"path": path} for path in sorted(infos)}

    def tree(self, kind, name, revision, folder=""):
        infos = self.listing(kind, name, revision)
        if folder and folder not in infos:
            raise Refusal(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        start = f"{folder}/" if folder else ""
        below = [path for path in infos if path.startswith(start)]
        if "recursive=true" not in self.query:
            below = [path for path in below if "/" not in path[len(start) :]]
        return [infos[path] for path in below]

    def paths_info(self, kind, name, revision):
        wanted = parse_qs(self.body.decode()).get("paths", [])
        infos = self.listing(kind, name, revision)
        return [info for path, info in infos.items() if path in wanted]

    def resolve(self, kind, name, revision, path):
        repo = self.repo(kind, name)
        self.check_gate(repo)
        sha, files = repo.at(revision)
        if path not in files:  # the commit is named: clients remember what isn't there
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        file = files[path]
        etag = f'"{file.etag}"'
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": etag,
            "X-Repo-Commit": sha,
        }
        if file.lfs:
            headers |= {"X-Linked-Size": file.size, "X-Linked-Etag": etag}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, headers, file.content
        start = int(wanted[1])
        end = min(int(wanted[2] or file.size), file.size - 1)
        if start > end:
            raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{file.size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{file.size}"
        return 206, headers, file.content[start : end + 1]

    def check_gate(self, repo):
        """Raises a Refusal where a repo is gated and this user wasn't let in."""
        readers = [repo.name.split("/")[0]]
        if repo.gated and repo.gated is not True:
            readers += repo.gated
        if repo.gated and self.user not in readers:
            raise Refusal(
                403 if self.user else 401,
                f"Access to {repo.name} is restricted and you are not in the authorized list. "
                f"Visit {self.hub.url}/{repo.path} to ask for access.",
                "GatedRepo",
            )

    def preupload(self, kind, name, revision):
        """Which files go by LFS, and what there is already: clients leave out what is the same."""
        _, files = self.repo(kind, name, write=True).at(revision)
        answers = []
        for wish in json.loads(self.body)["files"]:
            path = wish["path"]
            by_lfs = is_lfs(path, wish["size"], base64.b64decode(wish["sample"]))
            answer = {
                "path": path,
                "shouldIgnore": False,
                "oid": files[path].etag if path in files else None,
                "uploadMode": "lfs" if by_lfs else "regular",
            }
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, kind, name):
        """Where to upload which objects; nothing for those that are there."""
        repo = self.repo(kind, name, write=True)
        objects = []
        for wish in json.loads(self.body)["objects"]:
            if wish["oid"] not in repo.objects:
                upload = f"{self.hub.url}/lfs/{repo.kind}/{name}/{wish['oid']}"
                verify = f"{self.hub.url}/lfs/verify"
                wish["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(wish)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, kind, name, oid):
        """Stores an object; without a token, as at a signed address."""
        self.hub.repos[kind, name].objects[oid] = self.body
        return {}

    def commit(self, kind, name, revision):
        repo = self.repo(kind, name, write=True)
        sha, files = repo.at(revision)
        files = dict(files)
        for line in self.body.splitlines():
            item = json.loads(line)
            key = item["key"]
            value = item["value"]
            path = value.get("path")
            if key == "header" and value.get("parentCommit", sha) != sha:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), False)
            if key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise Refusal(400, f"The LFS object of {path} was not uploaded")
                files[path] = File(repo.objects[value["oid"]], True)
            if key in ("deletedFile", "deletedFolder"):
                for deleted in self.find_deleted(files, key, path):
                    del files[deleted]
        sha = repo.commit(files)
        url = f"{self.hub.url}/{repo.path}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url}

    def find_deleted(self, files, key, path):
        """The paths that a commit's deletion names."""
        if key == "deletedFile":
            deleted = [one for one in files if one == path]
        else:
            folder = path.rstrip("/") + "/"
            deleted = [one for one in files if one.startswith(folder)]
        if not deleted:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        return deleted


API = r"/api/(models|datasets)/([^/]+(?:/[^/]+)?)"
WEB = r"/(?:(datasets)/)?([^/]+(?:/[^/]+)?)"
ROUTES = [  # the first that fits answers; the groups, unquoted, are its arguments
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("GET", "/api/agent-harnesses", Handler.harnesses),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", API + "/revision/([^/]+)", Handler.info),
    ("GET", API + "/tree/([^/]+)/?(.*)", Handler.tree),
    ("POST", API + "/paths-info/([^/]+)", Handler.paths_info),
    ("POST", API + "/preupload/([^/]+)", Handler.preupload),
    ("POST", API + "/commit/([^/]+)", Handler.commit),
    ("GET", API, Handler.info),
    ("POST", WEB + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(models|datasets)/(.+)/([0-9a-f]{64})", Handler.lfs_upload),
    ("POST", "/lfs/verify", Handler.verify),
    ("GET", WEB + "/resolve/([^/]+)/(.+)", Handler.resolve),
]
