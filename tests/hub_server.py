"""The Hugging Face Hub in small, on loopback and in memory, for its real clients.

    hub = TestHub()                                    # hub.url is http://127.0.0.1:<a free port>
    hub.put("models", "alice/tiny", {"config.json": b"{}"}, private=True)
    ...                                                # a client, with HF_ENDPOINT=hub.url
    hub.files("models", "alice/tiny"), hub.commits("models", "alice/tiny"), hub.requests

As on the real one, a repo that a client creates starts with a commit of .gitattributes, a private
repo is missing to all but its owner, an unknown token gets 401 even for public repos, and a gated
repo can be listed but not read. Unlike there: no Xet, no branch but main, no tags, pull
requests, organisations, redirects, pages or ranges; one namespace to write to.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Refusal(Exception):
    """An answer with an error's status."""

    def __init__(self, status, message, code=None, **headers):
        headers |= {"X-Error-Code": code, "X-Error-Message": message}
        headers = {key: value for key, value in headers.items() if value is not None}
        self.answer = status, headers, json.dumps({"error": message}).encode()


def by_lfs(path):
    """Whether a file is kept outside git, where its content is uploaded before the commit."""
    return path.endswith((".parquet", ".pt", ".safetensors"))


def oid(path, content):
    """The hash by which git, LFS and the clients tell whether a file has changed."""
    if by_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository and its commits, {sha: {path: content}}, the oldest first."""

    path: str
    private: bool
    gated: bool = False
    commits: dict = field(default_factory=dict)

    def commit(self, files):
        """Adds a commit of exactly these files. Returns its sha."""
        # Without a counter: caches outlive servers, and must stay right
        oids = sorted((path, oid(path, content)) for path, content in files.items())
        sha = hashlib.sha1(repr((self.path, list(self.commits), oids)).encode()).hexdigest()
        self.commits[sha] = dict(files)
        return sha

    def at(self, revision):
        """(the sha of a revision, its files)."""
        sha = list(self.commits)[-1] if revision == "main" else revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha]


@dataclass
class Failure:
    """The next `times` requests with `match` in "METHOD path" fail.

    They get `status` or are dropped: half of what they send is read or, where they send nothing,
    half of the answer is sent. With drop="answer" the request is carried out, and half of its
    answer lost.
    """

    match: str
    status: int | None = None
    times: float = 1
    drop: bool | str = False


class TestHub:
    __test__ = False  # no test case, despite its name

    def __init__(self):
        self.users = {}  # token: (name, role)
        self.repos = {}  # (kind, name): Repo
        self.objects = {}  # of LFS, sha256: content
        self.requests = []  # (method, path with query), also of those that fail
        self.lock = threading.RLock()
        self.server = None
        self.port = 0
        self.up()
        self.url = f"http://127.0.0.1:{self.port}"

    def put(self, kind, name, files, private=False, gated=False):
        """Commits exactly these files, to a new repo if need be."""
        path = f"datasets/{name}" if kind == "datasets" else name
        repo = self.repos.setdefault((kind, name), Repo(path, private))
        repo.private, repo.gated = private, gated
        return repo.commit(files)

    def files(self, kind, name):
        """{path: content} of a repo."""
        return dict(self.repos[kind, name].at("main")[1])

    def commits(self, kind, name):
        """The shas of a repo's commits, the oldest first."""
        return list(self.repos[kind, name].commits)

    def fail(self, match, status=None, **options):
        """Plays a Failure."""
        self.failures.append(Failure(match, status, **options))

    def down(self):
        """Connections aren't accepted."""
        server, self.server = self.server, None
        server.shutdown()
        server.server_close()

    def up(self):
        """Ends `down` and all failures."""
        self.failures = []
        if self.server is None:
            self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
            self.server.hub = self
            self.port = self.server.server_port
            threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()

    def note(self, method, path):
        """Logs a request. Returns the failure to play, or one that is none."""
        with self.lock:
            self.requests.append((method, path))
            for failure in self.failures:
                if failure.times and failure.match in f"{method} {path}":
                    failure.times -= 1
                    return failure
            return Failure("")


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
        failure = self.hub.note(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if failure.drop or not self.hub.server:
            self.close_connection = True
        if not self.hub.server:  # one kept from before `down`
            return
        self.body = self.rfile.read(length // 2 if failure.drop is True else length)
        if len(self.body) < length or (failure.drop and self.command == "HEAD"):
            return
        status, headers, content = self.answer(failure)
        headers = {"Content-Type": "application/json", "Content-Length": len(content)} | headers
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if failure.drop else content)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def answer(self, failure):
        """(status, headers, content) for the request."""
        try:
            if failure.status:
                raise Refusal(failure.status, "A failure on request", **{"Retry-After": 0})
            with self.hub.lock:
                answer = self.route()
        except Refusal as refusal:
            return refusal.answer
        return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())

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
            raise Refusal(403, "Forbidden")
        return repo

    def nothing(self):
        return {"errors": [], "warnings": [], "standardEnvVars": [], "harnesses": {}}

    def whoami(self):
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.role}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": self.user, "orgs": [], "auth": auth}

    def create(self):
        wish = json.loads(self.body)
        kind = "datasets" if wish.get("type") == "dataset" else "models"
        name = f"{wish.get('organization') or self.user}/{wish['name']}"
        answer = {"name": name, "url": f"{self.hub.url}/{name}"}
        if (kind, name) in self.hub.repos:  # the url is for `exist_ok`
            return 409, {}, json.dumps(answer | {"error": "You already created it"}).encode()
        is_private = wish.get("visibility") == "private"
        self.hub.put(kind, name, {".gitattributes": b"*.safetensors\n"}, is_private)
        return answer

    def info(self, kind, name, revision="main"):
        repo = self.repo(kind, name)
        sha, files = repo.at(revision)
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}

    def listing(self, kind, name, revision):
        """What the API says of each file and folder, by path."""
        _, files = self.repo(kind, name).at(revision)
        infos = {}
        for path, content in files.items():
            parts = path.split("/")
            for depth in range(1, len(parts)):
                infos["/".join(parts[:depth])] = {"type": "directory", "size": 0, "oid": 40 * "0"}
            infos[path] = {"type": "file", "size": len(content), "oid": oid(path, content)}
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

    def resolve(self, kind, name, revision, path):
        repo = self.repo(kind, name)
        if repo.gated:
            raise Refusal(403, f"Access to {name} is restricted.", "GatedRepo")
        sha, files = repo.at(revision)
        if path not in files:  # the commit is named: clients remember what isn't there
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        content = files[path]
        headers = {"Content-Type": "application/octet-stream", "X-Repo-Commit": sha}
        headers["ETag"] = f'"{oid(path, content)}"'
        return 200, headers, content

    def preupload(self, kind, name, revision):
        """What there is already: clients leave out what is the same."""
        _, files = self.repo(kind, name, write=True).at(revision)
        answers = []
        for wish in json.loads(self.body)["files"]:
            path = wish["path"]
            answer = {"path": path, "uploadMode": "lfs" if by_lfs(path) else "regular"}
            known = oid(path, files[path]) if path in files else None
            answers.append(answer | {"shouldIgnore": False, "oid": known})
        return {"files": answers}

    def lfs_batch(self, kind, name):
        """Where to upload which objects."""
        self.repo(kind, name, write=True)
        objects = json.loads(self.body)["objects"]
        for wish in objects:
            wish["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wish['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, sha256):
        """Stores an object; without a token, as at a signed address."""
        self.hub.objects[sha256] = self.body
        return {}

    def commit(self, kind, name, revision):
        repo = self.repo(kind, name, write=True)
        sha, files = repo.at(revision)
        files = dict(files)
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            if key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        url = f"{self.hub.url}/{repo.path}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url}


API = r"/api/(models|datasets)/([^/]+(?:/[^/]+)?)"
ROUTES = [  # the first that fits answers; the groups, unquoted, are its arguments
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("GET", "|/|/api/agent-harnesses", Handler.nothing),
    ("POST", "/api/validate-yaml", Handler.nothing),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", API + "/revision/([^/]+)", Handler.info),
    ("GET", API + "/tree/([^/]+)/?(.*)", Handler.tree),
    ("POST", API + "/preupload/([^/]+)", Handler.preupload),
    ("POST", API + "/commit/([^/]+)", Handler.commit),
    ("GET", API, Handler.info),
    ("POST", r"/(?:(datasets)/)?(.+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.lfs_upload),
    ("GET", r"/(?:(datasets)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", Handler.resolve),
]
