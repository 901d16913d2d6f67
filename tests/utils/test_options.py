from typing import Literal

import pytest

from utils.options import StrictConfig, from_preset, option


class Example(StrictConfig):
    model_type = "example"

    hidden_size: int = option(8, "width", gt=0)
    kind: Literal["sum", "gate"] = option("sum", "adapter")
    widths: list[int] = option([1, 2], "stages", gt=0)
    parts: list[Literal["head", "tail"]] = option(["head"], "what is kept")
    rate: float = option(0.0, "share", ge=0, lt=1)
    n_groups: int | None = option(None, "groups", gt=0)

    def validate_width(self):
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} must be even")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"hiden_size": 4}, "no field 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": 0}, "hidden_size=0 must be > 0"),
        ({"hidden_size": 3}, "hidden_size=3 must be even"),
        ({"hidden_size": "8"}, "hidden_size='8' must be int"),
        ({"hidden_size": True}, "hidden_size=True must be int"),
        ({"kind": "gaet"}, "kind='gaet' must be one of 'sum', 'gate'; did you mean 'gate'"),
        ({"widths": [1, 0]}, r"widths=\[1, 0\] must be > 0"),
        ({"widths": 3}, "widths=3 must be list"),
        ({"widths": [1, "2"]}, r"widths=\[1, '2'\]: '2' must be int"),
        (
            {"parts": ["tail", "haed"]},
            r"parts=\['tail', 'haed'\]: 'haed' must be one of 'head', 'tail'; did you mean 'head'",
        ),
        ({"rate": 1.0}, "rate=1.0 must be < 1"),
        ({"n_groups": 0}, "n_groups=0 must be > 0"),
    ],
)
def test_wrong_values_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Example(**wrong)


def test_round_trip_through_json(tmp_path):
    config = Example(hidden_size=4, kind="gate", widths=[3], rate=0, n_groups=2)
    config.save_pretrained(tmp_path)
    loaded = Example.from_pretrained(tmp_path)
    for name in ("hidden_size", "kind", "widths", "rate", "n_groups"):
        assert getattr(loaded, name) == getattr(config, name)


def test_objects_do_not_share_lists():
    first = Example()
    first.widths.append(9)
    assert Example().widths == [1, 2]


def test_replace_validates():
    assert Example().replace(hidden_size=4).hidden_size == 4
    with pytest.raises(ValueError, match="no field 'hiden'"):
        Example().replace(hiden=4)


def test_describe_shows_values_and_meanings():
    assert "hidden_size = 8" in Example().describe()
    assert "# width" in Example().describe()


def test_unknown_preset_is_suggested():
    with pytest.raises(ValueError, match="unknown preset 'tiyn'; did you mean 'tiny'"):
        from_preset(Example, {"tiny": {}}, "tiyn")
    assert from_preset(Example, {"tiny": {"hidden_size": 2}}, "tiny", rate=0.5).hidden_size == 2
