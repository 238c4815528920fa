"""A recipe: one YAML file that says how a model is grown, trained on and published, checked as a whole before anything runs.

    parent: runs/base/checkpoint-500     # a folder or Hub id; with `revision` of a Hub id, and `subfolder` of either
    grow: {output: runs/grown, width: 1.5, depth: 2}
    recommend: {law: steplaw, tokens: 6B, sequence_length: 2048}
    train: {output_dir: runs/continued, train: corpus.txt, eval: held-out.txt, arguments: {bf16: true}}
    push: {repo_id: my-org/my-grown-model, license: apache-2.0}

`recommend`, `train` and `push` can be left out. Paths are relative to where the command runs, as on the command line. A recipe
goes into cards, so no token can stand in it.
"""

from __future__ import annotations

import difflib
import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import WarmstartError
from ..redaction import token_places
from .options import parse_value
from .recommend import count

if TYPE_CHECKING:
    from ..growth.config import GrowthConfig
    from ..growth.plan import GrowthPlan

Check = Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("is no text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("is no whole number above 0")
    return value


def _number(value: Any) -> float:
    value = parse_value(value) if isinstance(value, str) else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError("is no number")
    return value


def _count(value: Any) -> float:
    try:
        return count(str(value))
    except ArgumentTypeError:
        raise ValueError("is no count such as 20B, 300M or 2e9") from None


def _size(value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("is no size such as 2GB")
    return value


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("is empty")
    return [_text(entry) for entry in values]


def _table(value: Any) -> dict[str, Any]:
    """Named values; YAML reads 1e-3 as text, which here is a number."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("is no table of names and values")
    return {name: parse_value(entry) if isinstance(entry, str) else entry for name, entry in value.items()}


TOP: dict[str, Check] = {"parent": _text, "revision": _text, "subfolder": _text}
# Of `grow`, every other name is a field of GrowthConfig or a size by its transformers name.
GROW: dict[str, Check] = {
    "output": _text,
    "state_policy": _text,
    "max_shard_size": _size,
    "max_memory": _size,
    "threads": _whole,
    "low_disk": _flag,
}
RECOMMEND: dict[str, Check] = {
    "law": _text,
    "tokens": _count,
    "sequence_length": _whole,
    "params": _count,
    "eval_loss": _number,
    "tokens_seen": _count,
    "world_size": _whole,
    "per_device_train_batch_size": _whole,
    "batch_tokens": _count,
    "replay_share": _number,
    "cautious": _flag,
    "trust_loss": _flag,
}
TRAIN: dict[str, Check] = {
    "output_dir": _text,
    "train": _texts,
    "eval": _texts,
    "sequence_length": _whole,
    "tokenizer": _text,
    "arguments": _table,
}
PUSH: dict[str, Check] = {
    "repo_id": _text,
    "private": _flag,
    "revision": _text,
    "create_pr": _flag,
    "license": _text,
    "dataset": _text,
    "message": _text,
}
STEPS = {"grow": GROW, "recommend": RECOMMEND, "train": TRAIN, "push": PUSH}
NEEDED = {
    "": ("parent", "grow"),
    "grow": ("output",),
    "recommend": ("law", "tokens", "sequence_length"),
    "train": ("output_dir", "train", "eval"),
    "push": ("repo_id",),
}
# What the recipe says elsewhere, or what would send something by another way.
NOT_ARGUMENTS = {"output_dir", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo"}


@dataclass(frozen=True)
class RunRecipe:
    """A recipe that was checked.

    Args:
        text (`str`): as it stands in the file. parent (`str`), revision (`str`, *optional*), subfolder (`str`): what is grown.
        parent_files (`Path`): the folder with the parent's config, and what its training noted.
        growth (`GrowthConfig`): what it grows to. plan (`GrowthPlan`): what follows.
        grow, recommend, train, push (`dict`, *optional*): the options of each step.
    """

    text: str
    parent: str
    revision: str | None
    subfolder: str
    parent_files: Path
    growth: GrowthConfig
    plan: GrowthPlan = field(repr=False)
    grow: dict[str, Any]
    recommend: dict[str, Any] | None
    train: dict[str, Any] | None
    push: dict[str, Any] | None

    @property
    def sequence_length(self) -> int:
        """Of the training, in tokens."""
        return int((self.train or {}).get("sequence_length") or (self.recommend or {})["sequence_length"])

    @property
    def pushed_folder(self) -> Path:
        """Where what is published lies."""
        return Path(self.train["output_dir"] if self.train is not None else self.grow["output"])


def read_recipe(path: str | Path) -> RunRecipe:
    """Read and check a recipe; no weights are fetched, and nothing is written but small files of a Hub id into its cache.

    Raises:
        WarmstartError: it cannot run as it stands; everything that was found is named.
    """
    from ..checkpoints.fetch import checked_subfolder

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except OSError as error:
        raise WarmstartError(f"The recipe {str(path)!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WarmstartError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise WarmstartError(f"{path.name} holds no table with parent, grow, recommend, train and push.")
    if held := token_places(data):
        raise WarmstartError(
            f"{path.name} holds a token in {', '.join(held)}, and recipes go into cards. Take it out and set HF_TOKEN instead."
        )
    problems: list[str] = []
    steps, growth_options = _read(data, problems)
    made = _checked(steps, growth_options, problems)
    if problems or made is None:
        lines = "".join(f"\n  - {line}" for line in problems)
        raise WarmstartError(f"{path.name} cannot run, nothing was begun:{lines}")
    return RunRecipe(
        text,
        steps[""]["parent"],
        steps[""].get("revision"),
        checked_subfolder(steps[""].get("subfolder", "")),
        *made,
        steps["grow"],
        *(steps.get(name) for name in ("recommend", "train", "push")),
    )


def _read(data: dict[Any, Any], problems: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The options of each step that is there, by its name ("" for the file's own), and those of the growth."""
    own = {name: value for name, value in data.items() if name not in STEPS}
    steps = {"": _values("", own, TOP, problems, [*TOP, *STEPS])}
    growth: dict[str, Any] = {}
    for name, checks in STEPS.items():
        given = data.get(name)
        if given is None:
            continue
        if not isinstance(given, dict):
            problems.append(f"{name} is no table of options, but {given!r}")
            continue
        if name == "grow":
            growth = _table({str(k): v for k, v in given.items() if k not in GROW})
            given = {k: v for k, v in given.items() if k in GROW}
        steps[name] = _values(name, given, checks, problems, list(checks))
    for name, needed in NEEDED.items():
        there = data if not name else data.get(name)
        if isinstance(there, dict):
            missing = [option for option in needed if there.get(option) is None]
            problems += [f"{_place(name, option)} is missing" for option in missing]
    return steps, growth


def _values(
    step: str, given: Mapping[Any, Any], checks: Mapping[str, Check], problems: list[str], known: list[str]
) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        if name not in checks:
            near = difflib.get_close_matches(str(name), known, n=1)
            advice = f"; the nearest is {near[0]!r}" if near else f"; there are {', '.join(known)}"
            problems.append(f"{_place(step, name)} is unknown{advice}")
        elif value is not None:
            try:
                found[name] = checks[name](value)
            except ValueError as error:
                problems.append(f"{_place(step, name)}: {value!r} {error}")
    return found


def _place(step: str, name: object) -> str:
    return f"{step}.{name}" if step else str(name)


def _checked(
    steps: dict[str, dict[str, Any]], options: dict[str, Any], problems: list[str]
) -> tuple[Path, GrowthConfig, GrowthPlan] | None:
    """The parent's files, the growth and its plan, where they can be had; what other steps would meet is looked for anyhow."""
    from .recipe_steps import parent_files

    files = _try(lambda: parent_files(**steps[""]), "parent", problems) if "parent" in steps[""] else None
    made = None
    if "grow" in steps:
        made = _planned(files, steps["grow"], options, problems)
    if "recommend" in steps and files is not None and not any(p.startswith("recommend.") for p in problems):
        _try(lambda: _recommended(steps["recommend"], str(files)), "recommend", problems)
    if "train" in steps:
        _check_train(steps["train"], steps.get("recommend"), problems)
    if "push" in steps:
        _check_push(steps["push"], problems)
    return None if made is None or files is None else (files, *made)


def _try(work: Callable[[], Any], step: str, problems: list[str]) -> Any:
    """What a step's own check gives, or None and its words among the problems."""
    try:
        return work()
    except WarmstartError as error:
        problems.append(f"{step}: {' '.join(str(error).split())}")
        return None


def _planned(
    files: Path | None, grow: Mapping[str, Any], options: Mapping[str, Any], problems: list[str]
) -> tuple[GrowthConfig, GrowthPlan] | None:
    from ..growth.config import GrowthConfig
    from ..growth.grow import plan_growth
    from ..growth.state import check_state_policy

    if "state_policy" in grow:
        _try(lambda: check_state_policy(grow["state_policy"]), "grow", problems)
    growth = _try(lambda: GrowthConfig.of(None, options), "grow", problems)
    if growth is None or files is None:
        return None
    plan = _try(lambda: plan_growth(files, growth), "grow", problems)
    return None if plan is None else (growth, plan)


def _recommended(options: Mapping[str, Any], checkpoint: str) -> Any:
    from .recipe_steps import recommended

    return recommended(options, checkpoint)


def _check_train(train: Mapping[str, Any], recommend: Mapping[str, Any] | None, problems: list[str]) -> None:
    import dataclasses

    from ..training import WarmstartTrainingArguments

    if "sequence_length" not in train and recommend is None:
        problems.append("train.sequence_length is missing, and there is no recommend that says it")
    for name in ("train", "eval"):
        places = train.get(name, [])
        folders = [place for place in places if Path(place).is_dir()]
        if missing := [place for place in places if not Path(place).exists()]:
            problems.append(f"train.{name}: there are no files {missing}")
        elif folders and len(places) > 1:
            problems.append(f"train.{name}: pass files of text, or one folder of Dataset.save_to_disk, not {places}")
    arguments = train.get("arguments", {})
    known = {item.name for item in dataclasses.fields(WarmstartTrainingArguments) if item.init} - NOT_ARGUMENTS
    unknown = sorted(set(arguments) - known)
    for name in unknown:
        near = difflib.get_close_matches(name, sorted(known), n=1)
        problems.append(
            f"train.arguments.{name} is no training argument here" + (f"; the nearest is {near[0]!r}" if near else "")
        )
    if recommend is None and not {"max_steps", "num_train_epochs"} & set(arguments):
        problems.append("train.arguments says neither max_steps nor num_train_epochs, and there is no recommend")
    if not unknown and "output_dir" in train:
        try:
            WarmstartTrainingArguments(train["output_dir"], **arguments)
        except (ValueError, TypeError, ImportError) as error:
            problems.append(f"train.arguments: {' '.join(str(error).split())}")


def _check_push(push: Mapping[str, Any], problems: list[str]) -> None:
    from ..hub.commit import check_repo_id

    if "repo_id" in push:
        _try(lambda: check_repo_id(push["repo_id"]), "push", problems)
    if push.get("create_pr") and push.get("revision"):
        problems.append("push.create_pr opens a pull request against main; push.revision cannot be given with it")
