"""What laws from small proxies are worth: their settings on a target against a full grid on that target.

    python -m benchmarks.hparams --setting quick --output runs/hparams --pretrain-text stories.txt \\
        --train-text mathematics.txt --eval-text mathematics-held-out.txt --workers 2

    python -m benchmarks.hparams --output runs/hparams --report --document docs/sweeps.md --plot docs/hparams.png

1. A tokenizer is trained on both texts. 2. `run_sweep` trains proxies from scratch on the text that the target is to be
trained on. 3. Two parents of the target's size are trained: one on the other text alone, one on both. 4. Each parent's
held-out loss goes through the fitted laws to settings for its continued training. 5. The target is trained with these
settings, with those corrected by probes, with the settings of every built-in preset, and over a grid of factors of two, to
which neighbours are added where its best point lies on an edge. Probes are runs of 15 % of the training from the same parent
at rates a factor of two apart, three or as many more as bring their best inside, five at most.

Nothing but the recommended settings depends on the laws: parents are trained, and grids are centred, where DeepSeek's laws
would have it. So sweep, parents and grids run beside one another, and the narrow rounds of the sweep leave no process idle.

The *regret* of settings is their loss over the grid's best, less one. The grid's best point is chosen by the mean over the
seeds of the grid; the interval is over pairs of runs with fresh seeds, so that the choice of the lowest of many noisy losses
does not count for the grid. A preset is compared with the grid's best on one seed. The *search compute* is all of the sweep
and one evaluation of the parent, and beside it that with the probes, over 25 points and two seeds on the target, in FLOPs by
the configs.

Every run is a file in the output folder, so that the same command goes on after `--minutes`, or however it was ended.
"""
