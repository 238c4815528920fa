"""Candidates: full states under stable names."""

from __future__ import annotations

import pytest

from hf_warmstart import Candidate, WarmstartError
from hf_warmstart.selection.candidates import candidate_pool, check_names


def test_the_pool_holds_the_four_families_the_other_operators_and_two_controls():
    pool = {candidate.name: candidate for candidate in candidate_pool(2.0, noises=(0.1, 0.4), shrinks=(0.3,))}
    assert list(pool) == [
        "exact_copy",
        "perturbed_copy_0.1",
        "perturbed_copy_0.4",
        "asymmetric_reset",
        "asymmetric_reset_rewarmed",
        "reference_slice",
        "reference_slice_reset",
        "uneven_copy",
        "szp_0.3",
        "stack",
        "weights_only",
        "from_scratch",
    ]
    assert pool["perturbed_copy_0.4"].growth.noise == 0.4 and pool["szp_0.3"].growth.shrink == 0.3
    assert pool["asymmetric_reset_rewarmed"].arguments == {"new_lr_peak": 1.3, "new_lr_steps": 250}
    assert pool["reference_slice"].state_policy == "carry"
    assert pool["reference_slice_reset"].state_policy == "asymmetric_reset"
    assert pool["stack"].growth.depth == 4 and pool["stack"].growth.width is None
    for name, needs_optimizer, needs_scheduler in (
        ("exact_copy", True, True),
        ("weights_only", False, False),
        ("from_scratch", False, False),
    ):
        assert (pool[name].needs_optimizer, pool[name].needs_scheduler) == (needs_optimizer, needs_scheduler)
    assert pool["from_scratch"].fresh and not pool["weights_only"].fresh


def test_pools_of_depth_and_of_both():
    assert [c.name for c in candidate_pool(None, 2)] == ["identity_blocks", "stack", "weights_only", "from_scratch"]
    both = {c.name: c for c in candidate_pool(2, 2)}
    assert both["stack"].growth.width == 2 and both["reference_slice"].growth.depth == 2


@pytest.mark.parametrize("candidate", candidate_pool(2.0), ids=lambda candidate: candidate.name)
def test_a_candidate_is_plain_data_and_back(candidate):
    assert Candidate.from_dict(candidate.to_dict()) == candidate
    assert candidate.seeded(3).seed == candidate.growth.seed + 3


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 65, 3])
def test_a_name_that_names_no_folder_is_refused(name):
    with pytest.raises(WarmstartError, match="cannot be named"):
        Candidate(name, width=2)


def test_unknown_policies_and_empty_growths_are_refused():
    with pytest.raises(WarmstartError, match="state_policy='keep' is none of"):
        Candidate("a", state_policy="keep", width=2)
    with pytest.raises(WarmstartError, match="schedule_policy='keep' is none of"):
        Candidate("a", schedule_policy="keep", width=2)
    with pytest.raises(WarmstartError, match="Nothing to grow"):
        Candidate("a", new_lr_peak=2.0)


def test_candidates_need_two_different_names():
    with pytest.raises(WarmstartError, match=r"\['a'\] are used more than once"):
        check_names([Candidate("a", width=2), Candidate("a", width=3)])
    with pytest.raises(WarmstartError, match="1 candidates leave nothing to choose"):
        check_names([Candidate("a", width=2)])
