"""Name the fields of a run that change what is kept or shown, not what it learns."""

from __future__ import annotations

NOT_LEARNT = frozenset(
    {
        "storage",
        "key_log",
        "log_every_steps",
        "checkpoint_every_steps",
        "checkpoint_every_minutes",
        "num_checkpoints_to_keep",
        "max_failed_checkpoints",
        "optim.on_nonfinite",
        "optim.max_nonfinite_steps",
    }
)
"""Fields that say what is kept and when a run stops, not what it learns."""
NOT_LEARNT_GROUPS = ("scale.", "probe.", "validation.")
"""Of these no field changes what a run learns."""
