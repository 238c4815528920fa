"""The names of a checkpoint's files are transformers', and growing a checkpoint does not import its trainer."""

import subprocess
import sys

from transformers import trainer, trainer_utils

from hf_warmstart.checkpoints.state import trainer_files


def test_names_are_those_of_transformers():
    names = {name: value for name, value in vars(trainer_files).items() if name.isupper()}
    assert len(names) == 6
    assert names == {name: getattr(trainer, name, None) or getattr(trainer_utils, name) for name in names}


def test_growing_a_checkpoint_imports_no_trainer():
    code = "import sys, hf_warmstart.checkpoints.grow_checkpoint; print(*{'transformers.trainer', 'datasets'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
