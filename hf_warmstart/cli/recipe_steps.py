"""The steps of a recipe: grow, recommend, train, push. Each finds by itself what an earlier run of it left, and goes on there.

| step | goes on |
|---|---|
| grow | where its output is there, it is compared with the recipe and kept; else behind the last file that was finished |
| recommend | it is worked out again: it is read off files alone |
| train | from the last checkpoint; where the run had ended, nothing is trained |
| push | files that stand on the Hub unchanged are not sent, and where none is new there is no commit |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, WarmstartError
from ..growth.config import AUTO
from ..growth.default_operator import CHOICES

if TYPE_CHECKING:
    from datasets import Dataset
    from huggingface_hub import CommitInfo

    from ..growth.plan import GrowthRecord
    from ..scaling.hparams.recommendation import HparamRecommendation
    from .recipe_file import RunRecipe

Report = Callable[[int, int], None]
RECIPE_NAME = "recipe.yaml"
EVALUATION_NAME = "eval_results.json"  # as Trainer.save_metrics("eval") names it


def parent_files(parent: str, revision: str | None = None, subfolder: str = "") -> Path:
    """The folder with a parent's config and `trainer_state.json`, where it has one; of a Hub id these two alone are fetched.

    Raises:
        WarmstartError: there is no such folder, or the Hub does not give it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from transformers.utils import CONFIG_NAME

    from ..checkpoints.fetch import checked_subfolder, described, folders_with, hub_faults, local_folder
    from ..checkpoints.state.trainer_files import TRAINER_STATE_NAME

    if Path(parent).is_dir():
        return local_folder(parent, revision, subfolder)
    subfolder = checked_subfolder(subfolder)
    names = [str(Path(subfolder, name)) for name in (CONFIG_NAME, TRAINER_STATE_NAME)]
    with hub_faults(parent):
        folder = Path(snapshot_download(parent, revision=revision, allow_patterns=names), subfolder)
        if (folder / CONFIG_NAME).is_file():
            return folder
        there = HfApi().list_repo_files(parent, revision=revision)
    found = [folder for folder in folders_with(there, CONFIG_NAME) if folder]
    advice = f" Models lie in {found}: pass one as the subfolder." if found else ""
    raise WarmstartError(f"{described(parent, subfolder)} holds no {CONFIG_NAME}.{advice}")


# -- grow -------------------------------------------------------------------------------------------------------------


def grown_before(recipe: RunRecipe) -> GrowthRecord | None:
    """The record of the output, where an earlier run made it.

    Raises:
        CheckpointError: the folder holds something else, or another growth.
    """
    from ..checkpoints.records import last_record

    output = Path(recipe.grow["output"])
    if not output.is_dir() or not any(output.iterdir()):
        return None
    try:
        record = last_record(output)
    except WarmstartError as error:
        raise CheckpointError(f"{output} is not empty, and holds no growth of this recipe's: {error}") from error
    asked, found = recipe.growth.to_dict(), dict(record.growth_config)
    if asked["width_operator"] == AUTO and found.get("width_operator") in CHOICES:
        asked["width_operator"] = found["width_operator"]
    differing = sorted(name for name in {*asked, *found} - {"library_version"} if asked.get(name) != found.get(name))
    is_folder = Path(recipe.parent).is_dir()
    if record.parent not in {recipe.parent, *([recipe.parent_files.name] if is_folder else [])}:
        differing.append("parent")
    if not is_folder and record.subfolder != recipe.subfolder:
        differing.append("subfolder")
    if differing:
        raise CheckpointError(
            f"{output} holds another growth: {', '.join(differing)} differ from the recipe. Pass another output, or remove it."
        )
    return record


def grow(recipe: RunRecipe, bar: Callable[[], AbstractContextManager[Report]]) -> tuple[GrowthRecord, bool]:
    """Grow, or find what was grown; the record, and whether it was there."""
    from ..checkpoints.grow_checkpoint import grow_checkpoint

    if (record := grown_before(recipe)) is not None:
        return record, True
    how = {name: value for name, value in recipe.grow.items() if name != "output"}
    with bar() as report:
        made = grow_checkpoint(
            recipe.parent,
            recipe.grow["output"],
            recipe.growth,
            revision=recipe.revision,
            subfolder=recipe.subfolder,
            progress=report,
            **how,
        )
    return made, False


# -- recommend --------------------------------------------------------------------------------------------------------


def recommended(options: Mapping[str, Any], checkpoint: str) -> HparamRecommendation:
    """What the law recommends for a checkpoint."""
    from ..scaling.hparams.predictor import HparamPredictor

    given = dict(options)
    return HparamPredictor.from_pretrained(given.pop("law")).recommend(checkpoint=checkpoint, **given)


