"""Names of the files in a `Trainer` checkpoint, as `transformers.trainer` has them.

Repeated here because importing that module brings in datasets and most of transformers' integrations, which takes as long as
growing a gigabyte (`benchmarks/streaming.py` counts it). `tests/checkpoints/test_trainer_files.py` holds them against the
originals.
"""

OPTIMIZER_NAME = "optimizer.pt"
OPTIMIZER_NAME_BIN = "optimizer.bin"
PREFIX_CHECKPOINT_DIR = "checkpoint"
SCHEDULER_NAME = "scheduler.pt"
TRAINER_STATE_NAME = "trainer_state.json"
TRAINING_ARGS_NAME = "training_args.bin"
