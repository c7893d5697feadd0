"""One trial of a sweep: its settings, its ledger record, its training."""
