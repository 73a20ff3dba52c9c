"""A web server on a port of this machine, whose files change, vanish, and break off."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers by `handler`, whose server has `files`, {path: bytes}.

    faults: {path: [what happens to the first GET of the file, to the second, ...]}: a status of 400 to 599, the number of
    bytes after which the connection breaks, or None.
    """

    daemon_threads = True

    def __init__(self, files, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.files, self.faults = files, {name: [] for name in files}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass  # a client that hung up


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    headers_of_all = {}

    def fault_of(self, name):
        """What happens to this request."""
        return self.server.faults[name].pop(0) if self.command == "GET" and self.server.faults.get(name) else None

    def answer_file(self, contents, headers, fault, ranges=True):
        """The file, or the part of it that is asked for. ranges: whether a part can be sent."""
        if fault is not None and 400 <= fault < 600:
            self.answer(b"", fault)
        elif ranges and (wanted := self.headers.get("Range")):
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            part = {"Content-Range": f"bytes {first}-{min(last, len(contents) - 1)}/{len(contents)}"}
            self.answer(contents[first : last + 1], 206, headers | part, fault)
        else:
            self.answer(contents, 200, headers, fault)

    def answer(self, body, status=200, headers=(), breaks_after=None):
        self.send_response(status)
        for name, value in {**self.headers_of_all, "Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:breaks_after])
        self.close_connection = self.close_connection or breaks_after is not None

    def log_message(self, *_):
        pass


class Web(Server):
    """Serves `files`, and a page of links for each directory. ranges: whether it can send a part of a file."""

    def __init__(self, files, ranges=True):
        self.ranges = ranges
        super().__init__(files, Pages)


class Pages(Answers):
    def do_GET(self):
        web, name = self.server, self.path.partition("?")[0][1:]
        fault = self.fault_of(name)
        if name in web.files:
            etag = hashlib.sha256(web.files[name]).hexdigest()
            self.answer_file(web.files[name], {"ETag": f'"{etag}"'}, fault, web.ranges)
        elif name == "" or name.endswith("/"):
            inside = sorted({path.removeprefix(name).partition("/") for path in web.files if path.startswith(name)})
            self.answer("".join(f'<a href="{head}{slash}">x</a>\n' for head, slash, _ in inside).encode())
        else:
            self.answer(b"", 404)

    do_HEAD = do_GET
