"""Break a training run again and again, and check that nothing is lost.

    python -m studies.torture                     # everything, half an hour on two cores
    python -m studies.torture --kills=100 --save_kills=0 --signals=0

Each part trains a small model in two processes on the CPU, once undisturbed and once with faults. Both must end with the
same weights, optimizer state and losses, bit for bit, and restarting must take nothing but the same command.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import checkpoint
from common import run_directory
from common.options import command, load_config
from tests import faults
from tests.ranks import Ranks, descendants, run_ranks
from tests.toy import make_shards, read_log, run_train, toy_argv, train_command, train_environment


@dataclass
class TortureConfig:
    kills: int = 100  # SIGKILLs of a random process of a torchrun (the launcher included), at random moments
    save_kills: int = 5  # SIGKILLs at each point inside a save
    signals: int = 50  # SIGTERM, SIGINT or SIGUSR1, at random moments
    seed: int = 1  # of the random moments and victims
    out: str = ""  # directory to work in; empty: a temporary one


def digests(out_dir):
    """{what: sha256} of a finished run: its final weights and optimizer state, and its log without the times."""
    last = Path(out_dir) / f"step_{checkpoint.steps(out_dir)[0]:08d}"
    assert checkpoint.damage(last) is None
    lines = [
        [*(record[key] for key in ("event", "step", "loss")), *map(record.get, ("grad_norm", "accuracy", "tokens"))]
        for event in ("train", "eval")
        for record in read_log(out_dir, event)
    ]
    parts = {name: (last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    parts["log"] = json.dumps(lines).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}


def alive(pid):
    """Whether a process is running (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def starts(out):
    """How often the run has got as far as training."""
    return len(read_log(out, "start"))


def phase(out, started):
    """What a run is doing, as far as its directory shows. started: starts(out) before this start."""
    if starts(out) == started:
        return "start-up"
    if list(Path(out).glob("*.tmp")):
        return "saving"
    events = [record for _, record in run_directory.read_log(out)]
    train = [record for record in events if record["event"] == "train"]
    if train and train[-1]["step"] % 10 == 0 and events[-1] == train[-1]:
        return "evaluation"
    return "training"


def counts(counter, text):
    return ", ".join(f"{count} {text} {name}" for name, count in sorted(counter.items()))


def kills(cfg, data, directory):
    """SIGKILL a random process of a torchrun at a random moment, until the run finishes; then the next run."""
    rng = random.Random(cfg.seed)
    options = {"max_steps": 300, "checkpoint_interval": 5, "eval_interval": 10, "keep_checkpoints": 2}
    straight = directory / "straight"
    assert run_train(toy_argv(data, straight, **options), processes=2).returncode == 0
    expected, killed, phases, victims, runs, slowest = digests(straight), 0, Counter(), Counter(), 0, 0.0
    while killed < cfg.kills:
        out = directory / f"run{runs}"
        argv = toy_argv(data, out, **options)
        while True:
            started = starts(out)
            with open(directory / "torchrun.txt", "w") as output:
                launcher = subprocess.Popen(train_command(argv, 2), env=train_environment(), stdout=output, stderr=output)
            if killed < cfg.kills:
                if rng.random() < 0.2:
                    time.sleep(rng.uniform(0, 5))
                else:
                    while starts(out) == started and launcher.poll() is None:
                        time.sleep(0.01)
                    time.sleep(rng.uniform(0, 1.5))
            else:
                launcher.wait()
            if launcher.poll() is not None:
                assert launcher.returncode == 0, (directory / "torchrun.txt").read_text()
                break
            workers = descendants(launcher.pid)
            victim = rng.choice([launcher.pid, *workers])
            phases[phase(out, started)] += 1
            victims["launcher" if victim == launcher.pid else "rank"] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            killed += 1
            killed_at = time.monotonic()
            while launcher.poll() is None or any(map(alive, workers)):
                assert time.monotonic() - killed_at < 60, "processes are still alive a minute after one was killed"
                time.sleep(0.01)
            slowest = max(slowest, time.monotonic() - killed_at)
            print(f"kill {killed}: {victim}, run {runs}, checkpoints {checkpoint.steps(out)}", flush=True)
        assert digests(out) == expected, f"{out} differs from {straight}"
        runs += 1
    return (
        f"{killed} kills ({counts(phases, 'in')}; {counts(victims, 'of a')}) over {runs} runs of 300 steps: "
        f"every run has the digests of the undisturbed one; the other processes ended within {slowest:.1f} s of the kill"
    )


def save_kills(cfg, data, directory):
    """SIGKILL the writing process at each point inside a save, each time after two saves that succeed."""
    rng = random.Random(cfg.seed)
    labels = directory / "points.txt"
    options = {"checkpoint_interval": 3, "eval_interval": 0, "keep_checkpoints": 2}
    argv = toy_argv(data, directory / "list", **{**options, "max_steps": 9})
    statuses, output = run_ranks(argv, 2, directory, {0: partial(faults.list_points, labels)})
    assert statuses == [0, 0], (statuses, output[-2000:])
    points = labels.read_text().splitlines()
    begins = [i for i, label in enumerate(points) if label.startswith("rmtree") and label.endswith(".tmp")]
    names = points[begins[-1] :]  # of the last save, which also removes an old checkpoint
    todo = [number for number in range(len(names)) for _ in range(cfg.save_kills)]
    rng.shuffle(todo)
    # Two saves succeed and the third is killed, so every start makes at least two intervals of progress.
    options["max_steps"] = 9 * len(todo) + 9
    argv = toy_argv(data, directory / "run", **options)
    for i, number in enumerate(todo):
        before = next(iter(checkpoint.steps(directory / "run")), 0)
        statuses, output = run_ranks(argv, 2, directory, {0: partial(faults.kill_at_point, number, 2)})
        assert statuses[0] == -signal.SIGKILL and statuses[1] in (3, 2), (names[number], statuses, output)
        newest = checkpoint.newest(directory / "run")
        reached = checkpoint.step_of(newest)
        assert reached in (before + 6, before + 9), (names[number], before, reached)  # lost: at most one interval
        print(f"save kill {i + 1} of {len(todo)}: after {names[number]}, newest {newest}", flush=True)
    for out in ("run", "straight"):
        statuses, output = run_ranks(toy_argv(data, directory / out, **options), 2, directory, timeout=600)
        assert statuses == [0, 0], (statuses, output[-2000:])
    assert digests(directory / "run") == digests(directory / "straight")
    return f"{len(todo)} kills at {len(names)} points of a save, {cfg.save_kills} each: the digests of the undisturbed run"


def signals(cfg, data, directory):
    """A signal to one rank or all, at a random moment of start-up, training, evaluation or saving."""
    rng = random.Random(cfg.seed)
    options = {"max_steps": 300, "checkpoint_interval": 5, "eval_interval": 5}
    statuses, output = run_ranks(toy_argv(data, directory / "straight", **options), 2, directory)
    assert statuses == [0, 0], (statuses, output[-2000:])
    argv, slowest, phases, i = toy_argv(data, directory / "run", **options), 0.0, Counter(), 0
    while i < cfg.signals:
        started = starts(directory / "run")
        ranks = Ranks(argv, 2, directory)
        early = rng.random() < 0.2
        if early:
            while "on 2 x" not in ranks.output():  # the first line printed; the handlers are installed by then
                time.sleep(0.002)
        else:
            while starts(directory / "run") == started:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.05, 0.6))
        number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        everyone = early or rng.random() < 0.5
        now = phase(directory / "run", started)
        sent = time.monotonic()
        ranks.signal(number, None if everyone else [rng.randrange(2)])
        statuses = ranks.wait(30)
        seconds = time.monotonic() - sent
        if statuses == [0, 0]:  # it had already finished
            shutil.rmtree(directory / "run")
            continue
        assert set(statuses) == {128 + number}, (statuses, now, ranks.output()[-3000:])
        newest = checkpoint.newest(directory / "run")
        assert newest or now == "start-up"
        i += 1
        slowest = max(slowest, seconds)
        phases[now] += 1
        print(f"signal {i}: {signal.Signals(number).name} in {now}, {seconds:.2f} s, newest {newest}", flush=True)
    statuses, output = run_ranks(argv, 2, directory)
    assert statuses == [0, 0], (statuses, output[-2000:])
    assert digests(directory / "run") == digests(directory / "straight")
    return (
        f"{i} signals ({counts(phases, 'in')}): all ranks exit together with 128 + n within {slowest:.2f} s, and the last run "
        "has the digests of the undisturbed one"
    )


@command
def main(argv):
    cfg = load_config(TortureConfig, argv)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(cfg.out or scratch)
        data = make_shards(scratch / "data")
        results = []
        for part in (kills, save_kills, signals):
            if getattr(cfg, part.__name__):
                (scratch / part.__name__).mkdir()
                start = time.monotonic()
                result = part(cfg, data, scratch / part.__name__)
                results.append(f"{part.__name__}: {result} [{time.monotonic() - start:.0f} s]")
                print(results[-1], flush=True)
        print("\n" + "\n".join(results))


if __name__ == "__main__":
    main()
