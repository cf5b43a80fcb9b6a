"""What the fuzz tests share: drawn cases that are counted, and what a refusal has to look like."""

import functools
import inspect
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zoo
from zoo import ZooError
from zoo.registry import KINDS, has_weights

tried = Counter()
"""Cases that each test has tried."""


def fuzz(**strategies):
    """As hypothesis.given, and counts the cases."""

    def decorate(test):
        @functools.wraps(test)
        def counted(*args, **drawn):
            test(*args, **drawn)
            tried[test.__name__] += 1

        counted.__signature__ = inspect.signature(test)
        return given(**strategies)(counted)

    return decorate


def is_a_sentence(message):
    """One line that says what is wrong: no traceback, no bare value."""
    assert "\n" not in message.strip(), message
    assert len(message.split()) > 4, message
    assert "Traceback" not in message, message


def refused(call, *args, says=(), **kwargs):
    """The sentence with which a call is refused; it has every word of `says`."""
    with pytest.raises(ZooError) as caught:
        call(*args, **kwargs)
    is_a_sentence(str(caught.value))
    for word in says:
        assert word in str(caught.value)
    return str(caught.value)


def attempt(call, *args, **kwargs):
    """What a call returns, or None when it is refused in a sentence. Anything else that it raises is a defect."""
    try:
        return call(*args, **kwargs)
    except ZooError as error:
        is_a_sentence(str(error))
        return None


def shipped(*kinds):
    """(kind, name) of all that the repository has weights of."""
    return [
        (registry.kind, name)
        for registry in KINDS
        for name in registry.list()
        if registry.kind in kinds
        and has_weights(registry.preset(name))
        and not registry.preset(name).weights.location.startswith("hf:")
    ]


@functools.cache
def loaded(kind, name):
    """One of each for all tests, which change nothing in it."""
    return getattr(zoo, f"load_{kind}")(name)


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63)]),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.lists(st.integers() | st.floats() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
"""Values of the types that Python users pass by mistake."""
