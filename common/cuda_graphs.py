"""CUDA graphs of a training step: hundreds of kernel launches become one."""

import torch


class GraphedStep:
    """step(batch), replayed as a CUDA graph from the second batch of a shape on.

    step: takes a Batch and returns a tensor on the GPU. It must not wait for the GPU, and what it reads and writes besides
    must keep its address. A step on a small batch is some 700 kernels of a few microseconds: on an H100, 6.6 ms of work
    for 32 pairs of MRPC, but 53 ms to launch one by one from Python.
    """

    def __init__(self, step):
        self.step, self.graphs, self.pool = step, {}, torch.cuda.graph_pool_handle()

    def __call__(self, batch):
        shape = tuple(x.shape if torch.is_tensor(x) else x for x in vars(batch).values())
        if shape not in self.graphs:
            self.graphs[shape] = None  # run this one eagerly: it warms up what must not happen during capture
            return self.step(batch)
        if self.graphs[shape] is None:
            inputs, graph = batch.map(torch.clone), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream()):  # records, executes nothing
                result = self.step(inputs)
            self.graphs[shape] = graph, inputs, result
        graph, inputs, result = self.graphs[shape]
        for name, static in vars(inputs).items():
            if torch.is_tensor(static):
                static.copy_(getattr(batch, name))
        graph.replay()
        return result.clone()  # the next graph may reuse this memory
