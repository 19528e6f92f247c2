"""Measures of other papers on made-up results: transfer and forgetting, modality importance, MCUB's two rules."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from moextend_jax.evaluate.benchmarks import mcub
from moextend_jax.evaluate.chains import score_matrix
from moextend_jax.evaluate.importance import question_importance, subsets
from moextend_jax.evaluate.wordings import measures
from parity.methods import methods_arrays, methods_file

pytestmark = pytest.mark.smoke


def test_transfer_and_forgetting():
    theirs = methods_arrays("pathweave")
    names = [f"m{i}" for i in range(len(theirs["transfer_m"]))]
    scores = {
        after: {
            f"{on}/{s}": float(score)
            for i, on in enumerate(names[: m + 1])
            for s, score in enumerate(theirs["scores_mis"][m, i])
            if not math.isnan(score)
        }
        for m, after in enumerate(names)
    }
    ours = score_matrix(scores)
    close = {"atol": 1e-9, "rtol": 0}
    np.testing.assert_allclose(list(ours["transfer"].values()), theirs["transfer_m"], **close)
    first, *later = ours["forgetting"].values()
    assert first == 0.0 and math.isnan(theirs["forgetting_m"][0])
    np.testing.assert_allclose(later, theirs["forgetting_m"][1:], **close)
    np.testing.assert_allclose(ours["backward_transfer"], -theirs["forgetting_m"][-1], **close)


def test_modality_importance():
    theirs, facts = methods_arrays("measures"), json.loads(methods_file("measures.json").read_text())
    media, asked = facts["modalities"], [frozenset(some) for some in facts["subsets"]]
    assert set(subsets(media)) == {frozenset(), *asked}
    for right_s, importance_m in zip(theirs["right_is"], theirs["importance_im"], strict=True):
        for alone in (0, 1):  # is not asked there, and counts nowhere
            ours = question_importance({frozenset(): alone, **dict(zip(asked, right_s.tolist(), strict=True))})
            assert [ours[name] for name in media] == importance_m.tolist()


def test_mm_bigbenchs_measures():
    theirs = methods_arrays("measures")
    ours = measures(theirs["results_mdj"], top=int(theirs["top"]))
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], atol=1e-9, rtol=0, err_msg=name)
    assert len(ours) == 6


def test_mcubs_rules():
    for letter, text, released, careful in json.loads(methods_file("measures.json").read_text())["mcub"]:
        assert (mcub.released(text, letter), mcub.careful(text, letter)) == (released, careful), (letter, text)
