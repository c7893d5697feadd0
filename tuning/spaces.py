"""Search spaces: dotted fields of a run, each with a domain of Ray Tune.

A space is a function of the recipe's run. Those here adapt to it; yours may
live in your own file, `my/space.py:narrow`:

    from ray import tune
    from pipelines.config import Run
    from tuning.spaces import Space

    def narrow(run: Run) -> Space:
        return {"pooling.power": tune.uniform(0.4, 0.6)}
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Quantized

from pipelines.config import Run
from pipelines.config.overrides import change_fields
from pipelines.config.recipes import module_of
from sovit import Pooling
from tuning.trials.options import Search
from tuning.trials.trial import tidy

Space = dict[str, Any]
"""Domains of Ray Tune, or {"grid_search": [...]}, by dotted fields."""
# Where, and on how many workers, a trial runs is the sweep's to say.
_RESERVED = ("scale.", "storage", "experiment", "recipe", "audit_log", "data.")
_NUM_PROBES = 32
_NUM_SEEDS = 3
_GRID = "grid_search"
# Draws that find nothing new, one after the other, until a space counts as used up.
_MAX_IN_VAIN = 1000


def power(run: Run) -> Space:
    """Search the exponent of the power normalisation."""
    if pooling_of(run).normalizer not in ("svpn", "svd", "eigen", "signed_sqrt"):
        raise ValueError(
            "expected a recipe whose normaliser has an exponent (svpn, svd, eigen, "
            f"signed_sqrt), got {pooling_of(run).normalizer!r}; take the space "
            "iterations, or --model.pooling.normalizer svpn"
        )
    return {"pooling.power": tune.quniform(0.3, 0.9, 0.05)}


def iterations(run: Run) -> Space:
    """Search the number of iterations of svPN or Newton-Schulz."""
    if pooling_of(run).normalizer not in ("svpn", "newton_schulz"):
        raise ValueError(
            "expected a recipe whose normaliser iterates (svpn, newton_schulz), got "
            f"{pooling_of(run).normalizer!r}; take the space power"
        )
    most = 3 if pooling_of(run).normalizer == "svpn" else 7
    return {"pooling.num_iterations": tune.choice(list(range(1, most + 1)))}


def singular_values(run: Run) -> Space:
    """Search the number of singular values of svPN."""
    pooling = pooling_of(run)
    if pooling.normalizer != "svpn":
        raise ValueError(
            f"expected a recipe with svpn, got {pooling.normalizer!r}; set "
            "--model.pooling.normalizer svpn"
        )
    dims = (1, 2, 3, 4)
    return {"pooling.num_singular_values": tune.choice(list(dims))}


def reduced_dim(run: Run) -> Space:
    """Search the reduced dimension: from half to a third more than the recipe's."""
    dim = pooling_of(run).reduced_dim
    if dim is None:
        raise ValueError(
            "expected a recipe with a reduced dimension, got None; set "
            "--model.pooling.reduced-dim"
        )
    divisor = pooling_of(run).num_groups
    return {"pooling.reduced_dim": tune.choice(_scaled(dim, divisor=divisor))}


