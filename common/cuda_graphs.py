"""CUDA graphs of a training step: hundreds of kernel launches become one."""

from dataclasses import fields

import torch

from common.batch import Batch


class GraphedStep:
    """step(batch, *tensors), replayed as a CUDA graph from the second batch of a shape on.

    step: takes a Batch and tensors on the GPU, and returns one. It must not wait for the GPU, and what it reads and
    writes besides must keep its address. A step on a small batch is some 700 kernels of a few microseconds: on an H100,
    6.6 ms of work for 32 pairs of MRPC, but 53 ms to launch one by one from Python.

    The graphs share memory of their own, as much as the largest batch takes, beside that of a batch whose shape is new. So
    nothing is captured where the first batches took more than half of the GPU's: large models, which don't need it.
    """

    def __init__(self, step):
        self.step, self.graphs, self.pool, self.fits = step, {}, torch.cuda.graph_pool_handle(), None

    def __call__(self, batch, *tensors):
        batch = Batch(**{field.name: getattr(batch, field.name) for field in fields(Batch)})  # without a MicroBatch's counts
        shape = tuple(x.shape if torch.is_tensor(x) else x for x in vars(batch).values())
        if shape not in self.graphs:
            self.graphs[shape] = None  # run this one eagerly: it warms up what must not happen during capture
            return self.step(batch, *tensors)
        if self.fits is None:  # the first one that would be captured
            self.fits = 2 * torch.cuda.max_memory_allocated() <= torch.cuda.mem_get_info()[1]
        if not self.fits:
            return self.step(batch, *tensors)
        given = [x for x in (*vars(batch).values(), *tensors) if torch.is_tensor(x)]
        if self.graphs[shape] is None:
            inputs, static, graph = batch.map(torch.clone), [x.clone() for x in tensors], torch.cuda.CUDAGraph()
            # Records, executes nothing. thread_local: meanwhile other threads may allocate pinned memory.
            with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream(), capture_error_mode="thread_local"):
                result = self.step(inputs, *static)
            static = [x for x in (*vars(inputs).values(), *static) if torch.is_tensor(x)]
            self.graphs[shape] = graph, static, result
        graph, static, result = self.graphs[shape]
        torch._foreach_copy_(static, given)
        graph.replay()
        return result.clone()  # the next graph may reuse this memory
