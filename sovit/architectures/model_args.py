"""A model's arguments, stored so that timm can save and rebuild it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sovit.pooling import Pooling


class KeepsArgs:
    """Mixin that stores `_model_args`, timm's record of arguments, as plain values.

    `timm.models.save_for_hf` writes them as JSON, which has no `Pooling`.
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
