"""The one way to load, override and dump an experiment's settings.

Order: dataclass default < the file an experiment `extends` < the experiment file < `--set a.b=c`.
Last of all, epochs given as a share of the run ("50%") become numbers. "none" takes back an option
that may be absent (`classifier.bias_init`); `config show` prints it so.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_args

import tomli_w
from pydantic import TypeAdapter, ValidationError

from dkdetr.config import ExperimentConfig, OptimConfig
from dkdetr.errors import UsageError
from dkdetr.setting_ranges import range_problem


class ConfigError(UsageError):
    """A setting is unknown, missing or has an impossible value; names its dotted path."""


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and, for every dotted key that a file or `--set` gave, who gave it.

    `rows` are the file's `[ablate.ROW]` tables: what rows of `dkdetr ablate` set beside what the
    row itself says, by row and dotted key.
    """

    config: ExperimentConfig
    origins: Mapping[str, str]
    rows: Mapping[str, Mapping[str, Any]]


_ADAPTER = TypeAdapter(ExperimentConfig)
_WHOLE = TypeAdapter(int)
_SHARES = (("kd", "start_epoch"), ("optim", "lr_drop_epochs"))
"""Settings that are epochs of the run and may be shares of it, so that they follow its length."""
HASHED_AS = {"data.cache_mode": "stored", "eval.batch_size": 8, "student.masks_at_once": 32}
"""How the work is done, too; but hashes have held these, and so still hold what was usual: the
folders of runs keep their names."""
_HOW_NOT_WHAT = ("compute.", "ops.", "data.workers", "checkpoint_every_s", *HASHED_AS)


def shipped_experiments() -> list[str]:
    """Returns the names of the experiment files that come with the package."""
    entries = files("dkdetr.experiments").iterdir()
    return sorted(entry.name[:-5] for entry in entries if entry.name.endswith(".toml"))


