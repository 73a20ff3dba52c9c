"""The watchdog: what ends a run before its last step. A signal, a process that hangs, or a process that is lost.

SIGTERM, SIGINT and SIGUSR1 ask a run to stop. It is enough to ask one process: all of them stop after the same step,
with a checkpoint. During start-up, when there is nothing to lose, and on a second SIGINT the process ends immediately; on a
second SIGTERM too, unless it is saving already, as a step may last for hours. Launchers such as `timeout -s INT` forward a
signal that the process already got, so one soon after the first does not count as a second one. Exit status:

    0          finished
    1          a bug, with its traceback; or Python was stuck: "Timeout" and where
    2          an error, reported in one line
    3          another process hangs or is lost; the same command resumes from the newest checkpoint
    128 + n    stopped by signal n, with a checkpoint; the same command resumes (torchrun itself then ends with 1)

A thread does all of this. It also publishes this process's step in the rendezvous store, so that the survivors can say
who is behind.

Read next: checkpoint.py
"""

import contextlib
import datetime
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist

from common.options import UserError, report, say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TICK = 0.5  # seconds between checks of the other processes
# The same signal within so many seconds is a launcher's forward, not a second request. Schedulers repeat SIGTERM, too.
SAME_SECONDS = {signal.SIGINT: 1, signal.SIGTERM: 5}
STORE_SECONDS = 5  # after which a store that does not answer counts as gone
SHARED_SECONDS = 30  # how long the other ranks wait for rank 0 to print an error that all share
STANDSTILL_SECONDS = 30  # grace beyond hang_timeout before the faulthandler timer fires: this thread's slowest tick takes 27
LOST = 3  # exit status


