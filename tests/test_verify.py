"""tools/verify.py: sound directories pass, a single wrong byte is named."""

import pytest

from tests.toy import make_documents, make_shards
from tools import verify


def test_verify(tmp_path, capsys):
    a, b = (make_shards(tmp_path / name, make_documents(30)) for name in "ab")
    verify.main([f"--data_dir={a},{b}"])
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 3 shards, all digests, offsets and tokens are right" for path in (a, b)
    ]
    for argv in ([a, b], [a, "--data-dir", b], [f"{a},{b}"], [f"{a}/manifest.json", b]):  # as people type it
        verify.main(argv)
        assert capsys.readouterr().out.count("3 shards, all digests") == 2
    path = tmp_path / "b" / "train_00001.bin"
    contents = bytearray(path.read_bytes())
    contents[-2] ^= 1  # still a token of the vocabulary: only the digest can tell
    path.write_bytes(contents)
    (tmp_path / "a" / "tokenizer.json").unlink()
    missing = f"{a}/tokenizer.json: No such file or directory (damaged: copy it again, or remove {a} and prepare it again, with --tokenizer=RUN/tokenizer.json to resume a run)"
    for argv, says in (([b], f"{path}: digest differs"), ([], "--data_dir: not given"), (["--data=x"], "--data: unknown option"), ([a], missing)):
        with pytest.raises(SystemExit) as stopped:
            verify.main(argv)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and error.startswith(f"error: {says}")
