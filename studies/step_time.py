"""How long a step takes on more GPUs than are here: a model of it, from what scaling.py measured.

A step takes what one GPU takes for its share, and what comes with more of them: waiting for the GPU with the most rows,
and the part of the gradients' reduction that the backward pass does not hide.

Read next: scaling.py
"""

import functools
import itertools
import math

import numpy as np

from data import SEQUENCE_MULTIPLE, TOKEN_MULTIPLE

BACKWARD = 2 / 3  # of a step's matrix products are in its backward pass
NETWORK_SHARE = 0.8  # of a node's network that a reduction reaches: an assumption
HOP_SECONDS = 10e-6  # of latency for each doubling of nodes, there and back: an assumption
STEPS_CUT = 10  # steps whose cut is looked at
PREDICTED = [2**i for i in range(10)]  # numbers of GPUs


@functools.cache
def lengths_of(samples):
    """Tokens of text of each sample. Asked for once, as a prediction looks at the same ones in many cuts."""
    return samples.locate(np.arange(len(samples)))[2]


def filled_rows(samples, cfg, count, micro_batch_tokens, gpus):
    """(micro-steps, gpus) rows that each GPU computes, of STEPS_CUT steps: its tokens, or BERT's padded ones."""
    work = []
    for step in range(STEPS_CUT):
        numbers, _ = samples.of_step(step, count, cfg.seed)
        length = lengths_of(samples)[numbers]
        bounds = np.array(samples.bounds(length, micro_batch_tokens, gpus))
        if samples.padded:
            rows = -(-np.diff(bounds) // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE * cfg.seq_length
        else:
            tokens = np.diff(np.concatenate([[0], np.cumsum(length + 2)])[bounds])
            rows = -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
        work.append(rows.reshape(-1, gpus))
    return np.concatenate(work)


def imbalance(work):
    """How much longer the GPU with the most rows works, over all micro-steps, than if all had equally many."""
    return float(work.max(1).sum() / work.mean(1).sum() - 1)


def reduction_seconds(link, groups, gpus, per_node, node_gbits):
    """(seconds that summing the gradients takes within each node, seconds that it takes in all).

    Within a node and between nodes a ring moves 2 (n - 1) / n of their bytes through each link, both at once, since NCCL
    passes on what it has: the slower one counts. Within: at the rate measured here. Between: all adapters of a node together,
    in so many groups.
    """
    n = link["gpus"]
    link_rate = 2 * (n - 1) / n * link["bytes"] / max(link["seconds"] - link["groups"] * link["latency"], 1e-9)
    inside, nodes = min(gpus, per_node), math.ceil(gpus / per_node)
    within = 2 * (inside - 1) / inside * link["bytes"] / link_rate + link["groups"] * link["latency"]
    between = 2 * (nodes - 1) / nodes * link["bytes"] / (NETWORK_SHARE * node_gbits / 8 * 1e9)
    return within, max(within, between + groups * latency_seconds(link, nodes))


def latency_seconds(link, nodes):
    return link["latency"] + 2 * HOP_SECONDS * math.log2(nodes)


def step_seconds(compute, facts, gpus, hidden, imbalance, several, per_node, node_gbits):
    """Seconds of a step on so many GPUs.

    compute: measured on one GPU, with the samples that each would have: matrix products, launches, AdamW and all.
    imbalance: by how much the slowest GPU, or the one with the most rows, is behind. several: what a step of several
    processes takes longer, reduction aside, as measured with `per_gpu` samples on each; mostly waiting for each other.
    hidden: seconds of the last micro-step's backward pass, beside which several nodes sum all but the last group of
    gradients. What that takes within a node is taken from the backward pass even so, and more (results/README.md,
    scaling_h200). The count of masked tokens is summed before anything else.
    """
    if gpus == 1:
        return compute
    link, nodes = facts["link"], math.ceil(gpus / per_node)
    groups = facts.get("groups", link["groups"])  # until 1cada09 one host summed in the groups of several
    within, reduction = reduction_seconds(link, groups, gpus, per_node, node_gbits)
    last = reduction * facts["last_bytes"] / link["bytes"]
    exposed = max(within, last, reduction - hidden)
    return compute * (1 + imbalance) + several + exposed + latency_seconds(link, nodes)


def predict(results, train_configs, samples, per_node, node_gbits):
    """Predicted rows, as many as the measurements allow; those that were measured too, with both times.

    results: of scaling.py. train_configs: {model: TrainConfig}. samples: with the lengths of those that were measured.
    """
    found = []
    measured = {(row["model"], row["batch"], row["gpus"]): row for row in results["rows"] if "ms" in row}
    alone = {}
    for row in results["rows"]:
        if row["gpus"] == 1 and "ms" in row:
            alone.setdefault((row["model"], row["samples"]), row)  # of GPUs beside fewer others
    for name, train_cfg in train_configs.items():
        # The link of the most GPUs of one node that were measured.
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
            unequal = imbalance(filled_rows(samples, train_cfg, each * gpus, one["micro_batch_tokens"], gpus))
            unequal += max(one["each_ms"]) / one["ms"] - 1  # as far as the measured GPUs differ
            compute = one["ms"] / 1e3
            # A compiled model's gradients come all at once.
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