# -- train ------------------------------------------------------------------------------------------------------------


def train(recipe: RunRecipe, advice: HparamRecommendation | None, quiet: bool) -> tuple[dict[str, float], bool]:
    """Train the grown model, or go on; its held-out results, and whether the run had ended before."""
    from transformers import PrinterCallback, default_data_collator
    from transformers.trainer_utils import get_last_checkpoint

    from ..growth.configs import model_class_of
    from ..growth.source import read_config
    from ..training import WarmstartTrainer, WarmstartTrainingArguments

    options = recipe.train or {}
    output, grown = Path(options["output_dir"]), recipe.grow["output"]
    given = {"report_to": "none", "save_total_limit": 2, "disable_tqdm": quiet, **options.get("arguments", {})}
    if advice is not None:
        args = advice.training_arguments(output, args_class=WarmstartTrainingArguments, **given)
    else:
        args = WarmstartTrainingArguments(str(output), **given)
    if (results := _ended(output, args.max_steps)) is not None:
        return results, True
    vocabulary = read_config(grown).get_text_config().vocab_size
    tokenizer = _tokenizer(options.get("tokenizer") or grown)
    data = {
        name: blocks(options[name], name, recipe.sequence_length, vocabulary, tokenizer) for name in ("train", "eval")
    }
    model = model_class_of(read_config(grown)).from_pretrained(grown)
    trainer = WarmstartTrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        warmstart_from=parent_state(recipe),
    )
    trainer.remove_callback(PrinterCallback)  # where bars are off: it prints every log to stdout
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    results = {**trainer.evaluate(), "eval_tokens": len(data["eval"]) * (recipe.sequence_length - 1)}
    trainer.save_model()
    trainer.save_metrics("eval", results, combined=False)
    trainer.save_state()  # last: what says that the run has ended
    return results, False


def parent_state(recipe: RunRecipe) -> Path | None:
    """The folder with the parent's training state, fetched where it lies on the Hub; None where it has no optimizer's."""
    from ..checkpoints.fetch import training_state_folder
    from ..checkpoints.state.parent_state import optimizer_file
    from ..checkpoints.state.trainer_files import TRAINER_STATE_NAME
    from ..checkpoints.torch_files.sharded import is_sharded

    if not (recipe.parent_files / TRAINER_STATE_NAME).is_file():
        return None
    folder = training_state_folder(recipe.parent, recipe.revision, recipe.subfolder)
    return folder if optimizer_file(folder) is not None or is_sharded(folder / "optimizer_0") else None


def _ended(output: Path, steps: int) -> dict[str, float] | None:
    """The held-out results of a run that ended after so many steps (by epochs where that is not positive)."""
    from ..checkpoints.state.trainer_files import TRAINER_STATE_NAME

    state, results = output / TRAINER_STATE_NAME, output / EVALUATION_NAME
    if not state.is_file() or not results.is_file():
        return None
    done = json.loads(state.read_bytes())
    wanted = steps if steps > 0 else done.get("max_steps", 0)
    return json.loads(results.read_bytes()) if done.get("global_step", 0) >= wanted else None


def _tokenizer(source: str) -> Any:
    """The tokenizer of a folder or Hub id; None where it has none, which is a fault for text alone."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None


def blocks(places: list[str], what: str, sequence_length: int, vocabulary: int, tokenizer: Any) -> Dataset:
    """Blocks of tokens from files of text, or from a folder of `Dataset.save_to_disk`."""
    from datasets import Dataset, load_from_disk

    from ..scaling.sweeps.text import read_blocks

    source = load_from_disk(places[0]) if Path(places[0]).is_dir() else places
    rows = read_blocks(source, f"train.{what}", sequence_length, vocabulary, tokenizer).tokens.tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


# -- push -------------------------------------------------------------------------------------------------------------


def push(recipe: RunRecipe, results: Mapping[str, float]) -> CommitInfo:
    """Push what was trained, or grown, with a card that holds the recipe."""
    from ..hub.folder import known_certificate, prepare_push

    options = dict(recipe.push or {})
    repo_id = options.pop("repo_id")
    message = options.pop("message", None)
    card: dict[str, Any] = {name: options.pop(name, None) for name in ("license", "dataset")}
    # What `Trainer` says of the measurement changes with every run, and would make every push another commit.
    numbers = {name: value for name, value in results.items() if name in ("eval_loss", "eval_tokens")}
    card |= {"metrics": numbers, "recipe": recipe.text, "certificate": known_certificate(Path(recipe.grow["output"]))}
    with prepare_push(recipe.pushed_folder, repo_id, **card) as prepared:
        return prepared.run(commit_message=message, **options)
