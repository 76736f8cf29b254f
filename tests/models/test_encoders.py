"""Every family of docs/encoders.md passes the checks of its columns; the page says what they say.

The checks that take long (compile, FSDP2) are run by `make encoders`, and the sweep over all classification classes of
transformers by the tests marked slow.
"""

import json

import pytest
import torch
from conftest import REPOSITORY
from support.encoder_checks import FAST_CHECKS, assert_same, check_refused
from support.encoder_sweep import RESULTS, classification_classes, sweep
from support.encoders import ENCODERS, REFUSED


RECORDS = REPOSITORY / "experiments" / "records"


# All checks of an encoder one after the other, so that its model is built once
@pytest.mark.parametrize(("name", "check"), [(name, check) for name in ENCODERS for check in FAST_CHECKS])
def test_encoder(name, check):
    encoder = ENCODERS[name]
    if check in encoder.limits:
        with pytest.raises(Exception, match=encoder.limits[check].message):
            FAST_CHECKS[check](encoder)
    else:
        FAST_CHECKS[check](encoder)


@pytest.mark.parametrize("encoder", REFUSED, ids=lambda encoder: encoder.name)
def test_families_without_free_order_are_refused(encoder):
    with pytest.raises(ValueError, match=encoder.limits["refused"].message):
        check_refused(encoder)


SWEPT = {
    name: each
    for name, each in json.loads((RECORDS / "encoders.json").read_text())["sweep"]["found"].items()
    if name in classification_classes()  # of this version of transformers
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEPT)
def test_no_class_of_the_sweep_gets_worse(name):
    found = sweep(name)
    assert RESULTS.index(found["result"]) >= RESULTS.index(SWEPT[name]["result"]), found["reason"]


def test_a_class_that_gets_worse_would_be_seen(monkeypatch):
    assert sweep("BertForSequenceClassification") == {"result": "passed", "reason": ""}
    assert sweep("ResNetForImageClassification")["result"] == "refused"
    monkeypatch.setitem(FAST_CHECKS, "repeat", lambda encoder: assert_same(torch.zeros(1), torch.ones(1)))
    found = sweep("BertForSequenceClassification")
    assert found == {"result": "failed", "reason": "repeat: tensor 0 differs by 1.0e+00"}
