"""Number of GPUs for a recipe's published batch, with 128 images on each.

By arithmetic, not measured yet, 128 keep a current GPU busy; BatchNorm's statistics
are of them. Fewer or more GPUs: `--scale.num-workers`; on fewer a step is done in
parts with `--optim.num-accumulation`. docs/gpu.md lists the values by machine.
"""

from __future__ import annotations

from pipelines.config import Scale

NUM_DECODE_THREADS = 7
"""Of a worker; Ray reserves as many CPUs, and one more to launch kernels from."""
_IMAGES_PER_GPU = 128


def gpus_for(batch_size: int) -> Scale:
    """Return the scale of a batch with 128 images on each GPU, at least one GPU."""
    return Scale(
        num_workers=max(batch_size // _IMAGES_PER_GPU, 1),
        use_gpu=True,
        cpus_per_worker=NUM_DECODE_THREADS + 1,
    )
