"""Publishing a folder: a grown model, laws of hyper-parameters or the report of a selection, whichever lies in it.

Everything is read and checked before the first request. A model's own card is kept; where there is none, or the stock one
of `Trainer`, it is made from the growth record in the config. No file that holds a token is sent.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, ModelCard
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import WarmstartError
from ..growth.certify import Certificate
from ..growth.plan import RECORD_KEY
from ..growth.source import read_config
from ..redaction import HIDDEN, redact
from .commit import commit_folder
from .facts import checked_metrics
from .save import CARD_NAME, GROWTH_NAME, description, files_below

# Of a model's folder: other checkpoints, logs, what is hidden or unfinished, and a pickle that nothing loads and that may
# hold a token (`TrainingArguments.hub_token`).
LEFT_OUT = ("checkpoint-*/*", "runs/*", ".*", "*/.*", "*.tmp", "*.lock", "training_args.bin")
TEXT_SUFFIXES = {".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja", ".py", ".csv"}
MAX_TEXT_BYTES = 20_000_000
LAW_KIND = "hparam_predictor"
REPORT_NAME = "selection.json"
RECIPE_NAME = "recipe.yaml"


@dataclass(frozen=True)
class FolderPush:
    """A push that was checked and not begun; `prepare_push` makes it, `run` sends it. A context manager.

    Args:
        kind (`str`): `"model"`, `"laws"` or `"selection"`. repo_id (`str`): where to.
        folder: where the files are. files: their paths in it. left_out: files that stay here.
        texts: contents that are made for the push, by name. where: `subfolder` and the like, for the commit.
    """

    kind: str
    repo_id: str
    folder: Path
    files: list[str]
    left_out: list[str] = field(default_factory=list)
    texts: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    _made: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> FolderPush:
        return self

    def __exit__(self, *error: object) -> None:
        self._made.close()

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file that is sent, by its path in the repository."""
        prefix = f"{self.where['subfolder']}/" if self.where.get("subfolder") else ""
        found = {name: (self.folder / name).stat().st_size for name in self.files}
        found |= {name: len(text.encode()) for name, text in self.texts.items()}
        return {prefix + name: found[name] for name in sorted(found)}

    def run(self, **options: Any) -> CommitInfo:
        """Make the commit. Options are those of `commit_folder`: `private`, `token`, `revision`, `create_pr`."""
        message = options.pop("commit_message", None) or f"Upload {_WORDS[self.kind]}"
        return commit_folder(
            self.folder,
            self.repo_id,
            files=self.files,
            texts=self.texts,
            commit_message=message,
            **self.where,
            **options,
        )


_WORDS = {"model": "grown model", "laws": "laws of hyper-parameters", "selection": "choice of the warm start"}


def prepare_push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    subfolder: str = "",
    certificate: Certificate | None = None,
    recipe: str | None = None,
) -> FolderPush:
    """Read and check what a push would send; nothing is sent.

    Args:
        folder: a grown model's folder (of `save_grown`, `grow_checkpoint`, `save_pretrained` or a `Trainer`), one of
            `HparamPredictor.save_pretrained`, or the `output_dir` of a selection.
        repo_id (`str`): the repository, `"org/name"` or `"name"`.
        license (`str`, *optional*): the Hub's identifier of the licence, for the card. Never guessed.
        dataset, metrics (*optional*): of a model, as for `push_to_hub`. Any of these three makes the card anew.
        subfolder (`str`, *optional*): of the repository, for a model's checkpoint; no card is made there.
        certificate (`Certificate`, *optional*): of a model's growth, where the folder has no `growth.json` that says it.
        recipe (`str`, *optional*): the YAML that made a model, for its card and beside it.

    Raises:
        WarmstartError: it is none of these, weights are missing, or a file holds a token; all of them are named.
    """
    folder = Path(folder)
    kind = _kind(folder)
    given = [n for n, v in {"dataset": dataset, "metrics": metrics, "subfolder": subfolder}.items() if v]
    if kind != "model" and given:
        raise WarmstartError(f"{given} are of a grown model; {folder} holds {_WORDS[kind]}. Leave them out.")
    with ExitStack() as made:
        if kind == "model":
            facts = {"license": license, "dataset": dataset, "metrics": checked_metrics(metrics), "recipe": recipe}
            push = _model(folder, repo_id, facts, certificate, subfolder.strip("/"))
        else:
            push = _made_anew(kind, folder, repo_id, license, made)
        _refuse_tokens(push)
        push._made.enter_context(made.pop_all())
    return push


def _kind(folder: Path) -> str:
    """What lies in a folder.

    Raises:
        WarmstartError: nothing that is published from here.
    """
    if not folder.is_dir():
        raise WarmstartError(f"{str(folder)!r} is no folder. Pass the one that holds what is to be pushed.")
    if (folder / REPORT_NAME).is_file() and not (folder / CONFIG_NAME).is_file():
        return "selection"
    try:
        data = json.loads((folder / CONFIG_NAME).read_bytes())
    except FileNotFoundError:
        data = {}
    except ValueError as error:
        raise WarmstartError(f"{folder / CONFIG_NAME} is damaged: {error}") from error
    if isinstance(data, dict) and data.get("kind") == LAW_KIND:
        return "laws"
    if isinstance(data, dict) and data.get(RECORD_KEY):
        return "model"
    lack = f"a {CONFIG_NAME} without a growth record" if data else f"neither {CONFIG_NAME} nor {REPORT_NAME}"
    raise WarmstartError(
        f"{folder} holds {lack}. Pass a grown model's folder, laws that `hf-warmstart fit --output` saved, or the output of "
        "a selection; `hf upload` publishes anything else."
    )


