"""What laws from small proxies are worth: their settings on a target against a full grid on that target.

    python -m benchmarks.hparams --setting quick --output runs/hparams --pretrain-text stories.txt \\
        --train-text mathematics.txt --eval-text mathematics-held-out.txt

    accelerate launch --cpu --num_processes 2 -m benchmarks.hparams --setting full ...

1. A tokenizer is trained on both texts. 2. `run_sweep` trains proxies from scratch on the text that the target is to be
trained on. 3. Two parents of the target's size are trained: one on the other text alone, one on both. 4. Each parent's held-out
loss goes through the fitted laws to settings for its continued training. 5. The target is trained with these settings, with
the settings of every built-in preset, and over a grid of factors of two, to which neighbours are added where its best point
lies on an edge.

The *regret* of settings is their loss over the grid's best, less one. The grid's best point is chosen by the mean over the
seeds of the grid; the interval is over pairs of runs with fresh seeds, so that the choice of the lowest of many noisy losses
does not count for the grid. The *search compute* is all of the sweep and one evaluation of the parent, over 25 points and
two seeds on the target, in FLOPs by the configs. Runs are divided over the ranks of `accelerate launch`; whatever is finished
is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_warmstart import HparamPredictor, WarmstartError, run_sweep
from hf_warmstart.cli.coverage import versions
from hf_warmstart.scaling.hparams.presets import preset_names
from hf_warmstart.scaling.sweeps.config import SweepConfig
from hf_warmstart.scaling.sweeps.cost import FORWARD_SHARE, GRID_POINTS, GRID_SEEDS
from hf_warmstart.scaling.sweeps.design import Limits, Point, best_point, further_points, on_edge
from hf_warmstart.scaling.sweeps.folder import write_atomically
from hf_warmstart.scaling.sweeps.proxies import Proxy
from hf_warmstart.scaling.sweeps.run import Sweep
from hf_warmstart.scaling.sweeps.text import Blocks, read_blocks
from hf_warmstart.scaling.sweeps.training import Reference, held_out_loss, train
from hf_warmstart.scaling.tables.compute import count_parameters, flops_per_token

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Setting:
    """Sizes of the benchmark.

    Args:
        model: of the target, beside vocabulary and positions. vocabulary, length: of tokens and sequences.
        tokens_per_parameter: of the continued training. parents: tokens per parameter of each parent's own training.
        sweep: fields of `SweepConfig`; `proxies` as shares of the target. side: of the grid, in points. grid_seeds,
        fresh_seeds: of the grid, and of the comparison with its best. extensions: of a grid whose best lies on an edge.
        eval_tokens: of the held-out text, at most.
    """

    model: dict[str, int]
    vocabulary: int
    length: int
    tokens_per_parameter: float
    parents: dict[str, float]
    sweep: dict[str, Any]
    side: int = 5
    grid_seeds: tuple[int, ...] = (0, 1)
    fresh_seeds: tuple[int, ...] = (2, 3, 4)
    extensions: int = 2
    eval_tokens: int = 2**18
    shared: SweepConfig = field(default_factory=lambda: SweepConfig(stop_ratio=None))


def _sizes(hidden: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
    }


SETTINGS = {
    # Minutes: fewer points and seeds than the claim asks for, so that it shows the way and no more.
    "quick": Setting(
        _sizes(48, 128, 2, 6), 512, 64, 1.0, {"stories": 1.5, "both": 4.0},
        {"proxies": (0.09, 0.16, 0.25, 0.34), "tokens_per_parameter": 3, "learning_rates": 4, "batch_sizes": 3,
         "refinements": 1, "min_steps": 20},
        side=3, grid_seeds=(0,), fresh_seeds=(1, 2), extensions=1, eval_tokens=2**14,
    ),
    # Short sequences, since the best batch of the smallest proxies is a few hundred tokens.
    "full": Setting(
        _sizes(96, 256, 3, 12), 512, 64, 4.0, {"stories": 4.0, "both": 16.0},
        {"proxies": (0.025, 0.045, 0.075, 0.12), "tokens_per_parameter": (10, 20), "min_steps": 30},
        eval_tokens=2**16,
    ),
}  # fmt: skip


class Benchmark:
    """All runs of one setting, in a folder."""

    def __init__(self, setting: Setting, texts: dict[str, Path], output: Path):
        self.setting, self.output, self.state = setting, output, PartialState()
        self.tokenizer = self._tokenizer(texts)
        length, vocabulary = setting.length, setting.vocabulary
        self.config = LlamaConfig(
            **setting.model, vocab_size=vocabulary, max_position_embeddings=length, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        read: Callable[[str], Blocks] = lambda name: read_blocks(  # noqa: E731
            texts[name], name, length, vocabulary, self.tokenizer
        )
        self.evaluation = read("eval").first(max(1, setting.eval_tokens // length))
        # One half of the text is what the target is trained on, the other what a parent may know of it.
        known, self.train = (
            Blocks(part.contiguous(), f"half {k}") for k, part in enumerate(read("train").tokens.chunk(2))
        )
        stories = read("pretrain")
        both = torch.cat([stories.tokens[: known.count], known.tokens])
        self.pretrain = {"stories": stories, "both": Blocks(both, "both")}
        self.params = count_parameters(self.config).non_embedding
        self.flops_per_token = flops_per_token(self.config, length)
        self.tokens = self._proxy(setting.tokens_per_parameter).tokens[0]

    # -- parts ----------------------------------------------------------------------------------------------------

    def _tokenizer(self, texts: dict[str, Path]) -> PreTrainedTokenizerFast:
        """A byte-level BPE of all training text."""
        folder = self.output / "tokenizer"
        if not folder.exists():
            if self.state.is_main_process:
                made = Tokenizer(models.BPE())
                made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
                trainer = trainers.BpeTrainer(
                    vocab_size=self.setting.vocabulary,
                    special_tokens=["<|endoftext|>"],
                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                    show_progress=False,
                )
                made.train([str(texts["pretrain"]), str(texts["train"])], trainer)
                PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>").save_pretrained(folder)
            self.state.wait_for_everyone()
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def _proxy(self, tokens_per_parameter: float) -> Proxy:
        """The target itself as something to train."""
        sequences = max(1, round(tokens_per_parameter * self.params / self.setting.length))
        return Proxy(self.config, self.params, self.flops_per_token, self.setting.length, (sequences,))

    def sweep(self) -> Sweep:
        """The proxies, on the text that the target is to be trained on."""
        options = dict(self.setting.sweep)
        options["proxies"] = [round(share * self.params) for share in options["proxies"]]
        return run_sweep(
            self.config,
            train_dataset=self.train.tokens,
            eval_dataset=self.evaluation.tokens,
            output_dir=self.output / "sweep",
            tokens=self.tokens,
            sequence_length=self.setting.length,
            max_eval_tokens=self.evaluation.tokens.numel(),
            **options,
        )

    def parent(self, name: str, predictor: HparamPredictor) -> dict[str, Any]:
        """Train a parent, or read it: its weights and its held-out loss. Its settings are the laws' from scratch."""
        folder = self.output / f"parent-{name}"
        proxy = self._proxy(self.setting.parents[name])
        if self.state.is_main_process and not (folder / "loss.json").exists():
            point = self._settings(predictor, proxy.tokens[0])

            def keep(model: LlamaForCausalLM) -> None:
                model.save_pretrained(folder)
                loss = held_out_loss(model, self.evaluation, self.setting.shared)
                said = {"loss": loss, "learning_rate": point.learning_rate, "batch_sequences": point.batch_sequences}
                write_atomically(folder / "loss.json", json.dumps(said | {"tokens": proxy.tokens[0]}))

            texts = self.pretrain[name], self.evaluation
            train(
                LlamaForCausalLM,
                proxy,
                point,
                0,
                texts,
                self.setting.shared,
                Reference(),
                self.state.device,
                take=keep,
            )
        self.state.wait_for_everyone()
        weights = LlamaForCausalLM.from_pretrained(folder).state_dict()
        return {"weights": weights, **json.loads((folder / "loss.json").read_text())}

    def _settings(self, predictor: HparamPredictor, tokens: int, **state: Any) -> Point:
        found = predictor.recommend(
            params=self.params,
            tokens=tokens,
            sequence_length=self.setting.length,
            per_device_train_batch_size=1,
            **state,
        )
        return Point(found.learning_rate, max(1, round(found.batch_tokens / self.setting.length)))

    # -- runs of the target ---------------------------------------------------------------------------------------

    def losses(self, name: str, weights: Any, jobs: Sequence[tuple[Point, int]]) -> dict[tuple[Point, int], float]:
        """Held-out loss of the target continued from a parent, for each (point, seed); infinite where it diverged."""
        folder = self.output / f"target-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            job: folder / f"b{job[0].batch_sequences}-lr{job[0].learning_rate:.6g}-s{job[1]}.json" for job in jobs
        }
        todo = [job for job in files if not files[job].exists()]
        self.state.wait_for_everyone()
        for point, seed in todo[self.state.process_index :: self.state.num_processes]:
            [outcome] = train(
                LlamaForCausalLM, self._proxy(self.setting.tokens_per_parameter), point, seed, (self.train, self.evaluation),
                self.setting.shared, Reference(), self.state.device, weights=weights,
            )  # fmt: skip
            said = {"status": outcome.status, "loss": outcome.loss, "seconds": outcome.seconds}
            write_atomically(files[point, seed], json.dumps(said))
            self.say(f"{name}: {files[point, seed].stem} {outcome.status} {outcome.loss}")
        self.state.wait_for_everyone()
        found = {job: json.loads(file.read_text())["loss"] for job, file in files.items()}
        return {job: math.inf if loss is None else loss for job, loss in found.items()}

    def grid(self, name: str, weights: Any, centre: Point) -> dict[Point, float]:
        """Point -> mean loss over the grid's seeds; neighbours are added where the best point has none on some side."""
        asked, half = self.setting.shared, self.setting.side // 2
        rate, batch = (round(math.log2(x)) for x in (centre.learning_rate, centre.batch_sequences))
        limits = Limits(max(1, self._proxy(self.setting.tokens_per_parameter).horizons[0] // 10))
        steps = range(-half, self.setting.side - half)
        batches = sorted(
            {max(0, batch + k) for k in steps} | {max(0, batch - half) + k for k in range(self.setting.side)}
        )
        points = [Point(2.0 ** (rate + k), 2**b) for k in steps for b in batches[: self.setting.side]]
        losses: dict[Point, float] = {}
        for _ in range(1 + self.setting.extensions):
            if not points:
                break
            jobs = [(point, seed) for point in points for seed in self.setting.grid_seeds]
            found = self.losses(name, weights, jobs)
            losses |= {p: float(np.mean([found[p, s] for s in self.setting.grid_seeds])) for p in points}
            points = further_points(losses, limits, asked)
        return losses

    # -- the report -----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Everything; the report, which is written as `report.json`."""
        sweep = self.sweep()
        self.say(str(sweep))
        marks = sweep.plan.fingerprint
        predictor = HparamPredictor.fit(sweep)
        self.say(str(predictor))
        grid_flops = GRID_POINTS * GRID_SEEDS * self.tokens * self.flops_per_token
        eval_flops = FORWARD_SHARE * self.flops_per_token * self.evaluation.tokens.numel()
        parents = {name: self.of_parent(name, predictor, marks) for name in self.setting.parents}
        report = {
            "versions": versions(),
            "target": {"params": self.params, "tokens": self.tokens},
            "sweep": sweep.to_dict(),
            "laws": str(predictor).splitlines(),
            "search": {
                "sweep_flops": sweep.spent_flops,
                "evaluation_flops": eval_flops,
                "grid_flops": grid_flops,
                "share": (sweep.spent_flops + eval_flops) / grid_flops,
                "share_of_several_targets": (sweep.spent_flops / len(parents) + eval_flops) / grid_flops,
            },
            "parents": parents,
        }
        if self.state.is_main_process:
            write_atomically(self.output / "report.json", json.dumps(report, indent=2) + "\n")
        return report

    def of_parent(self, name: str, predictor: HparamPredictor, marks: Any) -> dict[str, Any]:
        """Recommended settings, grid and presets for one parent."""
        parent = self.parent(name, predictor)
        weights, before = parent["weights"], parent["loss"]
        found = predictor.recommend(
            params=self.params, tokens=self.tokens, sequence_length=self.setting.length, eval_loss=before,
            eval_fingerprint=marks, config=self.config, per_device_train_batch_size=1,
        )  # fmt: skip
        ours = Point(found.learning_rate, max(1, round(found.batch_tokens / self.setting.length)))
        self.say(f"{name}: loss {before:.4f} -> {ours}")
        grid = self.grid(name, weights, ours)
        best = best_point(grid)
        if best is None:
            raise WarmstartError(f"Every run of the grid from the parent {name!r} diverged.")
        fresh = self.losses(name, weights, [(p, s) for s in self.setting.fresh_seeds for p in (best, ours)])
        pairs = [fresh[ours, s] / fresh[best, s] - 1 for s in self.setting.fresh_seeds]
        return {
            "loss_before": before,
            "tokens_before": parent["tokens"],
            "equivalent_compute": found.equivalent_compute,
            "total_compute": found.total_compute,
            "warnings": list(found.warnings),
            "recommended": self._said(ours, np.mean([fresh[ours, s] for s in self.setting.fresh_seeds])),
            "grid_best": self._said(best, np.mean([fresh[best, s] for s in self.setting.fresh_seeds]))
            | {"points": len(grid), "edge": on_edge(grid, self.setting.shared), "chosen_by": grid[best]},
            "regret": interval(pairs),
            "presets": self._presets(name, weights, grid[best]),
        }

    def _presets(self, name: str, weights: Any, best: float) -> dict[str, Any]:
        """What each preset says of this run, and its regret on the grid's first seed."""
        said, points = {}, {}
        for preset in preset_names():
            try:
                points[preset] = self._settings(
                    HparamPredictor.from_pretrained(preset), self.tokens, config=self.config,
                    tokens_seen=self.setting.parents[name] * self.params,
                )  # fmt: skip
            except WarmstartError as error:
                said[preset] = {"refused": " ".join(str(error).split())[:200]}
        seeds = self.setting.grid_seeds
        losses = self.losses(name, weights, [(p, s) for p in sorted(set(points.values())) for s in seeds])
        for preset, point in points.items():
            loss = float(np.mean([losses[point, s] for s in seeds]))
            said[preset] = self._said(point, loss) | {"regret": loss / best - 1 if math.isfinite(loss) else "diverged"}
        return said

    def _said(self, point: Point, loss: Any) -> dict[str, Any]:
        finite = float(loss) if math.isfinite(loss) else "diverged"
        return {
            "learning_rate": point.learning_rate,
            "batch_tokens": point.batch_sequences * self.setting.length,
            "loss": finite,
        }

    def say(self, words: str) -> None:
        if self.state.is_main_process:
            print(words, flush=True)


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval (Student's t) of a few values."""
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": count}
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": count}


def as_table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = ["| parent | settings | learning rate | batch tokens | loss | regret |", "|---|---|--:|--:|--:|--:|"]
    for name, of in report["parents"].items():
        regret = of["regret"]
        of_ours = f"{_percent(regret['mean'])} ({_percent(regret['low'])} to {_percent(regret['high'])})"
        rows = {
            f"grid's best of {of['grid_best']['points']}": (of["grid_best"], "0"),
            "recommended": (of["recommended"], of_ours),
        }
        rows |= {f"`{p}`": (x, _percent(x.get("regret"))) for p, x in of["presets"].items() if "refused" not in x}
        for settings, (said, own) in rows.items():
            loss = said["loss"] if isinstance(said["loss"], str) else f"{said['loss']:.4f}"
            rate, batch = f"{said['learning_rate']:.3g}", f"{said['batch_tokens']:,}"
            lines.append(f"| {name} | {settings} | {rate} | {batch} | {loss} | {own} |")
    search, targets = report["search"], len(report["parents"])
    lines.append(
        f"\nSearch compute: {search['share']:.1%} of {GRID_POINTS} points and {GRID_SEEDS} seeds on the target; "
        f"{search['share_of_several_targets']:.1%} for each of the {targets} targets that it served."
    )
    return "\n".join(lines)


def _percent(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Settings from laws of small proxies against a grid on the target.")
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="quick")
    parser.add_argument("--pretrain-text", type=Path, required=True, metavar="FILE", help="what the parents know")
    parser.add_argument("--train-text", type=Path, required=True, metavar="FILE", help="of the continued training")
    parser.add_argument("--eval-text", type=Path, required=True, metavar="FILE", help="held-out text of the same kind")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = {"pretrain": options.pretrain_text, "train": options.train_text, "eval": options.eval_text}
    benchmark = Benchmark(SETTINGS[options.setting], texts, options.output)
    benchmark.say(as_table(benchmark.run()))


if __name__ == "__main__":
    main()
