"""What `config.json` says about quantisation, module by module, and what is refused in it."""

import pytest

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.quantisation import MODES, QuantSpec, parse_quantisation

SOURCE = "model/config.json"


def parsed(quantisation: object, key: str = "quantization") -> dict[str, QuantSpec | None]:
    return parse_quantisation({key: quantisation}, SOURCE)


def test_a_model_of_floats_says_nothing():
    assert parse_quantisation({"model_type": "llama"}, SOURCE) == {}
    assert parse_quantisation({"quantization": None}, SOURCE) == {}


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
@pytest.mark.parametrize(
    ("mode", "group_size", "bits"),
    [("affine", 64, 4), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)],
)
def test_each_mode_has_its_own_sizes(key, mode, group_size, bits):
    said = {"group_size": group_size, "bits": bits, "mode": mode}
    assert parsed(said, key) == {"": QuantSpec(group_size, bits, mode)}


def test_modules_may_have_another_mode_or_none():
    said = {
        "group_size": 32,
        "bits": 4,
        "mode": "mxfp4",
        "lm_head": {"group_size": 64, "bits": 8},  # as gpt-oss conversions have them: affine
        "router": {"mode": "affine", "bits": 8},
        "up": {"mode": "nvfp4"},
        "norm": False,
        "down": True,
        "anything": "else",
    }
    assert parsed(said) == {
        "": QuantSpec(32, 4, "mxfp4"),
        "lm_head": QuantSpec(64, 8),
        "router": QuantSpec(64, 8),
        "up": QuantSpec(16, 4, "nvfp4"),
        "norm": None,
        "down": QuantSpec(32, 4, "mxfp4"),
    }


def test_gpt_oss_as_published():
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    assert parsed(said, "quantization_config") == {"": QuantSpec(32, 4, "mxfp4")}


@pytest.mark.parametrize("mode", [m for m in MODES if m != "affine"])
@pytest.mark.parametrize(("group_size", "bits"), [(64, 4), (32, 6), (16, 8)])
def test_sizes_that_a_mode_does_not_have(mode, group_size, bits):
    said = {"group_size": group_size, "bits": bits, "mode": mode}
    for where, config in (
        ("quantization", said),
        ("a.b", {"group_size": 64, "bits": 4, "a.b": said}),
    ):
        with pytest.raises(UnsupportedModel) as caught:
            parsed(config)
        expected = f"{SOURCE}: {where} has {bits} bits in groups of {group_size}, mode {mode!r}"
        assert str(caught.value).startswith(expected)
        assert str(MODES[mode].group_sizes) in caught.value.hint


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"group_size": 32, "bits": 4, "mode": "mxfp6"}, "quantization has .* mode 'mxfp6'"),
        ({"group_size": 32, "bits": 4, "mode": None}, "quantization has .* mode None"),
        ({"group_size": 64, "bits": 4, "x": {"mode": "q4"}}, "x has quantisation mode 'q4'"),
        ({"group_size": 64, "bits": 4, "x": {"mode": ["mxfp4"]}}, r"x has .* mode \['mxfp4'\]"),
        ({"group_size": 64, "bits": 4, "mode": "m" * 10_000}, "quantization has .{0,300}$"),
        (
            {"group_size": 64, "bits": 4, "x": {"mode": "nvfp4", "global_scale": True}},
            "x has a global_scale",
        ),
        ({"quant_method": "gptq", "bits": 4}, "quantised by 'gptq'"),
        ({"quant_method": ["mxfp4"]}, r"quantised by \['mxfp4'\]"),
    ],
)
def test_what_is_not_supported_is_named(said, message):
    with pytest.raises(UnsupportedModel, match=rf"^{SOURCE}: {message}") as caught:
        parsed(said)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (4, "quantization is not an object"),
        ({"bits": 4}, "quantization lacks group_size"),
        ({"group_size": 32, "mode": "mxfp4"}, "quantization lacks .*bits"),
        ({"group_size": 64, "bits": 4, "x": {"bits": "8"}}, "x lacks .*bits"),
        ({"group_size": 64.0, "bits": 4}, "quantization lacks group_size"),
    ],
)
def test_what_is_malformed_is_named(said, message):
    with pytest.raises(CheckpointCorrupt, match=rf"^{SOURCE}: {message}"):
        parsed(said)
