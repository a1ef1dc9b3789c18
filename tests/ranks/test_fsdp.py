"""Sharded parameters (FSDP2): the numbers are those of the whole parameters, the memory is that of the shard."""

from __future__ import annotations

import pytest

import fsdp_work as work
from launch import launch
from recipes_list import weights

RECIPES = [
    "sam()",
    "sam(p=3)",
    "sam(steps=2)",
    "asam()",
    "gsam()",
    "esam()",
    "esam_sds()",
    "rwp()",
    "rwp(alpha=0)",
    "looksam(k=2)",
    "rst(sam())",
    "mixed_sam()",
    "ssam(refresh=2)",
    "ssam_dynamic(refresh=2)",
]
EQUAL = {
    **{f"{text}, {net}, {base}": (net, text, base, {}) for text in RECIPES for net, base in work.NETS_AND_BASES},
    **{
        f"{text}, accumulated": ("attention", text, "sgd", {"accumulate": True})
        for text in ["sam()", "gsam()", "esam()", "esam_sds()", "rwp()"]
    },
    **{
        f"{text}, replicated and sharded {mesh}": ("odd", text, "sgd", {"mesh": mesh})
        for text in ["sam()", "rwp()", "ssam_dynamic(refresh=2)"]
        for mesh in [(1, 2), (2, 1)]
    },
    "gsam(), clipped": ("odd", "gsam()", "sgd", {"clip": 0.1}),
    "gsam(), scaled": ("odd", "gsam()", "sgd", {"scale": 1024.0}),
}
JOBS = {
    **{
        f"low precision {text}": ("low_precision", (text,)) for text in ["sam()", "esam_sds()", "rwp()", "looksam(k=2)"]
    },
    "local": ("refused", ("sam()", {"ascent": "local"})),
    "m": ("refused", ("m_sharpness(sam(), 3)", {})),
    "split": ("refused", ("rwp()", {"split": True})),
    "product": ("refused", ("sam(second_order=True)", {})),
    "peaks": ("peaks", (["sam()", "sam(p=3)", "asam()", "rwp()"],)),
    "held": ("held", (["sgd()", "sam()", "rwp(alpha=0)", "gsam()"],)),
    "fails 1": ("fails", ("sam()", 1)),
    "fails 2": ("fails", ("sam()", 2)),
    "fails 2 in micro-batches": ("fails", ("sam()", 2, 2)),
    "fails 4 in micro-batches": ("fails", ("sam()", 4, 2)),
    "evaluated": ("evaluated", ("rwp(alpha=0)",)),
    "nan": ("not_a_number", ("sam()",)),
    "bf16": ("in_bf16", ()),
    "messages": ("messages", ()),
    "saved": ("saved", ("esam_swp(beta=0.1)",)),
    **{f"resumed {text}": ("resumed", (text,)) for text in ["looksam(k=2)", "ssam_dynamic(refresh=2)", "rwp()"]},
}


@pytest.fixture(scope="module")
def differences():
    return launch(2, work.several, {name: ("difference", case) for name, case in EQUAL.items()}, seconds=180)[0]


@pytest.fixture(scope="module")
def both():
    """What the two ranks found, job by job."""
    first, second = launch(2, work.several, JOBS, seconds=180)
    return {job: (first[job], second[job]) for job in JOBS}


@pytest.mark.parametrize("case", EQUAL)
def test_sharded_steps_equal_those_of_the_whole_batch(differences, case):
    assert isinstance(differences[case], float), differences[case]
    assert differences[case] < 1e-9


@pytest.mark.parametrize("text", RECIPES)
def test_the_comparison_sees_the_method(text):
    ends = []
    for each in ("sgd()", text):
        model = work.odd()
        work.train(model, each, work.batch_of("odd"))
        ends.append(weights(model))
    assert work.apart(*ends) > 1e-6


@pytest.mark.parametrize("job", [job for job in JOBS if job.startswith("low precision")])
def test_mixed_precision_policy(both, job):
    assert max(both[job]) < 1e-5


@pytest.mark.parametrize("job", ["local", "m", "split"])
def test_an_ascent_of_its_own_is_refused_on_a_shard(both, job):
    for message in both[job]:
        assert "each holds a shard" in message


def test_a_hessian_vector_product_is_refused_on_a_shard(both):
    for message in both["product"]:
        assert "sharded" in message
        assert "second-order" in message


def test_a_float32_copy_is_refused_and_stochastic_rounding_works_on_a_shard(both):
    for projected, message in both["bf16"]:
        assert projected == pytest.approx(0.05, rel=0.02)
        assert projected == both["bf16"][0][0]
        assert "FSDP" in message


def test_trap_15_perturbation_grows_memory_by_the_shard(both):
    copies = {"sam()": 1, "sam(p=3)": 1, "asam()": 2, "rwp()": 2}
    for layer, shard, found in both["peaks"]:
        assert shard == 12 * layer // 2
        for text, count in copies.items():
            transient = 0 if text in ("sam()", "asam()") else 1.5 * layer
            assert found[text] <= count * shard + transient + 1000, text


def test_memory_held_in_the_second_pass(both):
    for shard, found in both["held"]:
        for text, copies in {"sam()": 1, "rwp(alpha=0)": 1, "gsam()": 2}.items():
            assert found[text] - found["sgd()"] == pytest.approx(copies * shard, rel=0.05), text


def test_weight_gradients_that_nobody_reads_are_not_computed(both):
    for operations, propagations in both["saved"]:
        assert operations < 0.8
        assert propagations < 1.75


@pytest.mark.parametrize("job", [job for job in JOBS if job.startswith("fails")])
def test_a_pass_that_raises_leaves_weights_and_gathered_copies_as_they_were(both, job):
    for changed, ended in both[job]:
        assert changed == 0
        assert ended < 1e-9


def test_weights_gathered_by_an_evaluation_are_not_those_of_the_perturbed_pass(both):
    assert max(both["evaluated"]) < 1e-9


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(both):
    for message, moved in both["nan"]:
        assert "as before this step" in message
        assert moved == 0


@pytest.mark.parametrize("job", [job for job in JOBS if job.startswith("resumed")])
def test_resumes_to_the_bit(both, job):
    assert both[job] == (0.0, 0.0)


def test_one_message_for_all_tensors_that_are_cut_alike(both):
    for counts in both["messages"]:
        assert counts == {"norm": 1, "dot": 1, "filter_norms": 1, "add_": 0, "copy_": 0, "clone": 0, "randn": 0}


def test_arithmetic_on_shards_is_that_on_whole_tensors():
    for found in launch(4, work.several, {"once": ("vectors", ()), "twice": ("cut_twice", ())}, seconds=120):
        for differences in found.values():
            assert isinstance(differences, dict), differences
            assert {name: apart for name, apart in differences.items() if not apart < 1e-13} == {}
