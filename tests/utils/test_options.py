import dataclasses
import math
from typing import ClassVar, Literal

import pytest

from utils.options import Section, above_one, check_effects, declared_sections, effect_conditions, from_preset, option
from utils.strict_config import StrictConfig


class Example(StrictConfig):
    model_type = "example"

    hidden_size: int = option(8, "width", gt=0)
    kind: Literal["sum", "gate"] = option("sum", "adapter")
    widths: list[int] = option([1, 2], "stages", gt=0)
    parts: list[Literal["head", "tail"]] = option(["head"], "what is kept")
    rate: float = option(0.0, "share", ge=0, lt=1)
    n_groups: int | None = option(None, "groups", gt=0)
    scale: float = option(1.0, "factor")
    scales: list[float] = option([1.0], "factors")

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
        ({"scale": math.inf}, "scale=inf must be finite"),
        ({"scale": math.nan}, "scale=nan must be finite"),
        ({"scales": [1.0, -math.inf]}, r"scales=\[1.0, -inf\] must be finite"),
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


class Switched(StrictConfig):
    """Every form of a condition, and a section whose fields share one."""

    model_type = "switched"

    use_head: bool = option(False, "switch")
    kinds: list[Literal["a", "b", "c"]] = option(["a"], "switch")
    depth: int = option(0, "switch", ge=0)
    by_value: int = option(1, "value", only_with=("use_head", True))
    by_choice: int = option(1, "one entry of a list is enough", only_with=("kinds", ("b", "c")))
    by_bool: int = option(1, "truth", only_with=("depth", bool))
    by_predicate: int = option(1, "function", only_with=("depth", above_one))
    by_two: int = option(1, "both", only_with=[("use_head", True), ("depth", bool)])

    SECTION_B: ClassVar = Section("B", only_with=("kinds", "b"))
    in_section: int = option(1, "shared condition")


@pytest.mark.parametrize(
    ("wrong", "switch", "remedy"),
    [
        ({"by_value": 2}, "use_head=False", "use_head=True"),
        ({"by_choice": 2}, r"kinds=\['a'\]", "kinds='b' or 'c'"),
        ({"by_bool": 2}, "depth=0", "depth other than 0 or empty"),
        ({"by_predicate": 2, "depth": 1}, "depth=1", "depth above one"),
        ({"by_two": 2, "use_head": True}, "depth=0", "depth other than 0 or empty"),
        ({"in_section": 2}, r"kinds=\['a'\]", "kinds='b'"),
    ],
)
def test_options_that_others_switch_off_are_refused(wrong, switch, remedy):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"^{name}=2 has no effect with {switch}; it needs {remedy}$"):
        Switched(**wrong)


def test_options_that_are_switched_on_or_at_their_defaults_are_accepted():
    settings = dict.fromkeys(("by_value", "by_choice", "by_bool", "by_predicate", "by_two", "in_section"), 2)
    assert Switched(use_head=True, kinds=["a", "b"], depth=2, **settings).by_two == 2
    assert Switched(by_value=1).by_value == 1


def test_a_restated_option_keeps_its_condition():
    @dataclasses.dataclass
    class First:
        use_ema: bool = option(False, "switch")
        decay: float = option(0.9, "decay", only_with=("use_ema", True))

    @dataclasses.dataclass
    class Mixin:
        rate: float = option(1.0, "rate")

    @dataclasses.dataclass
    class Second(Mixin, First):
        decay: float = option(0.5, "decay with another default")

    @dataclasses.dataclass
    class Third(Second):
        decay: float = option(0.5, "decay without the switch", only_with=[])

    assert effect_conditions(Second) == {"decay": [("use_ema", True)]}
    with pytest.raises(ValueError, match="--decay has no effect with use_ema=False"):
        check_effects(Second(), ["decay"], "--{name}")
    check_effects(Second(), ["rate"], "--{name}")
    assert effect_conditions(Third) == {}


def test_sections_are_in_order_of_declaration():
    sections = {
        section.title: [field.name for field in fields] for section, fields in declared_sections(Switched).items()
    }
    assert sections["B"] == ["in_section"] and sections[""][0] == "use_head"
    assert Switched().describe().index("[B]") < Switched().describe().index("in_section = 1")
