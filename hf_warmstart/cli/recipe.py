"""`hf-warmstart run`: plan, grow, recommend, train and push as one recipe says."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .options import console, escape
from .plan import as_data, show
from .progress import bar, json_lines, write_line

if TYPE_CHECKING:
    from .recipe_file import RunRecipe

EXAMPLES = """examples:
  hf-warmstart run recipe.yaml --dry-run
  hf-warmstart run recipe.yaml

recipe.yaml:
  parent: runs/base/checkpoint-500            # a folder or Hub id; with revision and subfolder of it
  grow:
    output: runs/larger
    width: 1.5                                # fields of GrowthConfig, or sizes such as hidden_size
    depth: 2
  recommend:                                  # from here on each step can be left out
    law: steplaw                              # a preset, a folder of `fit --output`, or a Hub id
    tokens: 20M
    tokens_seen: 10M                          # by the parent, where its checkpoint does not say
    sequence_length: 128
  train:
    output_dir: runs/continued
    train: corpus.txt
    eval: held-out.txt
    arguments: {schedule_policy: rewarm}      # fields of WarmstartTrainingArguments; they go before the law's
  push:
    repo_id: my-org/my-grown-model
    license: apache-2.0
Everything is checked before the first step. A run that was stopped goes on when the same command runs again.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="run a recipe: plan, grow, recommend, train and push from one YAML file",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; see below")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, run nothing")
    parser.add_argument(
        "--json", action="store_true", help="write JSON lines to stdout: progress, then each step's result"
    )
    parser.set_defaults(run=run, when_stopped=" The same command goes on where it was.")


def run(options: argparse.Namespace) -> int:
    """Run the recipe; 0."""
    from . import recipe_steps as steps
    from .recipe_file import read_recipe

    recipe = read_recipe(options.recipe)
    there = steps.grown_before(recipe)
    if options.json:
        write_line({"event": "plan", **as_data(recipe.plan)})
    elif options.dry_run or there is None:
        show(recipe.plan)
    if options.dry_run:
        if not options.json:
            console().print(f"  {escape(_outline(recipe))}. Nothing was run.", soft_wrap=True)
        return 0
    record, was_there = steps.grow(recipe, lambda: json_lines() if options.json else bar("growing"))
    before, after = record.parameters
    output = recipe.grow["output"]
    _told(options, "grow", was_there, f"{output}: {before:,} -> {after:,} parameters", output=output)
    advice = None
    if recipe.recommend is not None:
        advice = steps.recommended(recipe.recommend, output)
        words = (
            f"learning rate {advice.learning_rate:.3g}, batch {advice.batch_tokens:,} tokens, {advice.steps:,} steps"
        )
        _told(options, "recommend", False, words, recommendation=advice.to_dict())
        for warning in advice.warnings if not options.json else ():
            console().print(f"  [yellow]![/] {escape(warning)}", soft_wrap=True)
    results: dict[str, float] = {}
    if recipe.train is not None:
        quiet = options.json or not console(stderr=True).is_terminal
        results, ended = steps.train(recipe, advice, quiet)
        words = f"{recipe.train['output_dir']}: held-out loss {results['eval_loss']:.4f}"
        _told(options, "train", ended, words, output=recipe.train["output_dir"], metrics=results)
    if recipe.push is not None:
        made = steps.push(recipe, results)
        url = made.pr_url or made.commit_url
        _told(options, "push", False, f"{recipe.push['repo_id']}: {url}", commit=made.oid, url=url)
    return 0


def _outline(recipe: RunRecipe) -> str:
    """The steps in words."""
    words = [f"grow {recipe.parent} into {recipe.grow['output']}"]
    if recipe.recommend is not None:
        words.append(f"recommend by {recipe.recommend['law']}")
    if recipe.train is not None:
        words.append(f"train in {recipe.train['output_dir']} on {', '.join(recipe.train['train'])}")
    if recipe.push is not None:
        words.append(f"push {recipe.pushed_folder} to {recipe.push['repo_id']}")
    return ", ".join(words)


def _told(options: argparse.Namespace, step: str, was_done: bool, words: str, **data: Any) -> None:
    """What a step did, or found done."""
    if options.json:
        write_line({"event": "step", "step": step, "was_done": was_done, **data})
    else:
        before = " (was there)" if was_done else ""
        console().print(f"[bold]{step}[/]{before} {escape(words)}", soft_wrap=True)
