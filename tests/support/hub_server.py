"""A small hub on 127.0.0.1 that speaks the hub's protocol to the real huggingface_hub; files live in memory.

`hub.add(repository, path, content)`, then huggingface_hub with HF_ENDPOINT at `hub.endpoint`.  Large files (`lfs`) are
served as the hub does: HEAD and GET of /resolve answer with a redirect to another address, with the hash as
X-Linked-Etag.  What should go wrong is set on the hub: `refuse`, `break_after`, `damage`.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = 50
RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)")


class Hub:
    """Repositories, and what should go wrong."""

    def __init__(self):
        self.files = {}  # (kind, repository, path): (content, whether it is lfs)
        self.token = None  # that every request must carry
        self.gated = set()  # repositories
        self.refusals = []  # (status, headers) for the next requests
        self.break_after = None  # bytes after which a connection breaks
        self.breaks_left = 0
        self.damage = False  # the content arrives with another last byte
        self.is_the_hub = True  # or something that answers everything with a page
        self.requests = []  # (method, path, headers)
        self.endpoint = None

    def add(self, repository, path, content, kind="models", lfs=True):
        self.files[kind, repository, path] = (content.encode() if isinstance(content, str) else content, lfs)

    def break_connections(self, after, times=10**6):
        self.break_after, self.breaks_left = after, times

    def downloads(self):
        """Returns how often the content of each file was asked for."""
        return Counter(
            path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/cdn/" in path
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        address = urlsplit(self.path)
        path = unquote(address.path)
        hub.requests.append((self.command, path, dict(self.headers)))
        if not hub.is_the_hub:
            return self.reply(200, b"<html>Welcome</html>", {"Content-Type": "text/html"})
        if hub.refusals:
            status, headers = hub.refusals.pop(0)
            return self.reply(status, b"", headers)
        if path.startswith("/cdn/"):
            return self.content(*path.removeprefix("/cdn/").split("/", 1))
        if found := RESOLVE.fullmatch(path):
            return self.resolve(found[1] or "models", *found.groups()[1:])
        if found := TREE.fullmatch(path):
            return self.tree(*found.groups(), parse_qs(address.query))
        return self.reply(404, b"")

    def refused(self, kind, repository, revision):
        """Answers a request for what is not there or not allowed; returns whether it did."""
        hub = self.server.hub
        given = self.headers.get("Authorization")
        if hub.token and given not in (None, f"Bearer {hub.token}"):
            self.reply(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository in hub.gated and given is None:
            self.reply(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif not any((kind, repository) == key[:2] for key in hub.files) or (hub.token and given is None):
            self.reply(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
        elif revision not in ("main", "v1", COMMIT):
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return False
        return True

    def resolve(self, kind, repository, revision, path):
        hub = self.server.hub
        if self.refused(kind, repository, revision):
            return
        headers = {"X-Repo-Commit": COMMIT}
        if (kind, repository, path) not in hub.files:
            return self.reply(
                404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            )
        content, lfs = hub.files[kind, repository, path]
        if not lfs:
            return self.send_content(content, headers | {"ETag": f'"{git_hash(content)}"'})
        sha = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
        place = f"http://localhost:{self.server.server_port}/cdn/{sha}/{path}"  # another host than 127.0.0.1
        return self.reply(302, b"", headers | {"Location": place})

    def tree(self, kind, repository, revision, query):
        if self.refused(kind, repository, revision):
            return
        hub = self.server.hub
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            | (
                {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}
                if lfs
                else {}
            )
            for (of_kind, name, path), (content, lfs) in sorted(hub.files.items())
            if (of_kind, name) == (kind, repository)
        ]
        folders = {entry["path"].rpartition("/")[0] for entry in entries} - {""}
        entries += [{"type": "directory", "path": folder, "oid": COMMIT} for folder in sorted(folders)]
        begin = int(query.get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if begin + PAGE < len(entries):
            following = f"{hub.endpoint}/api/{kind}/{repository}/tree/{revision}?recursive=True&cursor={begin + PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        return self.reply(200, json.dumps(entries[begin : begin + PAGE]).encode(), headers)

    def content(self, sha, path):
        """Sends a large file."""
        hub = self.server.hub
        assert "Authorization" not in self.headers  # a token must not leave the hub
        contents = (content for content, _ in hub.files.values())
        return self.send_content(
            next(content for content in contents if hashlib.sha256(content).hexdigest() == sha), {}
        )

    def send_content(self, content, headers):
        """Sends bytes, from where a range begins."""
        hub, total = self.server.hub, len(content)
        if hub.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin:
            content = content[int(begin[1]) :]
            headers["Content-Range"] = f"bytes {begin[1]}-{total - 1}/{total}"
        return self.reply(206 if begin else 200, content, headers)

    def reply(self, status, content, headers=None):
        hub = self.server.hub
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.break_after is not None and hub.breaks_left and "/cdn/" in self.path:
            hub.breaks_left -= 1
            self.wfile.write(content[: hub.break_after])
            self.close_connection = True
            return
        self.wfile.write(content)


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def environment(hub, home):
    """Returns the variables that lead huggingface_hub to this hub, with an empty cache in `home`."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


@contextmanager
def running_hub():
    """Yields a hub that listens on 127.0.0.1 until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub, hub.endpoint = hub, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
