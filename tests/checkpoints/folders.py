"""Small folders of safetensors, and a writer for any header."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_warmstart.checkpoints.safetensors.sink import SafetensorsSink
from hf_warmstart.checkpoints.target.staging import Staging


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and ranks, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(12, 8, generator=generator).to(torch.bfloat16),
        "layers.0.weight": torch.randn(6, 4, 2, generator=generator),
        "layers.1.weight": torch.randn(16, 3, generator=generator).to(torch.float16),
        "scale": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
        "steps": torch.arange(5),
    }


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a sink is told of tensors."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_tensors(sink: SafetensorsSink, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Write all shards that are not done; returns their names."""
    written = []
    for shard in sink.shards:
        if not shard.done:
            with shard.open():
                for name in shard.layout:
                    shard.write(tensors[name])
            written.append(shard.name)
    return written


def make_single(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A folder with one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors or some_tensors(), folder / "model.safetensors", {"format": "pt"})
    return folder


def make_sharded(folder: Path) -> Path:
    """A folder with an index and two files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = some_tensors()
    parts = {"a.safetensors": list(tensors)[:3], "b.safetensors": list(tensors)[3:]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    write_index(folder, {name: file for file, names in parts.items() for name in names})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A file with any header: a JSON value, or text as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class WholeSink(SafetensorsSink):
    """A sink with a staging of its own, for folders that hold weights alone."""

    def __init__(self, target, tensors, **options):
        staging = Staging(target)
        try:
            super().__init__(staging, tensors, **options)
        except BaseException:
            staging.leave()
            raise

    @property
    def folder(self):
        return self.staging.folder

    def publish(self):
        self.finish()
        self.staging.publish()
        self.close()

    def discard(self):
        super().close()
        self.staging.discard()

    def close(self):
        super().close()
        self.staging.close()
