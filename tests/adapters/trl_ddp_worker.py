"""Started by torchrun: one step on this rank's share of the rows, parameters saved by rank 0."""

import os
import sys

import torch

from tests.adapters.trl_runs import one_sgd_step

if __name__ == "__main__":
    output, normalization, accumulation = sys.argv[1:]
    world_size = int(os.environ["WORLD_SIZE"])
    parameters = one_sgd_step(
        output,
        normalization=normalization,
        rto_weight=0.7,
        per_device_train_batch_size=8 // (world_size * int(accumulation)),
        gradient_accumulation_steps=int(accumulation),
        ddp_backend="gloo",
    )
    if torch.distributed.get_rank() == 0:
        torch.save(
            {name.removeprefix("module."): value for name, value in parameters.items()}, f"{output}/parameters.pt"
        )
    # a rank that ends while the other still talks to it is aborted now and then
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
