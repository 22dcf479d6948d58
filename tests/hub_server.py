"""The Hugging Face Hub in small, on loopback and in memory, for its real clients: nothing in them is mocked.

    hub = TestHub()                                    # hub.url is http://127.0.0.1:<a free port>
    hub.put("models", "alice/tiny", {"config.json": b"{}"}, private=True)
    ...                                                # a client in a process of its own
    hub.files("models", "alice/tiny"), hub.commits("models", "alice/tiny"), hub.requests
    hub.close()

What a client's process needs in its environment before it imports anything:

    HF_ENDPOINT=hub.url  HF_TOKEN=hf_test_writer  HF_HOME=<a folder of its own>, but no HF_HUB_CACHE, HF_DATASETS_CACHE
    HF_HUB_DISABLE_XET=1  or, with hf_xet installed, a client uploads by Xet without asking the server
    HF_HUB_OFFLINE=0  TRANSFORMERS_OFFLINE=0  HF_DATASETS_OFFLINE=0, where something has set them
    HF_HUB_DISABLE_TELEMETRY=1  HF_UPDATE_DOWNLOAD_COUNTS=0  NO_PROXY=127.0.0.1, so that nothing goes to other hosts

As on the real one, a repo that a client creates starts with a commit of .gitattributes, a private repo is missing to
all but its owner, an unknown token gets 401 even for public repos, and a gated repo can be listed but not read. Unlike
there: no branch but main, no tags, pull requests, organisations, redirects or pages; one namespace to write to.
"""
import base64
import hashlib
import json
import re
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote

LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".npy", ".npz", ".parquet", ".pkl", ".pt", ".pth", ".safetensors", ".zip")


def is_lfs(path, size, sample):
    return path.endswith(LFS_SUFFIXES) or size > 10 * 2**20 or b"\0" in sample


class Refusal(Exception):
    def __init__(self, status, message, code=None, **headers):
        headers |= {"X-Error-Code": code, "X-Error-Message": message.encode("ascii", "replace").decode()}
        headers = {key: value for key, value in headers.items() if value is not None}
        self.answer = status, headers, json.dumps({"error": message}).encode()


class File:
    def __init__(self, content, lfs):
        self.content, self.size, self.lfs = content, len(content), lfs
        self.oid = hashlib.sha1(b"blob %d\0" % self.size + content).hexdigest()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.etag = self.sha256 if lfs else self.oid  # what clients compare to see whether a file has changed
        self.info = {"type": "file", "size": self.size, "oid": self.oid} | (
            {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if lfs else {})


class Repo:
    def __init__(self, kind, name, private, gated=False):
        self.kind, self.name, self.private, self.gated = kind, name, private, gated
        self.path = "datasets/" * (kind == "datasets") + name
        self.commits, self.objects = {}, {}  # sha: {path: File}, the oldest first; sha256: what LFS has brought

    def commit(self, files):
        what = self.path, list(self.commits), sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(repr(what).encode()).hexdigest()  # no counter: caches outlive servers, and must stay right
        self.commits[sha] = files
        return sha

    def at(self, revision):
        sha = list(self.commits)[-1] if revision == "main" else revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha]


