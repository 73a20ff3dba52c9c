"""common/remote.py: text on the network, by fsspec, with a stand-in for S3 in memory and a web server on this machine."""

import gzip
import json
import sys
from pathlib import Path

import pytest

import prepare_c4
from common import remote
from tests.corpus import files_of, make_texts, prepare, prepare_fails, stored, texts_of, workplace, write_files  # noqa: F401
from tests.test_sources import parquet
from tests.web import Web

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402
from fsspec.registry import _registry  # noqa: E402

FILES = {
    "a.jsonl": b"".join(json.dumps({"text": text}).encode() + b"\n" for text in make_texts(200, seed=1)),
    "b.txt.gz": gzip.compress("\n".join(make_texts(300, seed=2)).encode(), mtime=0),
    "sub/c.parquet": parquet(text=make_texts(100, seed=3)),
    "sub/d.csv": b"id,text\n" + b"".join(b"%d,%s\n" % (i, text.encode()) for i, text in enumerate(make_texts(50, seed=4))),
}
TEXTS = [text for seed, count in enumerate((200, 300, 100, 50), 1) for text in make_texts(count, seed)]


class FakeS3(MemoryFileSystem):
    """Objects in memory, with an ETag, and a memory of what it was told, as s3fs has them."""

    protocol = ("s3",)
    store, pseudo_dirs, known = {}, [""], {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3:/"))

    def unstrip_protocol(self, name):
        return f"s3:/{name}"

    def info(self, path, **options):
        if path not in self.known:
            found = super().info(path, **options)
            self.known[path] = found | ({"ETag": str(hash(self.cat(path)))} if found["type"] == "file" else {})
        return self.known[path]

    def invalidate_cache(self, path=None):
        self.known.clear()


@pytest.fixture
def bucket(monkeypatch):
    """A FakeS3 that holds FILES in s3://bucket/texts."""
    monkeypatch.setitem(_registry, "s3", FakeS3)
    FakeS3.store.clear()
    FakeS3.known.clear()
    s3 = FakeS3()
    for name, contents in FILES.items():
        s3.pipe(f"s3://bucket/texts/{name}", contents)
    return s3


@pytest.fixture
def web(monkeypatch):
    """A Web that holds FILES in texts/, read 2,000 bytes at a time."""
    pytest.importorskip("aiohttp", reason="pip install -r requirements-slow.txt")
    monkeypatch.setattr(remote, "READ_AHEAD", 2000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Web({f"texts/{name}": contents for name, contents in FILES.items()}) as server:
        yield server


@pytest.fixture
def waits(monkeypatch):
    """The seconds between tries, which are not waited for."""
    found = []
    monkeypatch.setattr(remote.time, "sleep", found.append)
    return found


def test_a_directory_of_a_bucket(bucket, capsys):
    """Its documents are those of local files, and the manifest has the objects' versions."""
    bucket.pipe("s3://bucket/texts/notes.pdf", b"%PDF-")
    prepare(source="s3://bucket/texts", val_docs=20)
    assert "s3://bucket/texts: 4 files to read; skipped 1 .pdf" in capsys.readouterr().out
    assert sorted(texts_of(stored()) + texts_of(stored("val"))) == sorted(TEXTS) and len(stored("val")) == 20
    manifest = json.loads(Path("out/manifest.json").read_text())
    names = [f"s3://bucket/texts/{name}" for name in sorted(FILES)]
    assert [segment[:3] for segment in manifest["sources"]] == [[name, 0, len(FILES[name[18:]])] for name in names]
    assert manifest["modified"] == {name: str(hash(FILES[name[18:]])) for name in names}
    write_files({f"texts/{name}": contents for name, contents in FILES.items()})
    prepare(source="texts", val_docs=20, out="local")
    of_shards = [{name: contents for name, contents in files_of(out).items() if name.endswith(".bin")} for out in ("out", "local")]
    assert of_shards[0] == of_shards[1]


@pytest.mark.parametrize("source, count", [("s3://bucket/texts/*", 500), ("s3://bucket/texts/**/*.csv", 50), ("s3://bucket/texts/a.jsonl", 200)])
def test_patterns_and_single_objects(bucket, source, count):
    prepare(source=source, val_fraction=0)
    assert len(stored()) == count


def test_a_changed_object_is_noticed(bucket, monkeypatch, capsys):
    """Also one of the same size, before the command is repeated or while it is read."""
    prepare(source="s3://bucket/texts/a.jsonl", val_fraction=0)
    prepare(source="s3://bucket/texts/a.jsonl", val_fraction=0)
    assert "nothing to do" in capsys.readouterr().out
    changed = FILES["a.jsonl"].replace(b"w1", b"w2", 1)
    bucket.pipe("s3://bucket/texts/a.jsonl", changed)
    error = prepare_fails(capsys, source="s3://bucket/texts/a.jsonl", val_fraction=0)
    assert error.startswith("error: out: holds shards that differ: s3://bucket/texts/a.jsonl was changed (")
    write_shard = prepare_c4.write_shard

    def edits(*arguments):
        bucket.pipe("s3://bucket/texts/a.jsonl", FILES["a.jsonl"])
        return write_shard(*arguments)

    monkeypatch.setattr(prepare_c4, "write_shard", edits)
    error = prepare_fails(capsys, source="s3://bucket/texts/a.jsonl", val_fraction=0, out="again")
    assert error.startswith("error: s3://bucket/texts/a.jsonl: was changed while it was read")


def test_tasks_share_a_bucket(bucket, monkeypatch, capsys):
    monkeypatch.setattr(prepare_c4, "UNIT_BYTES", 1)
    prepare(source="s3://bucket/texts", val_docs=20, out="alone")
    for task in ("2/3", "1/3", "3/3"):
        prepare(source="s3://bucket/texts", val_docs=20, task=task)
    prepare(source="s3://bucket/texts", val_docs=20, join=True)
    assert files_of("out") == files_of("alone")
    prepare(source="s3://bucket/texts", val_docs=20, out="other", task="1/2")
    bucket.pipe("s3://bucket/texts/a.jsonl", FILES["a.jsonl"].replace(b"w1", b"w2", 1))
    error = prepare_fails(capsys, source="s3://bucket/texts", val_docs=20, out="other", task="2/2")
    assert "s3://bucket/texts/a.jsonl was changed" in error


def test_a_bad_line_of_an_object_is_named(bucket, capsys):
    bucket.pipe("s3://bucket/texts/a.jsonl", FILES["a.jsonl"] + b"{\n")
    assert prepare_fails(capsys, source="s3://bucket/texts/a.jsonl").startswith("error: s3://bucket/texts/a.jsonl:201: not valid JSON")
    assert prepare_fails(capsys, source="s3://bucket/no/a.txt").startswith("error: s3://bucket/no/a.txt: cannot be read: FileNotFoundError")
    assert prepare_fails(capsys, source="s3://bucket/texts/*.tsv").startswith("error: s3://bucket/texts/*.tsv: no such source (")


@pytest.mark.parametrize("scheme, module", [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_missing_package_is_named(monkeypatch, capsys, scheme, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(_registry, scheme, raising=False)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    error = prepare_fails(capsys, source=f"{scheme}://host/a.txt")
    assert error.startswith(f"error: {scheme}://host/a.txt: ") and module in error and "pip install 'fsspec[" in error


def test_an_unknown_scheme(capsys):
    says = "error: s4://host/a.txt: Protocol not known: s4 (expected https://, s3://, gs:// or another scheme of fsspec)\n"
    assert prepare_fails(capsys, source="s4://host/a.txt") == says


@pytest.mark.slow
def test_files_of_the_web(web, waits):
    names = ["a.jsonl", "b.txt.gz?download=1", "sub/c.parquet", "sub/d.csv"]
    prepare(source=",".join(f"{web.url}/texts/{name}" for name in names), val_fraction=0, workers=2)
    assert texts_of(stored()) == TEXTS and not waits
    versions = json.loads(Path("out/manifest.json").read_text())["modified"]
    assert len(versions) == 4 and all(len(etag) == 66 for etag in versions.values())


@pytest.mark.slow
def test_a_page_of_links(web, capsys):
    prepare(source=f"{web.url}/texts/", val_fraction=0)
    assert f"{web.url}/texts/: 2 files to read; skipped 1 directories" in capsys.readouterr().out
    assert texts_of(stored()) == TEXTS[:500]
    prepare(source=f"{web.url}/texts/*.gz", val_fraction=0, out="pattern")
    assert texts_of(stored(out="pattern")) == TEXTS[200:500]


@pytest.mark.slow
def test_a_broken_connection_loses_and_repeats_nothing(web, waits):
    whole = None
    web.faults["texts/a.jsonl"] = [503, whole, 100, 0, 500, whole, 429]
    web.faults["texts/sub/c.parquet"] = [whole, 502, 7]
    prepare(source=f"{web.url}/texts/a.jsonl,{web.url}/texts/sub/c.parquet", val_fraction=0)
    assert texts_of(stored()) == TEXTS[:200] + TEXTS[500:600] and not any(web.faults.values())
    assert sorted(waits) == [1, 1, 1, 1, 2, 2, 4]


@pytest.mark.slow
def test_what_the_web_refuses(web, waits, monkeypatch, capsys):
    error = prepare_fails(capsys, source=f"{web.url}/no.txt")
    assert error.startswith(f"error: {web.url}/no.txt: cannot be read: ClientResponseError: 404, message='Not Found'") and not waits
    assert "HF_HUB" not in error
    assert "/no/: cannot be read: FileNotFoundError" in prepare_fails(capsys, source=f"{web.url}/no/")
    error = prepare_fails(capsys, source="http://127.0.0.1:1/a.txt")
    assert "a.txt: cannot be read: ClientConnectorError: Cannot connect to host 127.0.0.1:1" in error and waits == [1, 2, 4, 8, 8]
    web.faults["texts/a.jsonl"] = [None] * 3 + [100] * 6
    error = prepare_fails(capsys, source=f"{web.url}/texts/a.jsonl", val_fraction=0, out="cut")
    assert error.startswith(f"error: {web.url}/texts/a.jsonl:") and "cannot be read: ClientPayloadError: " in error
    assert "the same command resumes" in error
    prepare(source=f"{web.url}/texts/a.jsonl", val_fraction=0, out="cut")
    web.ranges = False
    web.files["long.txt"] = b"w1\n" * 20_000
    error = prepare_fails(capsys, source=f"{web.url}/long.txt", out="whole")
    assert "doesn't appear to support range requests" in error


@pytest.mark.slow
def test_s3_itself(monkeypatch):
    """s3fs, against moto's server."""
    pytest.importorskip("s3fs", reason="pip install -r requirements-slow.txt")
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'").ThreadedMotoServer(port=0)
    server.start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3, _ = remote.connect("s3://bucket")
    s3.mkdir("bucket")
    for name, contents in FILES.items():
        s3.pipe(f"bucket/texts/{name}", contents)
    try:
        prepare(source="s3://bucket/texts/", val_fraction=0)
        assert texts_of(stored()) == TEXTS and len(set(json.loads(Path("out/manifest.json").read_text())["modified"].values())) == 4
    finally:
        server.stop()