class Watch:
    """The watchdog of this process, from its creation to close(). hang_timeout: seconds without progress; 0: no limit."""

    def __init__(self, hang_timeout):
        self.hang_timeout = hang_timeout
        self.signal, self.asked_at = 0, 0.0  # the signal that asked this process to stop, and when
        self.training = False  # set by the caller once there is something to save
        self.saving = False  # set by the caller once the last checkpoint is all that is left
        self.step, self.passes, self.since = 0, 0, time.monotonic()  # progress, and the time of the last
        self.rank, self.world_size, self.store = 0, 1, None
        self.turn, self.asking = threading.Lock(), threading.Thread()  # see _ask
        self.asked = None  # see all_stop
        # torchrun's workers must not outlive it: nobody would notice them, and they would hold out_dir's lock.
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        if self.launcher == 1 and b"torch" not in open("/proc/1/cmdline", "rb").read():
            raise SystemExit(128 + signal.SIGHUP)  # already gone
        self.wake, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            # Python writes a signal's number into this socket immediately, even while the main thread waits inside a
            # collective; the handler itself has nothing to do.
            self.old_waker = signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
            self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def close(self):
        if self.handlers:
            signal.set_wakeup_fd(self.old_waker)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        self.waker.send(b"\0")
        self.thread.join(timeout=TICK)  # it may still be waiting for a store that is gone

    def join(self, rank, world_size):
        """Watch the other processes too, now that they have found each other."""
        self.rank, self.world_size = rank, world_size
        if world_size > 1:
            store = dist.distributed_c10d._get_default_store().clone()  # a store client serves one thread
            store.set_timeout(datetime.timedelta(seconds=STORE_SECONDS))
            store.set(f"watch/{rank}", self._place())
            self.store = store
            self._arm()

    def at(self, step):
        """Training has reached this step."""
        self.step, self.passes, self.since = step, 0, time.monotonic()

    def progress(self, *_):
        """Another forward pass of the step is done. Works as a module's forward hook."""
        self.passes, self.since = self.passes + 1, time.monotonic()

    def all_stop(self, asked):
        """Whether all processes are to stop after this step; the same answer in all of them.

        asked: 0-dim tensor, how many of them were asked to. The answer is that of the previous step, so that the host
        never waits for the device to reach this one.
        """
        if self.world_size == 1:
            return self.signal > 0
        before, event = self.asked or (torch.zeros(()), None)
        self.asked = asked.to("cpu", non_blocking=True), torch.cuda.Event() if asked.is_cuda else None
        if asked.is_cuda:
            self.asked[1].record()
        if event:
            event.synchronize()
        return before.item() > 0

    def leave(self, process):
        """End this process once all are here. Raises: SystemExit."""
        raise SystemExit(128 + int(max(row[0] for row in process.gather([self.signal]))))

    def fail(self, error):
        """Print an error and terminate this rank immediately.

        The others may be waiting for it, and NCCL would wait for them when its group is destroyed, with the reason
        unreported (pytorch/torchtitan, pull request 1342). Errors common to all ranks are printed by rank 0, after it has
        finished the checkpoint it was writing. The others wait for that, since torchrun kills all when one ends.
        """
        self._exchange()
        shared = isinstance(error, UserError) and not error.this_rank_only
        if shared and self.rank > 0:
            for _ in range(round(SHARED_SECONDS / TICK)):
                if self._ask(lambda: self.store.check(["watch/ended"])) is not False:  # None: the store is gone with rank 0
                    os._exit(2)
                time.sleep(TICK)
        status = report(error, anyway=True)
        self._ask(lambda: self.store.add("watch/ended", 1))
        if shared:
            time.sleep(3 * TICK)  # until the others know that it is printed; the store may end with this process
        os._exit(status)

    def lost(self, error):
        """If the error means that another process is gone, exit, naming the rank that is behind unless that one said why."""
        if self.world_size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            self._exchange()
            if self.signal:  # it was stopped too, before it began to train
                os._exit(128 + self.signal)
            self._end("lost contact with another process")

    def _run(self):
        while True:
            self._arm()
            ready = select.select([self.wake], [], [], TICK)[0]
            for number in self.wake.recv(64) if ready else b"":
                if number == 0:
                    faulthandler.cancel_dump_traceback_later()
                    return
                if number in SIGNALS:
                    self._stop(number)
            if self.launcher and os.getppid() != self.launcher:
                self.launcher = None
                self._stop(signal.SIGHUP)
            if self.store:
                self._exchange()
            if self.store and self.hang_timeout and time.monotonic() - self.since > self.hang_timeout:
                time.sleep(2 * TICK)  # until the others have published where they are
                self._end(f"no progress for {self.hang_timeout} s")

    def _arm(self):
        """End this process if it does not get here again in time.

        A library that waits for a GPU while it holds the GIL stops all Python threads. This timer does not need the GIL.
        """
        if self.store and self.hang_timeout and sys.__stderr__:
            faulthandler.dump_traceback_later(self.hang_timeout + STANDSTILL_SECONDS, exit=True, file=sys.__stderr__)

    def _stop(self, number):
        name, since = signal.Signals(number).name, time.monotonic() - self.asked_at
        again = number == signal.SIGINT or number == self.signal == signal.SIGTERM and not self.saving
        if self.signal and again and since > SAME_SECONDS[number]:
            if self.rank == 0:
                text = f"{name} again: the unfinished step is abandoned; the same command resumes from the newest checkpoint"
                say(text, sys.stderr)
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.asked_at = number, time.monotonic()
            if self.training and self.rank == 0:
                also = f", or {name} again after {SAME_SECONDS[number]} s" if number == signal.SIGTERM else ""
                text = f"{name}: stopping after this step, with a checkpoint (Ctrl-C{also}: at once, without one)"
                say(text, sys.stderr)
        if not self.training:
            if self.store:
                self._exchange()
                time.sleep(1.2 * TICK)  # until the others have seen it
            if not self.training:
                os._exit(128 + self.signal)

    def _exchange(self):
        """Publish where this process is, and see whether another was asked to stop."""

        def exchange():
            if not self.store:  # an error before the processes met
                return
            self.store.set(f"watch/{self.rank}", self._place())
            if self.signal:
                self.store.set("watch/signal", str(int(self.signal)))
            elif self.store.check(["watch/signal"]):
                return int(self.store.get("watch/signal"))

        if heard := self._ask(exchange):  # None if the store's host is gone; then there will be no progress either
            self._stop(heard)

    def _ask(self, question):
        """question(), which uses the store, or None if the store is gone.

        If the store's host is cut off, a request blocks forever, whatever its timeout. So a thread makes it, one at a time.
        """
        answers = []

        def ask():
            with contextlib.suppress(RuntimeError):
                answers.append(question())

        with self.turn:
            if self.asking.is_alive():
                return None
            self.asking = threading.Thread(target=ask, name="store", daemon=True)
            self.asking.start()
            self.asking.join(STORE_SECONDS + 1)
            return answers[0] if answers else None

    def _place(self):
        return f"{self.step} {self.passes}"

    def _behind(self):
        """Which ranks are behind, as text."""
        places = {}
        for rank in range(self.world_size):
            step, passes = map(int, self.store.get(f"watch/{rank}").split())
            places.setdefault((step, passes), []).append(rank)
        if len(places) == 1:
            return f"all processes are at step {self.step}"
        (step, passes), ranks = min(places.items())
        who = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
        others = "others are at {} after {}".format(*max(places))
        return f"{who} behind, last seen at step {step} after {passes} forward passes; {others}"

    def _end(self, reason):
        self._exchange()
        first = self._ask(lambda: self.store.add("watch/ended", 1) == 1)
        text = self._ask(self._behind) or "the rendezvous store is gone with its process, or its host is cut off"
        if first is not False:
            hint = "the same command resumes from the newest checkpoint"
            say(f"error: {reason}: {text} ({hint})", sys.stderr)
        time.sleep(2 * TICK)  # until the others know that it is printed, since torchrun kills all when one ends
        os._exit(LOST)
