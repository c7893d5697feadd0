"""Trials of a sweep: settings, ledger records, training."""
