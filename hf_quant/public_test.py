"""The names users import from the package itself."""

import pytest

import hf_quant


@pytest.mark.parametrize("name", hf_quant.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(hf_quant, name).__name__ == name
    assert getattr(hf_quant, name).__doc__
    assert name in dir(hf_quant)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        hf_quant.quantise  # noqa: B018
