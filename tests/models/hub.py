"""A small hub on this machine: what the client asks of the real one when a model is published."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_of_the_tests"
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = re.compile(r"[a-z0-9.-]+")


class Hub:
    """Repositories by id; each has branches of files, and is changed by commits.

    Args:
        owner: the only name that the token may write to.
    """

    def __init__(self, owner="me"):
        self.owner = owner
        self.private = {}
        self.branches = {}
        self.commits = []
        self.stored = {}
        self.requests = []
        self.endpoint = ""

    def files(self, repo_id, branch="main"):
        """Contents by name."""
        return self.branches[repo_id][branch]

    def answer(self, method, path, body, headers):
        """The status and JSON value of a request."""
        self.requests.append((method, path))
        if method == "PUT":
            self.stored[path.rpartition("/")[2]] = body
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            return 200, {}
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return self._validated(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._created(json.loads(body))
        return self._of_repository(path, body)

    def _of_repository(self, path, body):
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._action(o) for o in json.loads(body)["objects"]]}
        found = re.fullmatch(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>\w+)/(?P<branch>[^/]+))?", path)
        if found is None:
            return 404, {"error": "Sorry, we can't find the page you are looking for."}
        return getattr(self, f"_{found['what'] or 'revision'}")(found["repo"], found["branch"] or "main", body)

    def _created(self, asked):
        repo_id = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != self.owner:
            return 403, {"error": f'You don\'t have the rights to create a model under "{asked["organization"]}"'}
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.branches:
            return 409, {"error": "You already created this model repo", "url": url}
        self.private[repo_id] = asked.get("visibility") == "private"
        self.branches[repo_id] = {"main": {".gitattributes": b"*.safetensors filter=lfs"}}
        return 200, {"url": url}

    def _validated(self, content):
        stated = yaml.safe_load(content.split("---")[1])
        for name, kind in (("base_model", _ID), ("license", _LICENSE)):
            if name in stated and not kind.fullmatch(stated[name]):
                return 400, {"errors": [{"message": f'"{name}" is not valid'}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def _revision(self, repo_id, branch, _):
        if repo_id not in self.branches:
            return 404, {"error": "Repository not found"}
        siblings = [{"rfilename": name} for name in self.files(repo_id, branch)]
        return 200, {"id": repo_id, "private": self.private[repo_id], "siblings": siblings, "sha": "0" * 40}

    def _branch(self, repo_id, branch, _):
        if branch in self.branches[repo_id]:
            return 409, {"error": "Reference already exists"}
        self.branches[repo_id][branch] = dict(self.files(repo_id))
        return 201, {}

    def _preupload(self, repo_id, branch, body):
        modes = {True: "lfs", False: "regular"}
        files = [
            {
                "path": file["path"],
                "shouldIgnore": False,
                "uploadMode": modes[file["path"].endswith(("rs", "png"))],
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}

    def _action(self, wanted):
        href = f"{self.endpoint}/lfs/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def _commit(self, repo_id, branch, body):
        lines = [json.loads(line) for line in body.splitlines()]
        written = {}
        for line in lines[1:]:
            value = line["value"]
            is_large = line["key"] == "lfsFile"
            written[value["path"]] = self.stored[value["oid"]] if is_large else base64.b64decode(value["content"])
        self.files(repo_id, branch).update(written)
        self.commits.append((repo_id, branch, lines[0]["value"]["summary"], set(written)))
        oid = f"{len(self.commits):040x}"
        return 200, {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid}


@contextmanager
def served(hub):
    """Answer requests at ``hub.endpoint`` of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def respond(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = hub.answer(self.command, self.path.partition("?")[0], body, self.headers)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if "error" in value:
                self.send_header("X-Error-Message", value["error"])
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = respond  # noqa: N815 - names of http.server

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
