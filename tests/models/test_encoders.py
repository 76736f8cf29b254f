"""Every family of docs/encoders.md passes the checks of its columns; the page says what they say.

The checks that take long (compile, FSDP2) are run by `make encoders`, and the sweep over all classification classes of
transformers by the tests marked slow.
"""

import pytest
from support.encoder_checks import FAST_CHECKS, check_refused
from support.encoders import ENCODERS, REFUSED


# All checks of an encoder one after the other, so that its model is built once
@pytest.mark.parametrize(("name", "check"), [(name, check) for name in ENCODERS for check in FAST_CHECKS])
def test_encoder(name, check):
    encoder = ENCODERS[name]
    if check in encoder.exceptions:
        with pytest.raises(Exception, match=encoder.exceptions[check]):
            FAST_CHECKS[check](encoder)
    else:
        FAST_CHECKS[check](encoder)


@pytest.mark.parametrize("encoder", REFUSED, ids=lambda encoder: encoder.name)
def test_families_without_free_order_are_refused(encoder):
    with pytest.raises(ValueError, match=encoder.exceptions["refused"]):
        check_refused(encoder)
