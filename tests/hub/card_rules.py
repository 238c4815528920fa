"""The Hub's documented rules for a card's metadata, as far as grown models use it.

Source: `modelcard.md` of huggingface/hub-docs (what is required), and the patterns that the Hub's own messages quote
(`/^(?:[\\w-]+\\/)?[\\w-.]+$/` for the type of a data set: embeddings-benchmark/mteb, issue 1111).
"""

from __future__ import annotations

import math
import re
from typing import Any

REPOSITORY = re.compile(r"(?:[\w-]+/)?[\w.-]+", flags=re.ASCII)
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "openrail", "llama3", "gemma", "other"}


def broken_rules(data: dict[str, Any]) -> list[str]:
    """What is wrong with a card's metadata, in words; empty where nothing is."""
    wrong = []

    def text(value: Any, name: str, pattern: re.Pattern | None = None) -> None:
        if not isinstance(value, str) or not value or (pattern is not None and not pattern.fullmatch(value)):
            wrong.append(f"{name}: {value!r}")

    for name in ("library_name", "pipeline_tag"):
        if name in data:
            text(data[name], name, re.compile(r"[\w-]+"))
    if not isinstance(data.get("tags"), list) or not all(isinstance(tag, str) and tag for tag in data["tags"]):
        wrong.append(f"tags: {data.get('tags')!r}")
    if "license" in data and data["license"] not in LICENSES:
        wrong.append(f"license: {data['license']!r}")
    if data.get("license") == "other" and not data.get("license_name"):
        wrong.append("license_name is missing")
    if "base_model" in data:
        text(data["base_model"], "base_model", REPOSITORY)
        if data.get("base_model_relation") not in RELATIONS:
            wrong.append(f"base_model_relation: {data.get('base_model_relation')!r}")
    for entry in data.get("model-index", ()):
        text(entry.get("name"), "model-index name")
        if not entry.get("results"):
            wrong.append("model-index without results")
        for result in entry.get("results", ()):
            text(result.get("task", {}).get("type"), "task type", re.compile(r"[a-z-]+"))
            text(result.get("dataset", {}).get("type"), "dataset type", REPOSITORY)
            text(result.get("dataset", {}).get("name"), "dataset name")
            for metric in result.get("metrics") or [{}]:
                text(metric.get("type"), "metric type", re.compile(r"[\w-]+"))
                value = metric.get("value")
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                    wrong.append(f"metric value: {value!r}")
    return wrong
