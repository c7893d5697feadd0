"""What a model was made with, kept so that timm can write it and make it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sovit.pooling import Pooling


class KeepsArgs:
    """Keep `_model_args`, timm's record of a model's arguments, as plain values.

    `timm.models.save_for_hf` writes them as JSON, which knows no `Pooling`.
    """

    _plain_args: Mapping[str, Any] = {}

    @property
    def _model_args(self) -> Mapping[str, Any]:
        return self._plain_args

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        self._plain_args = {
            name: _plain(value) for name, value in args.items() if value is not None
        }


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Pooling) else value
