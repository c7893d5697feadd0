"""How a recipe's published batch lies on GPUs: 128 images of it on each.

So many keep a current GPU busy by arithmetic, which is not measured yet; BatchNorm's
statistics are of them. Fewer or more GPUs: `--scale.num-workers`; on fewer a step is
done in parts with `--optim.num-accumulation`. docs/gpu.md has which for which machine.
"""

from __future__ import annotations

from pipelines.config import Scale

NUM_DECODE_THREADS = 7
"""Of a worker; Ray reserves as many CPUs, and one more to launch kernels from."""
_IMAGES_PER_GPU = 128


def gpus_for(batch_size: int) -> Scale:
    """Take as many GPUs as there are 128 images in a batch, but one at least."""
    return Scale(
        num_workers=max(batch_size // _IMAGES_PER_GPU, 1),
        use_gpu=True,
        cpus_per_worker=NUM_DECODE_THREADS + 1,
    )