def load_experiment(experiment: str, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Returns the resolved configuration of a shipped name or a TOML file, with `a.b=c` overrides.

    Raises:
        ConfigError: unknown experiment or key, or an impossible value; names the dotted path.
    """
    tables = _read_chain(experiment, seen=())
    tables[-1][1].setdefault("name", Path(experiment).stem)  # not the name of what it extends
    merged, origins = dict[str, Any](), dict[str, str]()
    rows: dict[str, dict[str, Any]] = {}
    for source, table in tables:
        for row, changes in _row_tables(experiment, table.pop("ablate", {})).items():
            rows.setdefault(row, {}).update(flatten(changes))
        _merge(merged, table, origins, source, prefix="")
    for override in overrides:
        _merge(merged, parse_override(override), origins, "--set", prefix="")
    drops = _table(merged, "optim").get("lr_drop_epochs", OptimConfig.lr_drop_epochs)
    _count_shares(merged)
    config = config_from_dict(merged)
    _refuse_late_drops(config.optim, given=drops)
    return ResolvedConfig(config=config, origins=origins, rows=rows)


def config_from_dict(table: Mapping[str, Any]) -> ExperimentConfig:
    """Returns the configuration of a plain table; raises ConfigError with the dotted path."""
    try:
        config = _ADAPTER.validate_python(_read_plainly(table, ExperimentConfig))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(f"unknown setting '{path}'{_nearest_keys(path)}") from None
        if first["type"] == "value_error":  # of a table that contradicts itself
            sentence = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"settings of '{path}': {sentence}") from None
        if first["type"] == "dataclass_type":
            known = _nearest_keys(f"{path}.")
            raise ConfigError(f"'{path}' is a table, got {first['input']!r}{known}") from None
        raise ConfigError(f"setting '{path}': {first['msg']}, got {first['input']!r}") from None
    problem = range_problem(config, flatten(asdict(config)))
    if problem is not None:
        raise ConfigError(f"setting {problem}")
    return config


def _read_plainly(table: Mapping[str, Any], kind: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the table with None for "none" where a setting may be absent.

    Raises:
        ConfigError: true or false for what is no switch: pydantic would take them for 1 and 0.
    """
    kinds = {each.name: each.type for each in fields(kind)}
    read = dict(table)
    for key, value in table.items():
        wanted, path = kinds.get(key, bool), f"{prefix}{key}"
        if is_dataclass(wanted) and isinstance(value, Mapping):
            read[key] = _read_plainly(cast("Mapping[str, Any]", value), wanted, f"{path}.")
        elif value == "none" and NoneType in get_args(wanted):
            read[key] = None
        elif wanted is not bool and any(isinstance(each, bool) for each in _several(value)):
            raise ConfigError(f"setting '{path}' is no switch, got {value!r}")
    return read


def config_to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Returns a plain table that `config_from_dict` reads back; absent options are left out."""
    return _without_none(asdict(config))


def refuse_late_start(config: ExperimentConfig) -> None:
    """Raises ConfigError if a training ends before its distillation would begin.

    For what trains and what checks; others may well read such settings.
    """
    kd, epochs = config.kd, config.optim.epochs
    if kd.has_start and kd.start_epoch >= epochs:
        raise ConfigError(
            f"setting 'kd.start_epoch': {kd.start_epoch} lies behind the last of "
            f"optim.epochs = {epochs}: nothing would be distilled; give a lower one, or a share of "
            "the run (of a very short run a share may come to its end, but for 0%), or switch "
            "distillation off with kd.regions_per_image=0 (and kd.hybrid_queries=0)"
        )


def dump_toml(config: ExperimentConfig) -> str:
    """Returns the whole configuration as TOML."""
    return tomli_w.dumps(config_to_dict(config))


def deciding_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Returns what decides a run's course, as `{"a.b": value}`.

    Left out is how the machines at hand do the work: a run may go on with other values.
    """
    flat = flatten(json.loads(json.dumps(config_to_dict(config))))
    return {key: value for key, value in flat.items() if not key.startswith(_HOW_NOT_WHAT)}


def config_hash(config: ExperimentConfig) -> str:
    """Returns 8 hex digits that change with any of the `deciding_settings`."""
    canonical = json.dumps(deciding_settings(config) | HASHED_AS, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def parse_override(override: str) -> dict[str, Any]:
    """Returns the nested table that `a.b=c` means; raises ConfigError where it means nothing."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set wants KEY=VALUE, got '{override}'")
    if path.split(".")[0] == "ablate":
        raise ConfigError(
            f"'{path}': what one row of `dkdetr ablate` sets stands in an experiment file, in "
            "[ablate.ROW]; --set is for all rows"
        )
    try:
        nested: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        nested = text
    for part in reversed(path.split(".")):
        nested = {part: nested}
    return nested


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `{"a.b": value}` for nested tables."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _row_tables(experiment: str, given: Any) -> dict[str, dict[str, Any]]:
    tables = cast("dict[str, Any]", given) if isinstance(given, dict) else {"ablate": given}
    for row, changes in tables.items():
        if not isinstance(changes, dict):
            raise ConfigError(
                f"experiment '{experiment}': [ablate.{row}] wants a table of settings"
            )
    return tables


def _read_chain(experiment: str, seen: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    if experiment in seen:
        raise ConfigError(f"experiment '{experiment}' extends itself: {' -> '.join(seen)}")
    path = Path(experiment)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"no experiment file '{experiment}'")
        text = _read_text(path)
    elif experiment in shipped_experiments():
        text = (files("dkdetr.experiments") / f"{experiment}.toml").read_text(encoding="utf-8")
    else:
        known = ", ".join(shipped_experiments())
        raise ConfigError(f"unknown experiment '{experiment}'; shipped: {known}, or a .toml file")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"experiment '{experiment}' is not TOML: {error}") from None
    parent = table.pop("extends", None)
    if parent is None:
        return [(experiment, table)]
    if str(parent).endswith(".toml"):
        parent = str(path.parent / str(parent))
    return [*_read_chain(str(parent), (*seen, experiment)), (experiment, table)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"experiment '{path}' is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise ConfigError(f"experiment '{path}': {error.strerror}") from None


def _merge(
    into: dict[str, Any],
    table: Mapping[str, Any],
    origins: dict[str, str],
    source: str,
    prefix: str,
) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping):
            inner = cast("Mapping[str, Any]", value)
            if not isinstance(into.setdefault(key, {}), dict):
                raise ConfigError(
                    f"'{prefix}{key}' is {into[key]!r} and no table, but {source} sets "
                    f"'{prefix}{key}.{next(iter(inner), '')}'"
                )
            _merge(into[key], inner, origins, source, f"{prefix}{key}.")
        else:
            into[key] = value
            origins[f"{prefix}{key}"] = source


def _count_shares(merged: dict[str, Any]) -> None:
    """Turns "50%" into the epoch, half of `optim.epochs`; halves are rounded up.

    What is no share is left as it is, for the check of all settings to judge.
    """
    given = _table(merged, "optim").get("epochs", OptimConfig.epochs)
    try:
        epochs = _WHOLE.validate_python(given)
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise ConfigError(f"setting 'optim.epochs': {why}, got {given!r}") from None
    for section, key in _SHARES:
        table = _table(merged, section)
        if key in table:
            value, path = table[key], f"{section}.{key}"
            many = isinstance(value, list)
            table[key] = (
                [_epoch_of(each, epochs, path) for each in cast("list[Any]", value)]
                if many
                else _epoch_of(value, epochs, path)
            )


def _table(merged: Mapping[str, Any], section: str) -> dict[str, Any]:
    table = merged.get(section, {})
    return cast("dict[str, Any]", table) if isinstance(table, dict) else {}


def _several(value: Any) -> Sequence[Any]:
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else (value,)


def _refuse_late_drops(optim: OptimConfig, given: Any) -> None:
    """Raises ConfigError for an epoch that the run ends before: its drop would silently not come.

    A share follows the run; in a very short one it may come to lie at the end, without a drop.
    """
    for drop, said in zip(optim.lr_drop_epochs, given, strict=True):
        if drop >= optim.epochs and not isinstance(said, str):
            raise ConfigError(
                f"setting 'optim.lr_drop_epochs': {drop} lies behind the last of "
                f"optim.epochs = {optim.epochs}: this drop would never come; give lower "
                'ones, shares of the run (["79%"]), or [] for none'
            )


def _epoch_of(value: Any, epochs: int, path: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        share = float(value.removesuffix("%")) / 100 if value.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ConfigError(f'setting \'{path}\' wants an epoch, or "0%" to "100%"; got {value!r}')
    return math.floor(share * epochs + 0.5)


def _nearest_keys(path: str) -> str:
    parent: Any = ExperimentConfig
    for part in path.split(".")[:-1]:
        parent = next((f.type for f in fields(parent) if f.name == part), None)
        if not is_dataclass(parent):
            return ""
    return "; known here: " + ", ".join(f.name for f in fields(parent))


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(cast("dict[str, Any]", value)) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
