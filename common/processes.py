"""This process: its place among those of the run, its device, and the collectives that training needs.

torchrun starts the processes and puts RANK, WORLD_SIZE and LOCAL_RANK into the environment; without it there is one.
"""

import datetime
import os
import platform
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common import watch
from common.options import UserError, say


@dataclass
class Process:
    """This process among those of the run. On a GPU `dtype` is that of autocast; weights are float32."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def gather(self, values):
        """(world_size, len(values)) nested list: every process's numbers, on all of them. Waits for the GPU."""
        mine = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        everyone = [mine]
        if self.world_size > 1:
            everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
            dist.all_gather(everyone, mine)
        return to_host(torch.stack(everyone)).tolist()

    def all_reduce(self, tensor):
        """`tensor`, summed over the processes in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor):
        """`tensor`, the largest over the processes in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def check_equal(self, values, except_for=()):
        """Raises: UserError, on all processes, naming rank and option, if the dictionaries `values` differ, e.g. between hosts."""
        everyone = [values] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, values)
        for rank, other in enumerate(everyone):
            for name in sorted(other.keys() | everyone[0].keys()):
                here, there = other.get(name), everyone[0].get(name)
                if here != there and name not in except_for:
                    hint = "all hosts need the same command, configuration and shards"
                    raise UserError(f"rank {rank} has {name}={here}, rank 0 {name}={there} ({hint})")

    def broadcast(self, value):
        """Rank 0's picklable `value`, on every process."""
        if self.world_size > 1:
            values = [value]
            dist.broadcast_object_list(values, device=self.device)
            value = values[0]
        return value

    def broadcast_tensor(self, tensor):
        """Overwrite `tensor` with rank 0's."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)

    def say(self, text):
        """Print on rank 0."""
        if self.rank == 0:
            say(text)


def to_host(tensor):
    """`tensor` on the CPU, through pinned memory.

    A blocking copy to pageable memory would stall the checkpoint thread's copies.
    """
    copy = tensor.to("cpu", non_blocking=True)
    if tensor.device.type == "cuda":
        torch.cuda.current_stream(tensor.device).synchronize()
    return copy


def pick_device(device, dtype):
    """(torch.device, torch.dtype) for the options `device` (auto, cpu, cuda) and `dtype` (auto, float32, bfloat16).

    Raises: UserError when this machine cannot do what they ask.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: PyTorch sees no GPU here (use --device=cpu, or install PyTorch's CUDA build)")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), torch.bfloat16 if dtype == "bfloat16" else torch.float32
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        raise UserError(f"{device}: there are {torch.cuda.device_count()} GPUs (lower --nproc_per_node)", True)
    torch.cuda.set_device(device)
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype == "bfloat16" and not has_bf16:
        raise UserError(f"dtype=bfloat16: {torch.cuda.get_device_name(device)} has no bf16 (use --dtype=float32)")
    return device, torch.bfloat16 if dtype != "float32" and has_bf16 else torch.float32


@contextmanager
def joined(device, dtype, hang_timeout):
    """(Process, Watch) while this process is part of the run; on exit the process group is always destroyed.

    device, dtype: as in pick_device. hang_timeout: see Watch. Raises: UserError.
    """
    watchdog = watch.Watch(hang_timeout)
    try:
        process = join(device, dtype, hang_timeout)
        watchdog.join(process.rank, process.world_size)
        yield process, watchdog
    except SystemExit as stopped:
        # Its traceback keeps the model alive. DDP must not be the last to hold the process group: it frees it without
        # releasing the GIL, and joins Gloo's thread, which may be waiting for the GIL to free a tensor.
        traceback.clear_frames(stopped.__traceback__)
        raise
    except Exception as error:
        watchdog.lost(error)
        if dist.is_initialized():
            watchdog.fail(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        watchdog.close()


def join(device, dtype, hang_timeout):
    """This Process, once it has joined the others that torchrun started."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and "RANK" not in os.environ:
        hint = "start it with torchrun, or unset WORLD_SIZE"
        raise UserError(f"WORLD_SIZE={world_size} in the environment, and no RANK ({hint})")
    # Before CUDA starts. Micro-batches differ in size; blocks cached for one would not fit the next.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device, dtype = pick_device(device, dtype)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # The watchdog, and the timer behind it, act first and report more.
        timeout = datetime.timedelta(seconds=hang_timeout + 2 * watch.STANDSTILL_SECONDS) if hang_timeout else None
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    return Process(int(os.environ.get("RANK", 0)), world_size, device, dtype)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def memory_of(device):
    """Bytes of memory, those in use included."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
