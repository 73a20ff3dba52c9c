"""A web server on a port of this machine, whose files change, vanish, and break off."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web(ThreadingHTTPServer):
    """Serves `files`, {path: bytes}, and a page of links for each directory.

    faults: {path: [what happens to the first GET of the file, to the second, ...]}: a status of 400 to 599, the number of
    bytes after which the connection breaks, or None. ranges: whether it can send a part of a file.
    """

    daemon_threads = True

    def __init__(self, files, ranges=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.ranges = files, {name: [] for name in files}, ranges
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
        web, name = self.server, self.path.partition("?")[0][1:]
        fault = web.faults[name].pop(0) if self.command == "GET" and web.faults.get(name) else None
        if fault is not None and 400 <= fault < 600:
            self.answer(b"", fault)
        elif name in web.files:
            contents, headers = web.files[name], {"ETag": f'"{hashlib.sha256(web.files[name]).hexdigest()}"'}
            if web.ranges and (wanted := self.headers.get("Range")):
                first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                headers["Content-Range"] = f"bytes {first}-{min(last, len(contents) - 1)}/{len(contents)}"
                self.answer(contents[first : last + 1], 206, headers, fault)
            else:
                self.answer(contents, 200, headers, fault)
        elif name == "" or name.endswith("/"):
            inside = sorted({path.removeprefix(name).partition("/") for path in web.files if path.startswith(name)})
            self.answer("".join(f'<a href="{head}{slash}">x</a>\n' for head, slash, _ in inside).encode())
        else:
            self.answer(b"", 404)

    do_HEAD = do_GET

    def answer(self, body, status=200, headers=(), breaks_after=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:breaks_after])
        self.close_connection = self.close_connection or breaks_after is not None

    def log_message(self, *_):
        pass
