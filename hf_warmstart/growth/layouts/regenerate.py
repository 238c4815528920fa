"""Write the layouts on file anew, or check that they are what the package derives.

python -m hf_warmstart.growth.layouts [TYPE ...]            writes families/TYPE.json (all types by default)
python -m hf_warmstart.growth.layouts --check [TYPE ...]    writes nothing; exit code 1 where a file is stale
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from transformers import PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version

from ...errors import WarmstartError
from ..configs import resize_config
from ..twin import FAULTS
from ..zoo import entries, source_of
from . import cache
from .lookup import derived


def variants(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A class's default switches, and for plain decoders the usual others: tied or not, grouped key/value heads or not."""
    yield config
    data = config.to_dict()
    heads, kv_heads = data.get("num_attention_heads"), data.get("num_key_value_heads")
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or any("expert" in name for name in data):
        return
    for tied in (config.tie_word_embeddings, not config.tie_word_embeddings):
        for count in (heads, heads // 2):
            try:
                yield resize_config(config, {"tie_word_embeddings": tied, "num_key_value_heads": count})
            except (WarmstartError, *FAULTS):
                continue  # a class that does not have this variant


def family(model_type: str) -> str | None:
    """The text of one family's file; None where nothing of it can be derived."""
    made: list[dict] = []
    for kind, name in entries(types=[model_type]):
        try:
            model_class, config = source_of(kind, name)
        except FAULTS:
            continue
        for variant in variants(config):
            _add(made, model_class, variant)
    return cache.dumps(model_type, made, transformers_version) if made else None


def _add(made: list[dict], model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    try:
        digest = cache.switches(config)
        if any(e["class"] == model_class.__name__ and digest in e["switches"] for e in made):
            return
        layout = derived(model_class, config).to_data()
    except (WarmstartError, *FAULTS):
        return  # refused when asked for, with the reason
    for entry in made:
        if entry["class"] == model_class.__name__ and entry["layout"] == layout:
            entry["switches"].append(digest)
            return
    made.append({"class": model_class.__name__, "switches": [digest], "layout": layout})


def _worker() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hf_warmstart.growth.layouts", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a file is stale")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    types = sorted({name for _, name in entries(types=asked.types)})
    stale = []
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn"), initializer=_worker) as pool:
        for done, (model_type, text) in enumerate(zip(types, pool.map(family, types), strict=True), 1):
            path = cache.FOLDER / f"{model_type}.json"
            same = (path.read_text() if path.is_file() else None) == text
            sys.stderr.write(f"{done}/{len(types)} {model_type}: {'same' if same else 'changed'}\n")
            if same:
                continue
            stale.append(model_type)
            if asked.check:
                continue
            if text is None:
                path.unlink()
            else:
                path.write_text(text)
    return int(asked.check and bool(stale))
