"""Fields of a run that change what is kept or shown, and fields' former names."""

from __future__ import annotations

RENAMED = {
    "audit_log": "key_log",
    "validation.asynchronous": "validation.beside",
}
"""Fields by their dotted names, and what each was called before: records and flags that
have the former name are still read."""

NOT_LEARNT = frozenset(
    {
        "storage",
        "audit_log",
        "log_every_steps",
        "checkpoint_every_steps",
        "checkpoint_every_minutes",
        "max_hours",
        "num_checkpoints_to_keep",
        "max_failed_checkpoints",
        "optim.on_nonfinite",
        "optim.max_nonfinite_steps",
    }
)
"""Fields that decide what is kept and when a run stops, not what it learns."""
NOT_LEARNT_GROUPS = ("scale.", "probe.", "validation.")
"""Groups of fields of which none changes what a run learns."""
READING = frozenset(
    {
        "experiment",
        "data.eval_batch_size",
        "data.num_decode_threads",
        "data.num_prefetch_batches",
        "data.num_readers",
        "data.read_ahead_mb",
        "data.reader_label",
        "data.max_bad_share",
        "optim.num_accumulation",
    }
)
"""Fields that change how fast the same batches come, in how many parts, and where a run
is filed."""
LOCATIONS = frozenset({"data.train", "data.val", "data.val_share", "data.val_seed"})
"""Where shards are, or how they are made of images: their content counts."""
