"""`push_to_hub`: weights, config, `growth.json` and card of a grown model in one commit, see `commit_folder`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel

from ..growth.certify import Certificate
from .commit import check_repo_id, commit_folder
from .save import save_grown

if TYPE_CHECKING:
    from ..scaling.hparams.recommendation import HparamRecommendation
    from ..selection.report import SelectionReport


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    certificate: Certificate | None = None,
    metrics: Mapping[str, float] | None = None,
    parent_metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | None = "parent",
    selection: SelectionReport | None = None,
    history: Iterable[Mapping[str, Any]] | None = None,
    recommendation: HparamRecommendation | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **save_kwargs: Any,
) -> CommitInfo:
    """Push a grown model, its growth record and its card to the Hub in one commit.

    A `README.md` that the repository already has is replaced by the new card. Weights that it holds under other names
    (shards where one file is pushed, or the reverse) are removed in the same commit, since `from_pretrained` could load
    them instead.

    Args:
        model (`PreTrainedModel`): a model made by `grow`, trained since or not; its config carries the records.
        repo_id (`str`): the repository, `"org/name"` or `"name"`; made if missing.
        certificate (`Certificate`, *optional*): of the last growth; measured when it is not given (seconds).
        metrics (`dict[str, float]`, *optional*): evaluation results under the names of `Trainer.evaluate()`, such as
            `{"eval_loss": 3.2, "eval_tokens": 65536}`.
        parent_metrics (`dict[str, float]`, *optional*): the same of the parent, on the same data.
        dataset (`str`, *optional*): Hub id or name of the data of `metrics`. Without it the metrics stand in the card's
            text only.
        license (`str`, defaults to `"parent"`): the Hub's identifier of the licence; `"parent"` takes what the parent's own
            card on the Hub says, nothing where there is none. Never guessed.
        selection (`SelectionReport`, *optional*): by which this start was chosen; its files and its table go along.
        history (*optional*): `trainer.state.log_history` of the run since the growth; its curves go along as `curves.png`.
        recommendation (`HparamRecommendation`, *optional*): settings for going on, from `HparamPredictor.recommend`.
        commit_message (`str`, *optional*): defaults to `"Upload grown <class>"`.
        private (`bool`, *optional*): whether a new repository is private; None takes the owner's default.
        token (`bool` or `str`, *optional*): as in `huggingface_hub`; None takes the one that is logged in.
        revision (`str`, *optional*): the branch; made if missing. Defaults to `main`.
        create_pr (`bool`, defaults to `False`): open a pull request with the commit instead of changing the branch.
        **save_kwargs: passed to `save_pretrained`, such as `max_shard_size="5GB"`.

    Returns:
        The `huggingface_hub.CommitInfo` of the commit. The model is untouched.

    Raises:
        WarmstartError: the model carries no record, a metric is not a finite number, a keyword does not fit, or `repo_id` is
            no id; nothing is sent.
        HubError: the Hub refused (no such token or right, no such revision, something changed meanwhile), or the connection
            broke; what to do is said, and what the client raised is its `__cause__`.

    Example:

        >>> grown = grow(parent, width=2)  # doctest: +SKIP
        >>> push_to_hub(grown, "my-org/my-grown-model", license="apache-2.0").commit_url  # doctest: +SKIP
        'https://huggingface.co/my-org/my-grown-model/commit/...'
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        # Saved first: what cannot be saved leaves no empty repository behind.
        save_grown(
            model,
            folder,
            certificate=certificate,
            metrics=metrics,
            parent_metrics=parent_metrics,
            dataset=dataset,
            license=license,
            model_name=repo_id.rpartition("/")[2],
            selection=selection,
            history=history,
            recommendation=recommendation,
            **save_kwargs,
        )
        return commit_folder(
            folder,
            repo_id,
            commit_message=commit_message or f"Upload grown {type(model).__name__}",
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )
