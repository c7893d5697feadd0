"""Number the settings that Optuna draws."""

from __future__ import annotations

from typing import Any

from ray.tune.search.optuna import OptunaSearch

from tuning.trials.trial import NUMBER


class NumberedOptuna(OptunaSearch):
    """Optuna searcher that numbers settings in the order they are drawn."""

    _num_drawn = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Draw a setting, with its number."""
        config = super().suggest(trial_id)
        if not config:
            return config
        number, self._num_drawn = self._num_drawn, self._num_drawn + 1
        return {**config, NUMBER: number}