class TestHub:
    __test__ = False  # no test case, whatever its name

    def __init__(self):
        self.users = {"hf_test_writer": ("alice", "write"), "hf_test_reader": ("rob", "read")}  # token: name, role
        self.repos = {}  # (kind, name): Repo, whose `private` and `gated` may be read and set
        self.requests = []  # (method, path with query), also of those that fail
        self.lock, self.server, self.port = threading.RLock(), None, 0
        self.up()
        self.url = f"http://127.0.0.1:{self.port}"

    def put(self, kind, name, files, private=False, gated=False):
        """Commits exactly these files, to a new repo if need be. gated: True, or who may read besides the owner."""
        repo = self.repos.setdefault((kind, name), Repo(kind, name, private))
        repo.private, repo.gated = private, gated
        stored = {path: File(content, is_lfs(path, len(content), content[:512])) for path, content in files.items()}
        repo.objects |= {file.sha256: file.content for file in stored.values() if file.lfs}
        return repo.commit(stored)

    def files(self, kind, name, revision="main"):
        return {path: file.content for path, file in self.repos[kind, name].at(revision)[1].items()}

    def commits(self, kind, name):
        return list(self.repos[kind, name].commits)  # the oldest first

    def fail(self, match, status=None, times=1, after=0, retry_after=None, delay=0.0, drop=False):
        """After `after` requests with `match` in "METHOD path", the next `times` (None: all) of them fail.

        They get `status` (503 if nothing else is asked for), or wait `delay` seconds for their answer, or are dropped:
        half of what they send is read or, where they send nothing, half of the answer is sent. With drop="answer"
        the request is carried out, and half of its answer lost.
        """
        self.failures.append(SimpleNamespace(
            match=match, status=status or (None if delay or drop else 503), delay=delay, drop=drop, seen=0, first=after,
            last=sys.maxsize if times is None else after + times, headers={"Retry-After": retry_after}))

    def down(self, after=0, refuse=False):
        """`after` more requests are answered; then connections are closed at once or, with `refuse`, not accepted."""
        self.left, self.refuse = after, refuse
        if refuse and not after:
            self.close()

    def up(self):
        """Ends `down` and all failures."""
        self.left, self.refuse, self.failures = None, False, []
        if not self.server:
            self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
            self.server.hub, self.port = self, self.server.server_port
            threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self):
        server, self.server, self.left = self.server, None, 0
        if server:
            server.shutdown()
            server.server_close()

    def note(self, method, path):
        """Logs a request. Returns whether the hub is up, and the failure to play."""
        if path == "/api/agent-harnesses":  # asked now and then, once in an HF_HOME: not to be counted
            return self.left != 0, None
        with self.lock:
            self.requests.append((method, path))
            if self.left == 0:
                if self.refuse:
                    self.close()
                return False, None
            self.left = self.left and self.left - 1
            hits = [failure for failure in self.failures if failure.match in f"{method} {path}"]
            for failure in hits:
                failure.seen += 1
            return True, next((failure for failure in hits if failure.first < failure.seen <= failure.last), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
    log_message = lambda *_: None

    def handle(self):
        with suppress(ConnectionError):  # a client that went away is no error here
            super().handle()

    def serve(self):
        self.hub, length = self.server.hub, int(self.headers.get("Content-Length", 0))
        is_up, failure = self.hub.note(self.command, self.path)
        drop = failure and failure.drop
        time.sleep(failure.delay if failure else 0)
        self.body = self.rfile.read(length // 2 if drop is True else length) if is_up else b""
        whole = is_up and len(self.body) == length
        self.close_connection |= bool(drop) or not whole
        if not whole or drop and self.command == "HEAD":
            return
        try:
            if failure and failure.status:
                raise Refusal(failure.status, "A failure on request", **failure.headers)
            with self.hub.lock:
                answer = self.route()
            status, headers, content = answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
        except Refusal as refusal:
            status, headers, content = refusal.answer
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json", "Content-Length": len(content)} | headers).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:len(content) // 2] if drop else content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def route(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.user, self.role = self.hub.users.get(token, (None, None))
        path, _, self.query = self.path.partition("?")
        for method, pattern, answer in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                return answer(self, *(group and unquote(group) for group in match.groups()))
        raise Refusal(404, f"{self.command} {path} is not part of this server")

    def repo(self, kind, name, write=False):
        repo, own = self.hub.repos.get((kind or "models", name)), self.user == name.split("/")[0]
        if not repo or repo.private and not own:
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not (own and self.role == "write"):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def whoami(self):
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "fullname": self.user, "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": self.role}}}

    def create(self):
        user, wish = self.whoami()["name"], json.loads(self.body)
        kind, owner = {"dataset": "datasets"}.get(wish.get("type"), "models"), wish.get("organization") or user
        if self.role != "write" or owner != user:
            raise Refusal(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        repo = Repo(kind, f"{owner}/{wish['name']}", wish.get("visibility") == "private")
        answer = {"name": repo.name, "url": f"{self.hub.url}/{repo.path}"}
        if (kind, repo.name) in self.hub.repos:  # the url is for `exist_ok`
            return 409, {}, json.dumps(answer | {"error": f"You already created this {kind[:-1]} repo"}).encode()
        repo.commit({".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        self.hub.repos[kind, repo.name] = repo
        return answer

    def info(self, kind, name, revision="main"):
        repo = self.repo(kind, name)
        sha, files = repo.at(revision)
        return {"id": name, "author": name.split("/")[0], "sha": sha, "private": repo.private, "disabled": False,
                "gated": bool(repo.gated) and "manual", "tags": [], "siblings": [{"rfilename": path} for path in files]}

    def listing(self, kind, name, revision):
        """What the API says of each file and folder, by path."""
        files = self.repo(kind, name).at(revision)[1]
        folders = {path[:i] for path in files for i, letter in enumerate(path) if letter == "/"}
        infos = {path: {"type": "directory", "size": 0, "oid": 40 * "0"} for path in folders}
        infos |= {path: file.info for path, file in files.items()}
        return {path: infos[path] | {"path": path} for path in sorted(infos)}

    def tree(self, kind, name, revision, folder=""):
        infos, start, deep = self.listing(kind, name, revision), folder and f"{folder}/", "recursive=true" in self.query
        if folder and folder not in infos:
            raise Refusal(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        return [info for path, info in infos.items()
                if path.startswith(start) and (deep or "/" not in path[len(start):])]

    def paths_info(self, kind, name, revision):
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return [info for path, info in self.listing(kind, name, revision).items() if path in wanted]

    def resolve(self, kind, name, revision, path):
        repo = self.repo(kind, name)
        if repo.gated and self.user not in [name.split("/")[0], *(() if repo.gated is True else repo.gated)]:
            raise Refusal(403 if self.user else 401, f"Access to {name} is restricted and you are not in the authorized"
                          f" list. Visit {self.hub.url}/{repo.path} to ask for access.", "GatedRepo")
        sha, files = repo.at(revision)
        if path not in files:  # the commit is named: clients remember what isn't there
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        file, size, etag = files[path], files[path].size, f'"{files[path].etag}"'
        headers = {"Content-Type": "application/octet-stream", "ETag": etag, "X-Repo-Commit": sha} | (
            {"X-Linked-Size": size, "X-Linked-Etag": etag} if file.lfs else {})
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, headers, file.content
        start, end = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if start > end:
            raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        return 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"}, file.content[start:end + 1]

    def preupload(self, kind, name, revision):
        """Which files go by LFS, and what is there already: clients leave out what hasn't changed."""
        etags = {path: file.etag for path, file in self.repo(kind, name, write=True).at(revision)[1].items()}
        return {"files": [
            {"path": wish["path"], "shouldIgnore": False, "oid": etags.get(wish["path"]),
             "uploadMode": "lfs" if is_lfs(wish["path"], wish["size"], base64.b64decode(wish["sample"])) else "regular"}
            for wish in json.loads(self.body)["files"]]}

    def lfs_batch(self, kind, name):
        repo = self.repo(kind, name, write=True)
        base = f"{self.hub.url}/lfs"
        return {"transfer": "basic", "objects": [wish if wish["oid"] in repo.objects else wish | {"actions": {
            "upload": {"href": f"{base}/{repo.kind}/{name}/{wish['oid']}"}, "verify": {"href": f"{base}/verify"}}}
            for wish in json.loads(self.body)["objects"]]}

    def lfs_upload(self, kind, name, oid):  # without a token, as to a signed address
        self.hub.repos[kind, name].objects[oid] = self.body
        return {}

    def commit(self, kind, name, revision):
        repo = self.repo(kind, name, write=True)
        sha, files = repo.at(revision)
        for item in map(json.loads, self.body.splitlines()):
            key, value, path = item["key"], item["value"], item["value"].get("path")
            if key == "header" and value.get("parentCommit", sha) != sha:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files = files | {path: File(base64.b64decode(value["content"]), False)}
            if key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise Refusal(400, f"The LFS object of {path} was not uploaded")
                files = files | {path: File(repo.objects[value["oid"]], True)}
            if key.startswith("deleted"):
                folder = path.rstrip("/") + "/"
                gone = {p for p in files if (p == path if key == "deletedFile" else p.startswith(folder))}
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {p: file for p, file in files.items() if p not in gone}
        sha = repo.commit(files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo.path}/commit/{sha}"}


API, WEB = r"/api/(models|datasets)/([^/]+(?:/[^/]+)?)", r"/(?:(datasets)/)?([^/]+(?:/[^/]+)?)"
ROUTES = [  # the first that fits answers; the groups, unquoted, are its arguments
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("GET", "/api/agent-harnesses", lambda handler: {"standardEnvVars": [], "harnesses": {}}),
    ("POST", "/api/validate-yaml", lambda handler: {"errors": [], "warnings": []}),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", API + "/revision/([^/]+)", Handler.info),
    ("GET", API + "/tree/([^/]+)/?(.*)", Handler.tree),
    ("POST", API + "/paths-info/([^/]+)", Handler.paths_info),
    ("POST", API + "/preupload/([^/]+)", Handler.preupload),
    ("POST", API + "/commit/([^/]+)", Handler.commit),
    ("GET", API, Handler.info),
    ("POST", WEB + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(models|datasets)/(.+)/([0-9a-f]{64})", Handler.lfs_upload),
    ("POST", "/lfs/verify", lambda handler: {}),
    ("GET", WEB + "/resolve/([^/]+)/(.+)", Handler.resolve),
]
