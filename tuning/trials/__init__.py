"""One trial of a sweep: its settings, its ledger entry, its training."""
