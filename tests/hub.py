"""A stand-in for huggingface.co, on a port of this machine, for huggingface_hub and datasets themselves to talk to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath

COMMIT = "0123abcd" * 5


class Hub(ThreadingHTTPServer):
    """Serves one dataset, at one commit.

    files: {name: bytes}. faults: {name: [what happens to the first request for the file, to the second, ...]}: a status
    of 500 to 599, or the number of bytes after which the connection breaks. requests: what was asked for, in order.
    """

    daemon_threads = True

    def __init__(self, repo, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.files, self.faults, self.requests = repo, files, {name: [] for name in files}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass  # a client that hung up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0].strip("/")
        path = path.replace("/tree/main", f"/tree/{COMMIT}").replace("/resolve/main/", f"/resolve/{COMMIT}/")
        api, contents = f"api/datasets/{hub.repo}", f"datasets/{hub.repo}/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
            hub.requests.append("info")
            self.answer(json.dumps({"id": hub.repo, "sha": COMMIT}).encode())
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self.answer_tree(path.removeprefix(f"{api}/tree/{COMMIT}").strip("/"))
        elif path.startswith(contents) and path.removeprefix(contents) in hub.files:
            self.answer_file(path.removeprefix(contents))
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "EntryNotFound" if path.startswith(contents) else "RepoNotFound"})

    do_HEAD = do_GET

    def answer_tree(self, folder):
        """The files and folders directly in a folder."""
        entries, depth = {}, len(PurePosixPath(folder).parts)
        for name in filter(lambda name: PurePosixPath(name).is_relative_to(folder), self.server.files):
            parts = PurePosixPath(name).parts
            entry = {"type": "file", "size": len(self.server.files[name])} if len(parts) == depth + 1 else {"type": "directory"}
            path = "/".join(parts[: depth + 1])
            entries[path] = {"path": path, "oid": "0", **entry}
        self.answer(json.dumps(list(entries.values())).encode())

    def answer_file(self, name):
        hub, contents, wanted = self.server, self.server.files[name], self.headers.get("Range")
        headers, fault = {"X-Repo-Commit": COMMIT, "ETag": '"0"'}, None
        if self.command == "GET":
            hub.requests.append(name)
            fault = hub.faults[name].pop(0) if hub.faults[name] else None
        if fault is not None and 500 <= fault < 600:
            self.answer(b"", fault)
        elif wanted:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{min(last, len(contents) - 1)}/{len(contents)}"
            self.answer(contents[first : last + 1], 206, headers, fault)
        else:
            self.answer(contents, 200, headers, fault)

    def answer(self, body, status=200, headers=(), breaks_after=None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:breaks_after])
        self.close_connection = self.close_connection or breaks_after is not None

    def log_message(self, *_):
        pass
