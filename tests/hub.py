"""A small Hub for the real ``huggingface_hub`` client: create, commit, look up, download."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def files(self):
        return self.server.files

    def answer(self, status, body=b"", head=False, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"{self.server.url}/me/adapter", "name": "me/adapter"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            found = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted
            ]
            return self.answer(200, {"files": found})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/me/adapter/commit/{COMMIT}"
            return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.answer(404, {"error": self.path})

    def resolve(self, head):
        match = re.match(
            r"(?:/api/resolve-cache/models)?/me/adapter/(?:resolve/)?[^/]+/(.+)", self.path
        )
        name = match.group(1).split("?")[0] if match else None
        if name in self.files:
            data = self.files[name]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.answer(200, data, head, ETag=etag, X_Repo_Commit=COMMIT)
        if self.path.startswith("/api/models/me/adapter"):
            names = [{"rfilename": n} for n in self.files]
            return self.answer(200, {"id": "me/adapter", "sha": COMMIT, "siblings": names}, head)
        return self.answer(404, {"error": "Entry not found"}, head, X_Error_Code="EntryNotFound")

    def do_GET(self):
        self.resolve(head=False)

    def do_HEAD(self):
        self.resolve(head=True)


def serve():
    """Start the server; it has ``url`` and ``files``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.url, server.files = f"http://127.0.0.1:{server.server_port}", {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
