"""Two hosts, and one loses its network in the middle of training.

The hosts are network namespaces on this machine, joined by a virtual cable: each has its own address and loopback, and
they share only the file system. Needs root (CAP_NET_ADMIN) and iproute2; otherwise the tests are skipped with the reason.

    python -m pytest -m slow -v tests/test_two_hosts.py
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.toy import ROOT, make_shards, read_log, run_train, toy_argv, train_environment

HANG_TIMEOUT = 5  # seconds
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """A network namespace with one interface."""

    def __init__(self, number):
        self.number, self.address = number, ADDRESSES[number]
        self.name, self.interface = f"mosaic{os.getpid()}_{number}", f"cable{number}"

    def command(self, *words, **options):
        """Start a subprocess on this host."""
        environment = train_environment(GLOO_SOCKET_IFNAME=self.interface)
        return subprocess.Popen(["ip", "netns", "exec", self.name, *words], env=environment, **options)

    def torchrun(self, argv, output, *options):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *options, str(ROOT / "train.py"), *argv]
        with open(output, "w") as file:
            return self.command(*command, stdout=file, stderr=file)

    def pull_the_cable(self):
        ip("-n", self.name, "link", "set", self.interface, "down")


@pytest.fixture
def hosts():
    if not shutil.which("ip"):
        pytest.skip("no `ip` command (install iproute2)")
    first, second = found = [Host(0), Host(1)]
    try:
        try:
            for host in found:
                ip("netns", "add", host.name)
            cable = ["type", "veth", "peer", "name", second.interface, "netns", second.name]
            ip("link", "add", first.interface, "netns", first.name, *cable)
            for host in found:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
                for interface in ("lo", host.interface):
                    ip("-n", host.name, "link", "set", interface, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield found
    finally:
        for host in found:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", host.name)


def wait_all(launchers, seconds):
    """Their exit statuses. Raises subprocess.TimeoutExpired if one is still running after so many seconds."""
    end = time.monotonic() + seconds
    try:
        return [launcher.wait(max(0.1, end - time.monotonic())) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_loses_its_network_ends_the_run_and_the_other_can_resume(hosts, tmp_path, lost):
    """Two processes per host. lost: the host that is cut off; host 0 has rank 0, which writes, here to a shared disk."""
    data = make_shards(tmp_path / "data")
    options = {"hidden_dropout": 0, "max_steps": 120, "checkpoint_interval": 20, "eval_interval": 0}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    result = run_train(toy_argv(data, straight, **options))
    assert result.returncode == 0, result.stderr

    argv = toy_argv(data, broken, hang_timeout=HANG_TIMEOUT, **options)
    outputs = [tmp_path / f"host{host.number}.txt" for host in hosts]
    together = ["--nnodes=2", f"--master_addr={hosts[0].address}", "--master_port=29500"]
    launchers = [host.torchrun(argv, output, *together, f"--node_rank={host.number}") for host, output in zip(hosts, outputs)]
    while not (broken / "step_00000040").exists():
        assert all(launcher.poll() is None for launcher in launchers), [output.read_text() for output in outputs]
        time.sleep(0.005)
    hosts[lost].pull_the_cable()
    assert wait_all(launchers, HANG_TIMEOUT + 30) == [1, 1]
    texts = [output.read_text() for output in outputs]
    reason = f"error: no progress for {HANG_TIMEOUT} s: "
    # What they published last is up to half a second old, so one of the two lost ranks may seem ahead of the other.
    assert re.search(reason + r"(ranks 2, 3 are|rank [23] is) behind, last seen at step \d+ after", texts[0]), texts[0]
    assert reason + "the rendezvous store is gone with its process, or its host is cut off" in texts[1]
    for text in texts:
        assert "(the same command resumes from the newest checkpoint)" in text

    left = hosts[1 - lost]
    (status,) = wait_all([left.torchrun(argv, tmp_path / "left.txt", "--standalone")], 120)
    assert status == 0, (tmp_path / "left.txt").read_text()
    first, second = read_log(broken, "start")
    assert (first["world_size"], second["world_size"]) == (4, 2)
    assert 40 <= int(second["resumed_from"][-8:]) < 120
    records = [read_log(out) for out in (straight, broken)]
    assert [r["step"] for r in records[1]] == list(range(1, 121))
    assert [r["tokens"] for r in records[1]] == [r["tokens"] for r in records[0]]
    assert [r["loss"] for r in records[1]] == pytest.approx([r["loss"] for r in records[0]], rel=1e-5)
