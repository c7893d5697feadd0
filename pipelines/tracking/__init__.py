"""Track trainings and sweeps in MLflow: only this package talks to it."""

from __future__ import annotations

from pipelines.tracking.client import ADDRESS_VARIABLE, default_uri, environment
from pipelines.tracking.entries import value_text
from pipelines.tracking.figures import FigureWriter
from pipelines.tracking.late_run import LateRun
from pipelines.tracking.metric_writer import MetricWriter
from pipelines.tracking.provenance import provenance_tags
from pipelines.tracking.registry import register_model
from pipelines.tracking.runs import (
    artifact_file,
    end_run,
    log_dataset,
    log_file,
    log_model,
    log_text,
    open_run,
    read_text,
    tag_run,
)
from pipelines.tracking.usable import check_usable

__all__ = [
    "ADDRESS_VARIABLE",
    "FigureWriter",
    "LateRun",
    "MetricWriter",
    "artifact_file",
    "check_usable",
    "default_uri",
    "end_run",
    "environment",
    "log_dataset",
    "log_file",
    "log_model",
    "log_text",
    "open_run",
    "provenance_tags",
    "read_text",
    "register_model",
    "tag_run",
    "value_text",
]