def _model(
    folder: Path, repo_id: str, facts: dict[str, Any], certificate: Certificate | None, subfolder: str
) -> FolderPush:
    """A grown model's folder, its card and `growth.json` made where they are missing."""
    _check_weights(folder)
    config = read_config(folder)
    names = files_below(folder)
    out = [name for name in names if any(fnmatchcase(name, pattern) for pattern in LEFT_OUT)]
    files = [name for name in names if name not in out]
    texts: dict[str, str] = {}
    if not subfolder and (any(facts.values()) or _needs_card(folder / CARD_NAME)):
        texts = _described(config, folder, repo_id, certificate, facts)
        texts |= {RECIPE_NAME: facts["recipe"]} if facts["recipe"] else {}
    return FolderPush(
        "model", repo_id, folder, [name for name in files if name not in texts], out, texts, {"subfolder": subfolder}
    )


def _needs_card(path: Path) -> bool:
    """Whether there is no card, or the one that `Trainer` makes of its own log, which knows nothing of the growth."""
    if not path.is_file():
        return True
    return "generated_from_trainer" in (_metadata(path).get("tags") or [])


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata of a card in a file; empty where there is none.

    Raises:
        WarmstartError: its metadata cannot be read; the Hub would not take it.
    """
    try:
        return dict(ModelCard.load(path).data.to_dict()) if path.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        words = " ".join(str(error).split())
        raise WarmstartError(f"The metadata of {path} cannot be read: {words}. Mend or remove it.") from error


def _described(
    config: PreTrainedConfig, folder: Path, repo_id: str, certificate: Certificate | None, facts: dict[str, Any]
) -> dict[str, str]:
    """Card and `growth.json`: what is not given is taken from what lies in the folder, else measured or left out."""
    known = _growth_facts(folder)
    return description(
        config,
        certificate=certificate or known_certificate(folder),
        metrics=facts["metrics"] or known.get("metrics"),
        dataset=facts["dataset"] or known.get("dataset"),
        license=facts["license"] or _metadata(folder / CARD_NAME).get("license") or "parent",
        model_name=repo_id.rpartition("/")[2],
        files=known.get("files"),
        recipe=facts["recipe"],
    )


def _growth_facts(folder: Path) -> dict[str, Any]:
    path = folder / GROWTH_NAME
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise WarmstartError(f"{path} is damaged: {error}. Remove it to have it made anew.") from error


def known_certificate(folder: Path) -> Certificate | None:
    """The certificate that a grown folder's `growth.json` holds.

    Raises:
        WarmstartError: it is damaged.
    """
    facts = _growth_facts(folder)
    if not facts:
        return None
    try:
        return Certificate(**{name: _number(value) for name, value in facts["certificate"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise WarmstartError(
            f"{folder / GROWTH_NAME} is damaged: {error!r}. Remove it to have it made anew."
        ) from error


def _number(value: Any) -> Any:
    """What strict JSON writes as a word."""
    return float(value) if value in ("inf", "-inf", "nan") else value


def _check_weights(folder: Path) -> None:
    """Raise unless a folder holds whole safetensors, or shards of a distributed checkpoint."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        wanted = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if missing := [name for name in wanted if not (folder / name).is_file()]:
            raise WarmstartError(f"{folder} lacks {missing}, of which its {index.name} tells. Nothing was sent.")
    elif not (folder / SAFE_WEIGHTS_NAME).is_file() and not any(folder.glob("pytorch_model_fsdp_*")):
        raise WarmstartError(
            f"{folder} holds no weights: neither {SAFE_WEIGHTS_NAME} nor {index.name}. Nothing was sent."
        )


def _made_anew(kind: str, folder: Path, repo_id: str, license: str | None, made: ExitStack) -> FolderPush:
    """Laws or a report, saved anew with a card that names the repository."""
    anew = Path(made.enter_context(tempfile.TemporaryDirectory()))
    if kind == "laws":
        from ..scaling.hparams.predictor import HparamPredictor

        predictor = HparamPredictor.from_pretrained(folder)
        predictor.save_pretrained(anew, model_card_kwargs={"repo_id": repo_id, "license": license})
    else:
        from ..selection.published import report_card
        from ..selection.report import SelectionReport

        report = SelectionReport.load(folder)
        report.save(anew)
        report_card(report, repo_id=repo_id, license=license).save(anew / CARD_NAME)
    return FolderPush(kind, repo_id, anew, files_below(anew))


def _refuse_tokens(push: FolderPush) -> None:
    """Raise where a text that would be sent holds a token.

    Raises:
        WarmstartError: all such files are named.
    """
    texts = dict(push.texts)
    for name in push.files:
        path = push.folder / name
        if path.suffix in TEXT_SUFFIXES and path.stat().st_size <= MAX_TEXT_BYTES:
            texts[name] = path.read_text(encoding="utf-8", errors="replace")
    held = sorted(name for name, text in texts.items() if redact(text).count(HIDDEN) > text.count(HIDDEN))
    if held:
        raise WarmstartError(
            f"{held} hold a token, which whoever reads the repository could use. Take it out, and revoke it if it was shared."
        )
