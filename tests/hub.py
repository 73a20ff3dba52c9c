"""A stand-in for huggingface.co, on a port of this machine, for huggingface_hub and datasets themselves to talk to."""

import json
from pathlib import PurePosixPath

from tests.web import Answers, Server

COMMIT = "0123abcd" * 5


class Hub(Server):
    """Serves one dataset, at one commit. requests: what was asked for, in order."""

    def __init__(self, repo, files):
        self.repo, self.requests = repo, []
        super().__init__(files, Handler)


class Handler(Answers):
    headers_of_all = {"Content-Type": "application/json"}

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
            name = path.removeprefix(contents)
            hub.requests += [name] * (self.command == "GET")
            self.answer_file(hub.files[name], {"X-Repo-Commit": COMMIT, "ETag": '"0"'}, self.fault_of(name))
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
