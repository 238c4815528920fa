"""The papers that a growth's operators come from, for the card of a grown model; `docs/papers.md` says what differs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv. key (`str`): for BibTeX. authors (`str`): as BibTeX has them. arxiv (`str`): its number."""

    key: str
    authors: str
    title: str
    arxiv: str

    @property
    def year(self) -> int:
        """Of the number: the year in which it was first submitted."""
        return 2000 + int(self.arxiv[:2])

    def to_bibtex(self) -> str:
        """The entry, one field a line."""
        fields = {
            **({"author": self.authors} if self.authors else {}),
            "title": self.title,
            "year": self.year,
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
        return "\n".join([f"@misc{{{self.key},", *lines, "}"])


_HYPERCLONING = Paper(
    "samragh2024scaling",
    "Samragh, Mohammad and others",
    "Scaling Smart: Accelerating Large Language Model Pre-training with Small Model Initialization",
    "2409.12903",
)
_LEMON = Paper("wang2023lemon", "Wang, Yite and others", "LEMON: Lossless model expansion", "2310.07999")
_G_STACK = Paper(
    "du2024stacking",
    "Du, Wenyu and others",
    "Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training",
    "2405.15319",
)
_NET2NET = Paper(
    "chen2015net2net",
    "Chen, Tianqi and Goodfellow, Ian and Shlens, Jonathon",
    "Net2Net: Accelerating Learning via Knowledge Transfer",
    "1511.05641",
)

# By operator, as the operators' own files name them.
PAPERS: dict[str, tuple[Paper, ...]] = {
    "exact_copy": (_NET2NET, _HYPERCLONING),
    "perturbed_copy": (_HYPERCLONING,),
    "uneven_copy": (_LEMON,),
    "reference_slice": (
        Paper(
            "gesmundo2023composable",
            "Gesmundo, Andrea and Maile, Kaitlin",
            "Composable Function-preserving Expansions for Transformer Architectures",
            "2308.06103",
        ),
    ),
    "szp": (
        Paper("warmstarting2026", "", "When is Warmstarting Effective for Scaling Language Models?", "2605.13405"),
    ),
    "identity_blocks": (
        Paper(
            "wu2024llamapro",
            "Wu, Chengyue and others",
            "LLaMA Pro: Progressive LLaMA with Block Expansion",
            "2401.02415",
        ),
    ),
    "stack": (_G_STACK,),
    "interleave": (
        _G_STACK,
        Paper(
            "wang2025recycling",
            "Wang, Ruizhe and others",
            "Recycling Pretrained Checkpoints: Orthogonal Growth of Mixture-of-Experts for Efficient Large Language Model "
            "Pre-Training",
            "2510.08008",
        ),
    ),
    "overlap": (
        Paper(
            "kim2023solar",
            "Kim, Dahyun and others",
            "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling",
            "2312.15166",
        ),
    ),
}


def papers_of(operators: Iterable[str]) -> list[Paper]:
    """The papers of some operators, each once, in their order."""
    return list(dict.fromkeys(paper for name in operators for paper in PAPERS.get(name, ())))
