"""How long a step takes on more GPUs than this machine has: a model fed with the measurements of scaling.py.

step time = one GPU's time for its share + waiting for the GPU with the most rows + the part of the gradient all-reduce
that the backward pass does not hide.

Read next: studies/scaling.py
"""

import functools
import itertools
import math

import numpy as np

from data import SEQUENCE_MULTIPLE, TOKEN_MULTIPLE, split_evenly

BACKWARD = 2 / 3  # of a step's matrix products are in its backward pass
NETWORK_SHARE = 0.8  # of a node's network bandwidth that an all-reduce reaches: an assumption
HOP_SECONDS = 10e-6  # latency per doubling of nodes, each way: an assumption
SAMPLED_STEPS = 10  # whose split into micro-batches is looked at
PREDICTED = [2**i for i in range(10)]  # numbers of GPUs


@functools.cache
def lengths_of(samples):
    """Tokens in each sample, without [CLS] and [SEP]. Cached: a prediction splits the same samples in many ways."""
    return samples.locate(np.arange(len(samples)))[2]


def padded_rows(samples, cfg, count, micro_batch_tokens, gpus):
    """(micro-steps, gpus) rows that each GPU computes in SAMPLED_STEPS steps: the padded stream, or BERT's padded batch."""
    work = []
    for step in range(SAMPLED_STEPS):
        numbers, _ = samples.of_step(step, count, cfg.seed)
        lengths = lengths_of(samples)[numbers] + 2
        if samples.padded:
            bounds = split_evenly(np.full_like(lengths, cfg.seq_length), micro_batch_tokens, gpus)
            rows = -(-np.diff(bounds) // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE * cfg.seq_length
        else:
            bounds = split_evenly(lengths, micro_batch_tokens, gpus)
            tokens = np.add.reduceat(lengths, bounds[:-1])
            rows = -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
        work.append(rows.reshape(-1, gpus))
    return np.concatenate(work)


def imbalance(work):
    """How much longer the GPU with the most rows takes, summed over micro-steps, than if all had equally many."""
    return float(work.max(1).sum() / work.mean(1).sum() - 1)


def reduction_seconds(link, buckets, gpus, per_node, node_gbits):
    """(seconds to all-reduce the gradients within each node, seconds in all).

    A ring moves 2 (n - 1) / n of the bytes through each link, both within a node and between nodes. NCCL pipelines the
    two, so the slower one counts. Within: at the rate measured here. Between: over all adapters of a node together, in this
    many buckets.
    """
    n = link["gpus"]
    link_rate = 2 * (n - 1) / n * link["bytes"] / max(link["seconds"] - link["groups"] * link["latency"], 1e-9)
    inside, nodes = min(gpus, per_node), math.ceil(gpus / per_node)
    within = 2 * (inside - 1) / inside * link["bytes"] / link_rate + link["groups"] * link["latency"]
    between = 2 * (nodes - 1) / nodes * link["bytes"] / (NETWORK_SHARE * node_gbits / 8 * 1e9)
    return within, max(within, between + buckets * latency_seconds(link, nodes))


def latency_seconds(link, nodes):
    return link["latency"] + 2 * HOP_SECONDS * math.log2(nodes)


def step_seconds(compute, facts, gpus, hidden, imbalance, several, per_node, node_gbits):
    """Seconds of a step on this many GPUs.

    compute: measured on one GPU with each GPU's samples: matrix products, launches, AdamW and all. imbalance: how far the
    slowest GPU, or the one with the most rows, is behind. several: what a step costs more with several processes, apart
    from the all-reduce, measured with `per_gpu` samples on each; mostly waiting for each other. hidden: seconds of the last
    micro-step's backward pass, which hides all buckets but the last. The backward pass does not hide the all-reduce within
    a node: they compete for the GPU (results/README.md, scaling_h200). Before all that, the count of masked tokens is
    all-reduced.
    """
    if gpus == 1:
        return compute
    link, nodes = facts["link"], math.ceil(gpus / per_node)
    buckets = facts.get("groups", link["groups"])  # older results have only the link's
    within, reduction = reduction_seconds(link, buckets, gpus, per_node, node_gbits)
    last = reduction * facts["last_bytes"] / link["bytes"]
    exposed = max(within, last, reduction - hidden)
    return compute * (1 + imbalance) + several + exposed + latency_seconds(link, nodes)


def predict(results, train_configs, samples, per_node, node_gbits):
    """Predicted rows, as many as the measurements allow; a row that was also measured has both times.

    results: of scaling.py. train_configs: {model: TrainConfig}. samples: with the measured ones' lengths.
    """
    found = []
    measured = {(row["model"], row["batch"], row["gpus"]): row for row in results["rows"] if "ms" in row}
    alone = {}
    for row in results["rows"]:
        if row["gpus"] == 1 and "ms" in row:
            alone.setdefault((row["model"], row["samples"]), row)  # the first: beside the fewest other GPUs
    for name, train_cfg in train_configs.items():
        # The link among the most GPUs of one node.
        links = [facts for key, facts in results["models"].items() if key.split()[0] == name and facts["link"]]
        links = [facts for facts in links if facts["link"]["gpus"] <= per_node]
        if not links:
            continue
        samples.padded = train_cfg.model == "bert"
        facts = max(links, key=lambda facts: facts["link"]["gpus"])
        many, one = measured[name, "per_gpu", facts["link"]["gpus"]], alone[name, results["per_gpu"]]
        several = max(0.0, many["without_reduction_ms"] - max(one["each_ms"])) / 1e3
        for batch, gpus in itertools.product(("global", "per_gpu"), PREDICTED):
            each = results["global_batch_size"] // gpus if batch == "global" else results["per_gpu"]
            one = alone.get((name, each))
            if not one or (gpus == 1 and batch == "global"):
                continue
            unequal = imbalance(padded_rows(samples, train_cfg, each * gpus, one["micro_batch_tokens"], gpus))
            unequal += max(one["each_ms"]) / one["ms"] - 1  # as far as the measured GPUs differ
            compute = one["ms"] / 1e3
            # A compiled model's gradients become ready all together.
            hidden = 0.0 if train_cfg.compile else BACKWARD * compute / one["micro_steps"]
            seconds = step_seconds(compute, facts, gpus, hidden, unequal, several, per_node, node_gbits)
            row = measured.get((name, batch, gpus))
            reference = alone[name, results["global_batch_size"] if batch == "global" else each]
            rate = each * gpus / seconds
            efficiency = rate / gpus / reference["samples_per_second"]
            found.append({
                "model": name, "batch": batch, "gpus": gpus, "samples": each * gpus, "ms": 1e3 * seconds,
                "measured_ms": row["ms"] if row else None, "samples_per_second": rate,
                "efficiency": efficiency, "mfu": reference["mfu"] and reference["mfu"] * efficiency,
            })  # fmt: skip
    return found