def heads(run: Run) -> Space:
    """Search the number of cross-covariances side by side."""
    if pooling_of(run).type != "multi_head":
        raise ValueError(
            f"expected a recipe with multi_head pooling, got {pooling_of(run).type!r}; "
            "take one of SoT's"
        )
    most = pooling_of(run).num_heads
    return {
        "pooling.num_heads": tune.choice(sorted({max(most // 2, 1), most, 2 * most}))
    }


def normalizer(run: Run) -> Space:
    """Search the normaliser: the fast ones and the baselines."""
    symmetric = pooling_of(run).type in ("cov", "gaussian")
    choices = ["svpn", "newton_schulz"] if symmetric else ["svpn"]
    return {
        "pooling.normalizer": tune.choice(
            [*choices, "signed_sqrt", "layer_norm", "none"]
        )
    }


def pooling(run: Run) -> Space:
    """Search exponent, iterations, dimension and heads: those that the recipe has."""
    found: Space = {}
    for part in (power, iterations, reduced_dim, heads):
        try:
            found |= part(run)
        except ValueError:
            if run.model.pooling is None:
                raise
    return found


def optim(run: Run) -> Space:
    """Search learning rate and weight decay around the recipe's, and smoothing."""
    lr, decay = run.optim.lr, run.optim.weight_decay
    return {
        "optim.lr": tune.loguniform(lr / 4, lr * 4),
        "optim.weight_decay": tune.loguniform(
            max(decay, 1e-5) / 10, max(decay, 1e-5) * 4
        ),
        "optim.label_smoothing": tune.choice([0.0, 0.1, 0.2]),
    }


def seeds(run: Run) -> Space:
    """Search three seeds, to measure the variation by chance."""
    return {"seed": tune.choice(list(range(run.seed, run.seed + _NUM_SEEDS)))}


def pooling_of(run: Run) -> Pooling:
    """Return the run's pooling; ValueError where it has none."""
    if run.model.pooling is None:
        raise ValueError(
            f"expected a recipe with a second-order head, got {run.recipe!r}, whose "
            "model.pooling is None; take another recipe, or the space optim"
        )
    return run.model.pooling


def _scaled(dim: int | tuple[int, int], *, divisor: int) -> list[Any]:
    """Scale a dimension, or a pair, to several multiples of the divisor."""

    def scale(one: int, factor: float) -> int:
        return max(round(one * factor / divisor), 1) * divisor

    factors = (0.5, 0.75, 1.0, 1.33)
    if isinstance(dim, tuple):
        pairs = [(scale(dim[0], f), scale(dim[1], f)) for f in factors]
        return list(dict.fromkeys(pairs))
    return list(dict.fromkeys(scale(dim, f) for f in factors))


def load_space(names: str, *, run: Run) -> Space:
    """Load the space named on the command line, and check it against the run.

    Args:
        names: A function of this file, or `my/file.py:function`, or several joined by
            commas.

    Raises ValueError for a space that is not there or is empty, and for a field or a
    value that the run does not take.
    """
    space: Space = {}
    for name in filter(None, names.split(",")):
        function = _function(name)
        takes_run = bool(inspect.signature(function).parameters)
        found = function(run) if takes_run else function()
        if not isinstance(found, Mapping):
            raise ValueError(
                f"{name}: expected a function that returns a dict of dotted fields to "
                f"domains of ray.tune, got {found!r}"
            )
        space |= found
    if not space:
        raise ValueError(
            f"expected a space with one field at least, got an empty one, {names!r}; "
            f"there are {', '.join(shipped())}, or a function of your own: "
            "my/space.py:name"
        )
    check_space(space, run=run)
    return space


def check_space(space: Space, *, run: Run) -> None:
    """Raise ValueError where the run has no such fields or refuses their values."""
    for name, domain in space.items():
        if name.startswith(_RESERVED):
            raise ValueError(
                f"expected fields that change what is learnt, got {name!r}; give it "
                "once for all trials, as a flag"
            )
        if choices_of(domain) == []:
            raise ValueError(f"{name}: expected choices, got none")
        if not isinstance(domain, Domain) and choices_of(domain) is None:
            raise ValueError(
                f"{name}: expected a domain of ray.tune, such as tune.uniform(0.3, "
                f"0.9) or tune.choice([1, 2, 3]), got {domain!r}"
            )
        for value in choices_of(domain) or []:
            _take(run, {name: value})
    generator = np.random.RandomState(0)
    for _ in range(_NUM_PROBES):
        _take(run, draw(space, generator=generator))


def _take(run: Run, setting: Mapping[str, Any]) -> None:
    try:
        change_fields(run, setting)
    except ValueError as error:
        raise ValueError(
            f"expected a space of settings that the recipe takes, got {dict(setting)}: "
            f"{error}"
        ) from error


def choices_of(domain: Any) -> list[Any] | None:
    """Return a domain's values if it is a list of values, else None."""
    if isinstance(domain, Mapping) and list(domain) == [_GRID]:
        return list(domain[_GRID])
    return list(domain.categories) if isinstance(domain, Categorical) else None


def draw(space: Space, *, generator: np.random.RandomState) -> dict[str, Any]:
    """Draw one setting."""
    setting = {}
    for name, domain in space.items():
        values = choices_of(domain)
        if values is not None:
            setting[name] = values[generator.randint(len(values))]
        else:
            setting[name] = domain.sample(random_state=generator)
    return tidy(setting)


def words_of(space: Space) -> dict[str, str]:
    """Describe each domain in words, for people and to tell spaces apart."""
    return {name: _words(domain) for name, domain in space.items()}


def _words(domain: Any) -> str:
    values = choices_of(domain)
    if values is not None:
        return f"choice({values})"
    sampler = domain.get_sampler()
    step = getattr(sampler, "q", None)
    inner = sampler.get_sampler() if isinstance(sampler, Quantized) else sampler
    name = type(inner).__name__.strip("_").lower()
    words = f"{name} {domain.domain_str}"
    return words if step is None else f"{words} in steps of {step:g}"


def shipped() -> list[str]:
    """List the names of the spaces in this file."""
    return [
        name
        for name, function in inspect.getmembers(
            sys.modules[__name__], inspect.isfunction
        )
        if not name.startswith("_")
        and inspect.signature(function).return_annotation == "Space"
        and list(inspect.signature(function).parameters) == ["run"]
    ]


def _function(name: str) -> Callable[..., object]:
    if ".py:" in name:
        path, _, function = name.rpartition(":")
        found = getattr(module_of(Path(path)), function, None)
        if not callable(found):
            raise ValueError(f"expected a function of {path}, got {function!r}")
        return found
    if name not in shipped():
        raise ValueError(
            f"expected a space, got {name!r}; there are {', '.join(shipped())}, or a "
            "function of your own: my/space.py:name"
        )
    return getattr(sys.modules[__name__], name)


def list_settings(space: Space, *, search: Search) -> list[dict[str, Any]]:
    """List the settings of a random or a grid search, no two alike.

    The same seed draws the same settings; more trials extend the same list.
    Raises ValueError where the space has fewer, or for a grid over a domain that is
    not a list of choices.
    """
    if search.method == "grid":
        return _grid(space)[: search.num_trials]
    generator = np.random.RandomState(search.sample_seed)
    found: dict[str, dict[str, Any]] = {}
    num_in_vain = 0
    while len(found) < search.num_trials:
        setting = draw(space, generator=generator)
        num_in_vain = num_in_vain + 1 if repr(setting) in found else 0
        found.setdefault(repr(setting), setting)
        if num_in_vain == _MAX_IN_VAIN:
            raise ValueError(
                f"expected {search.num_trials} settings, got a space of {len(found)}; "
                f"set --num-trials {len(found)}, or widen the space"
            )
    return list(found.values())


def _grid(space: Space) -> list[dict[str, Any]]:
    values = {name: choices_of(domain) for name, domain in space.items()}
    ranges = [name for name, choices in values.items() if choices is None]
    if ranges:
        raise ValueError(
            f"expected choices for a grid, got a range for {', '.join(ranges)}; write "
            "tune.choice([...]) there, or take --method random"
        )
    lists = [choices or [] for choices in values.values()]
    return [
        dict(zip(values, choices, strict=True)) for choices in itertools.product(*lists)
    ]
