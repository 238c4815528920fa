"""`hf-warmstart push`: a grown model, laws or a selection's report, from a folder to the Hub in one commit."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..errors import WarmstartError
from .options import console, escape, named_values, new_table, notice, write_json

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from ..hub.folder import FolderPush

EXAMPLES = """examples:
  hf-warmstart push runs/grown my-org/my-grown-model --private --license apache-2.0
  hf-warmstart push runs/grown my-org/my-grown-model --metric eval_loss=3.21 --metric eval_tokens=65536 --dataset my-org/text
  hf-warmstart push runs/grown/checkpoint-500 my-org/my-grown-model --subfolder checkpoint-500
  hf-warmstart push my-law my-org/my-law --create-pr
  hf-warmstart push runs/selection my-org/my-selection --dry-run
Which token: that of HF_TOKEN, or the one that `hf auth login` keeps. A push that broke is repeated by the same command: large
files that arrived are not sent again, and a commit is made whole or not at all.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "push",
        help="publish a grown model, laws or a selection's report on the Hub",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="of a grown model, of laws, or of a selection")
    parser.add_argument("repo_id", metavar="REPO", help="the repository, my-org/my-model; made if missing")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="made if missing (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--subfolder", default="", metavar="PATH", help="of the repository, for a model's checkpoint")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    card = parser.add_argument_group("the card, which is made anew where one of these is given")
    card.add_argument("--license", metavar="NAME", help="the Hub's identifier, such as apache-2.0; never guessed")
    card.add_argument("--dataset", metavar="NAME", help="a model's held-out data, that the metrics are of")
    card.add_argument(
        "--metric", action="append", default=[], metavar="NAME=VALUE", help="a result on it, such as eval_loss=3.21"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would go, send nothing")
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    parser.set_defaults(run=run, when_stopped=" The same command goes on; no half commit is left.")


def run(options: argparse.Namespace) -> int:
    """Push; 0."""
    from ..hub.commit import check_repo_id
    from ..hub.folder import prepare_push

    if options.create_pr and options.revision:
        raise WarmstartError("--create-pr opens a pull request against main; --revision cannot be given with it.")
    check_repo_id(options.repo_id)
    with prepare_push(
        options.folder,
        options.repo_id,
        license=options.license,
        dataset=options.dataset,
        metrics=named_values(options.metric, "--metric"),
        subfolder=options.subfolder,
    ) as push:
        if options.dry_run:
            show(push, options)
            return 0
        where = {"private": options.private or None, "revision": options.revision, "create_pr": options.create_pr}
        made = push.run(commit_message=options.message, **where)
        told(push, made, options)
    return 0


def show(push: FolderPush, options: argparse.Namespace) -> None:
    """What would go."""
    if options.json:
        write_json({"event": "plan", **as_data(push)})
        return
    out = console()
    out.print(f"[bold]{escape(push.repo_id)}[/]: {push.kind}, {sum(push.sizes.values()):,} bytes. Nothing was sent.")
    table = new_table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    prefix = f"{push.where['subfolder']}/" if push.where.get("subfolder") else ""
    for name, nbytes in push.sizes.items():
        table.add_row(
            escape(name), f"{nbytes:,}", "made for the push" if name.removeprefix(prefix) in push.texts else ""
        )
    out.print(table)
    if push.left_out:
        out.print(f"  stays here: {escape(_listed(push.left_out))}", soft_wrap=True)


def told(push: FolderPush, made: CommitInfo, options: argparse.Namespace) -> None:
    """What was done."""
    if options.json:
        write_json(
            {"event": "done", **as_data(push), "commit": made.oid, "url": made.commit_url, "pr_url": made.pr_url}
        )
        return
    if push.left_out:
        notice(options.command, f"stays here: {_listed(push.left_out)}")
    words = f"{len(push.sizes)} files, {sum(push.sizes.values()):,} bytes: {made.pr_url or made.commit_url}"
    console().print(f"{escape(push.repo_id)}: {escape(words)}", soft_wrap=True)


def as_data(push: FolderPush) -> dict[str, Any]:
    """A push as plain data."""
    return {"kind": push.kind, "repo_id": push.repo_id, "files": push.sizes, "left_out": push.left_out}


def _listed(paths: list[str]) -> str:
    """Paths in words, those of a folder as one."""
    counts = Counter(path.partition("/")[0] + "/" if "/" in path else path for path in paths)
    return ", ".join(f"{name} ({count} files)" if name.endswith("/") else name for name, count in counts.items())
