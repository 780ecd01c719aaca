"""Two ranks with two micro-batches each give the gradient of one process with the whole batch."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.losses import count_targets, derta_loss, per_token_nll, rto_loss

S, V, SORRY = 9, 13, 4
RANKS = 2
NORMALIZATIONS = ["token_mean", "sequence_sum", "component_mean"]
RTO_WEIGHT = 2.5

# What each rank gets: per micro-batch its rows, each a kind and the number of its targets.
LAYOUTS = {
    "both components on both ranks": [
        [[("mle", 6), ("rto", 2)], [("rto", 7)]],
        [[("rto", 1)], [("mle", 3), ("mle", 8)]],
    ],
    "a rank without RTO": [[[("mle", 6)], [("mle", 2), ("mle", 7)]], [[("rto", 5)], [("mle", 1), ("rto", 8)]]],
    "a rank without any target": [[[("mle", 6), ("rto", 3)], [("rto", 7)]], [[("mle", 0)], [("rto", 0), ("mle", 0)]]],
    "no target anywhere": [[[("mle", 0)], [("rto", 0)]], [[("mle", 0)], [("mle", 0)]]],
}
# The same sums in another order, and float32 has 2^-24: 1e-6 of the largest gradient. float64 in proportion.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
CASES = [(layout, dtype) for layout in LAYOUTS for dtype in TOLERANCES]


def make_batch(rows, number):
    """Token ids and final targets of some rows, the targets at the end of each; `number` seeds the ids."""
    generator = torch.Generator().manual_seed(number)
    input_ids = torch.randint(0, V, (len(rows), S), generator=generator)
    labels, rto_mask = torch.full_like(input_ids, IGNORE_INDEX), torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (kind, num_targets) in enumerate(rows):
        places = slice(S - num_targets, S)
        labels[row, places] = SORRY if kind == "rto" else input_ids[row, places]
        rto_mask[row, places] = kind == "rto"
    return input_ids, labels, rto_mask


def micro_batches(layout):
    """Batches of a layout, `[rank][micro-batch]`."""
    return [
        [make_batch(rows, number=10 * rank + step) for step, rows in enumerate(steps)]
        for rank, steps in enumerate(LAYOUTS[layout])
    ]


def make_model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, V)).to(dtype)


def loss_of(logits, labels, rto_mask, counts, how):
    """The loss under one of the three normalizations, `rto_loss`, or the authors' mean per micro-batch."""
    if how == "rto_loss":
        num_items = None if counts is None else counts[:2].sum()
        return rto_loss(logits, labels, rto_mask, refusal_token_id=SORRY, num_items_in_batch=num_items)
    nll, is_target = per_token_nll(logits, labels), labels[:, 1:] != IGNORE_INDEX
    if how == "mean per micro-batch":
        return nll.sum() / is_target.sum().clamp(min=1)
    return derta_loss(nll, is_target, rto_mask[:, 1:], counts=counts, normalization=how, rto_weight=RTO_WEIGHT).loss


HOWS = [*NORMALIZATIONS, "rto_loss", "mean per micro-batch"]


def train_step_on_rank(layout, dtype, how):
    """
    Gradients of one accumulated step. Hosts average them over ranks (`DistributedDataParallel`), so the loss is times
    their number. A rank whose loss is off the graph would raise here, and leave the others waiting in DDP.
    """
    batches = micro_batches(layout)[dist.get_rank()]
    counts = sum(count_targets(labels, rto_mask) for _, labels, rto_mask in batches)
    dist.all_reduce(counts)
    is_mean = how == "mean per micro-batch"
    model = make_model(dtype)
    for input_ids, labels, rto_mask in batches:
        loss = loss_of(model(input_ids), labels, rto_mask, counts, how)
        (loss / len(batches) if is_mean else loss * RANKS).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= RANKS
    return gradients


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),  # a rank that fails must not leave the other waiting
    )
    gradients = {case: {how: train_step_on_rank(*case, how) for how in HOWS} for case in CASES}
    torch.save(gradients, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients_per_rank(tmp_path_factory):
    """Gradients of every case, from one start of the two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def gradients_of_one_process(layout, dtype, how):
    model = make_model(dtype)
    batches = [batch for steps in micro_batches(layout) for batch in steps]
    input_ids, labels, rto_mask = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    loss_of(model(input_ids), labels, rto_mask, None, how).backward()
    return [parameter.grad for parameter in model.parameters()]


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("how", [*NORMALIZATIONS, "rto_loss"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_and_micro_batches_do_not_change_the_gradient(gradients_per_rank, case, how):
    layout, dtype = case
    expected = flat(gradients_of_one_process(layout, dtype, how))
    assert (expected.abs().max() == 0) == (layout == "no target anywhere")
    for gradients in gradients_per_rank:
        actual = flat(gradients[case][how])
        torch.testing.assert_close(actual, expected, atol=TOLERANCES[dtype] * expected.abs().max().item(), rtol=0.0)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "no target anywhere"])
def test_a_mean_per_micro_batch_would_change_it(gradients_per_rank, layout):
    """The authors' way, so that the test above can fail."""
    expected = flat(gradients_of_one_process(layout, torch.float64, "mean per micro-batch"))
    actual = flat(gradients_per_rank[0][layout, torch.float64]["mean per micro-batch"])
    assert (actual - expected).abs().max() > 0.05 * expected.abs().max()


def test_layouts_are_what_their_names_say():
    counts = {
        layout: [sum(count_targets(*batch[1:]) for batch in steps).tolist()[:2] for steps in micro_batches(layout)]
        for layout in LAYOUTS
    }
    assert counts == {
        "both components on both ranks": [[6, 9], [11, 1]],
        "a rank without RTO": [[15, 0], [1, 13]],
        "a rank without any target": [[6, 10], [0, 0]],
        "no target anywhere": [[0, 0], [0, 0]],
    }
