"""The metric as `evaluate` loads it from a file: `evaluate.load("path/to/language_modeling.py")`, no network.

`evaluate` copies this file to a folder of its own before it imports it; hence the absolute imports.
"""

import datasets
import evaluate

from hf_warmstart.metrics.held_out import summary

_DESCRIPTION = """
Mean loss over all predicted tokens, in nats; its exponential, the perplexity; and, with the number of bytes of the text, bits
per byte. Every token counts once, however it lay in rows and batches. (`evaluate`'s own `perplexity` is a mean of the
perplexities of sequences, and needs a network for its script.)
"""

_INPUTS = """
Args:
    predictions (`list[float]`): of each row, the summed loss of its predicted tokens, in nats.
    references (`list[int]`): of each row, how many tokens are predicted.
    bytes (`int`, *optional*): of the text of all rows, in UTF-8.

Returns:
    loss (`float`, nats per token), perplexity (`float`), tokens (`int`); with `bytes` also bits_per_byte (`float`).

`hf_warmstart.metrics.token_losses(logits, labels)` gives both columns.
"""


class LanguageModeling(evaluate.Metric):
    """Token-mean loss, perplexity and bits per byte."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list, references: list, bytes: int | None = None) -> dict:  # noqa: A002
        return summary(float(sum(predictions)), int(sum(references)), bytes)
