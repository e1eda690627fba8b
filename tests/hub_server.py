"""A stand-in Hub on localhost: as much of the Hub's HTTP interface as this project's real clients need, in memory.

    with HubServer() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(tmp_path)})
        hub.repos["alice/my-toy"].files["README.md"]

What can go wrong is set on the server. `hub.fail("/commit/", 500)` makes it answer so from then on ("cut" for the
number: the connection ends without an answer; "silent": it stays open and no answer ever comes; "trickle": an answer
that never ends), `hub.dies_after_lfs = True` makes it fall silent once a large file has arrived, and
`hub.heal()` ends all of it.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN, READ_TOKEN, USER = "hf_secretWriteToken", "hf_secretReadToken", "alice"
LFS_SUFFIXES = (".safetensors", ".png", ".pt")


@dataclass
class Repo:
    private: bool = False
    files: dict = field(default_factory=lambda: {".gitattributes": b""})
    commits: list = field(default_factory=lambda: [hashlib.sha1(b"initial").hexdigest()])


class HubServer:
    """Serves `repos` ("namespace/name": Repo) in a thread; `requests` records (method, path, authorization)."""

    def __init__(self):
        self.repos, self.lfs, self.requests = {}, {}, []
        self.heal()

    def fail(self, path_part, how):
        self.failures.append((path_part, how))

    def heal(self):
        if hasattr(self, "healed"):
            self.healed.set()
        self.failures, self.dies_after_lfs, self.dead, self.healed = [], False, False, threading.Event()

    def environment(self, home, token=TOKEN):
        """Environment variables that point a fresh process at this server and at nothing else."""
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
        location = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**location, **switches, "HF_TOKEN": token}

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_message = lambda *_: None  # noqa: E731

    def _handle(self):
        body, path = self._read_body(), unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        failures = [how for part, how in self.hub.failures if part in path]
        if self.hub.dead or "cut" in failures:
            self.close_connection = True  # and no answer
        elif "silent" in failures:
            self.hub.healed.wait(120)
            self.close_connection = True
        elif "trickle" in failures:
            self._trickle(self.hub.healed)
        elif failures:
            self._send(failures[0], {"error": f"injected failure {failures[0]}"})
        else:
            self._route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _trickle(self, healed):
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        while not healed.wait(0.1):
            try:
                self.wfile.write(b" ")
            except OSError:  # the client has gone
                return

    def _route(self, path, body):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN, ""):
            return self._send(401, {"error": "Invalid user access token"})
        if path.startswith("/lfs/"):  # a signed address: no token
            assert hashlib.sha256(body).hexdigest() == path.split("/")[-1]
            self.hub.lfs[path.split("/")[-1]] = body
            self.hub.dead = self.hub.dies_after_lfs
            return self._send(200)
        if path == "/api/validate-yaml":
            return self._send(200, {"warnings": [], "errors": []})
        if path == "/api/whoami-v2":
            role = "write" if token == TOKEN else "read"
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
            return self._send(200, {"type": "user", "name": USER, "orgs": [], "auth": auth})
        if path == "/api/repos/create":
            return self._create(token, json.loads(body))
        name = r"(?P<repo>[^/]+/[^/]+?)"
        for pattern, action in {
            rf"/api/models/{name}/auth-check/write": self._auth_check,
            rf"/api/models/{name}/preupload/(?P<rev>.+)": self._preupload,
            rf"/api/models/{name}/commit/(?P<rev>.+)": self._commit,
            rf"/api/models/{name}/tree/(?P<rev>.+)": self._tree,
            rf"/api/models/{name}(/revision/(?P<rev>.+))?": self._info,
            rf"/{name}\.git/info/lfs/objects/batch": self._lfs_batch,
            rf"/{name}/resolve/(?P<rev>[^/]+)/(?P<path>.+)": self._resolve,
        }.items():
            if match := re.fullmatch(pattern, path):
                found = match.groupdict()
                repo = self.hub.repos.get(found["repo"])
                if repo is None or repo.private and not token:
                    return self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                writes = action in (self._auth_check, self._preupload, self._commit, self._lfs_batch)
                if writes and (token != TOKEN or not found["repo"].startswith(f"{USER}/")):
                    return self._send(403, {"error": "You don't have the rights to write here"})
                return action(repo, found, body)
        self._send(404, {"error": f"this stand-in has no {path}"})

    def _create(self, token, wanted):
        repo_id = f"{wanted['organization'] or USER}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if not token:
            return self._send(401, {"error": "Invalid username or password."})
        if token != TOKEN or not repo_id.startswith(f"{USER}/"):
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        if repo_id in self.hub.repos:
            return self._send(409, {"error": "You already created this model repo", **answer})
        self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        self._send(200, answer)

    def _auth_check(self, repo, found, body):
        self._send(200)

    def _preupload(self, repo, found, body):
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = _oid(file["path"], repo.files[file["path"]]) if file["path"] in repo.files else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": files})

    def _lfs_batch(self, repo, found, body):
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted if wanted["oid"] in self.hub.lfs else {**wanted, "actions": upload})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo, found, body):
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del repo.files[value["path"]]
        repo.commits.append(hashlib.sha1(body + repo.commits[-1].encode()).hexdigest())
        url = f"{self.hub.url}/{found['repo']}/commit/{repo.commits[-1]}"
        self._send(200, {"commitOid": repo.commits[-1], "commitUrl": url, "pullRequestUrl": None})

    def _info(self, repo, found, body):
        files = [{"rfilename": path} for path in repo.files]
        facts = {"sha": repo.commits[-1], "siblings": files, "private": repo.private, "tags": []}
        self._send(200, {"id": found["repo"], **facts})

    def _tree(self, repo, found, body):
        entries = []
        for path, data in repo.files.items():
            lfs = {"lfs": {"oid": _oid(path, data), "size": len(data), "pointerSize": 130}}
            entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            entries.append({**entry, **(lfs if path.endswith(LFS_SUFFIXES) else {})})
        self._send(200, entries)

    def _resolve(self, repo, found, body):
        headers = {"X_Repo_Commit": repo.commits[-1]}
        data = repo.files.get(found["path"])
        if data is None:
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **headers)
        headers["ETag"] = f'"{_oid(found["path"], data)}"'
        if found["path"].endswith(LFS_SUFFIXES):
            headers |= {"X_Linked_Etag": headers["ETag"], "X_Linked_Size": str(len(data))}
        self._send(200, data, **headers)


def _oid(path, data):
    """The id by which the client knows that a file has not changed: SHA-256 for LFS, git's SHA-1 otherwise."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
