"""The base of every model configuration: a transformers `PreTrainedConfig` that refuses unknown names instead of
storing them."""

import dataclasses
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from utils.options import check_effects, declared_fields, declared_sections, default_value, suggest, validate_fields


class StrictConfig(PreTrainedConfig):
    """A model configuration whose fields are declared by `option()`; wrong names, types and bounds raise ValueError.

    Subclasses add fields and `validate_<section>(self)` methods for the relations between fields. `config.json` round
    trips; keys that transformers itself writes are accepted.
    """

    # Names that other libraries read, such as PEFT, and the field that each is set by: `to_dict` has them, config.json
    # has the fields alone.
    ALIASES: ClassVar[dict[str, str]] = {}

    # Fields that shape no weights but say what their rows mean, or only how they begin: loaded weights bring theirs.
    OF_WEIGHTS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self, **kwargs: Any):
        known = {field.name for field in declared_fields(self)}
        extra = kwargs.pop(EXTRA_KEY, [])
        # What is left in kwargs is no declared field.
        for name in kwargs:
            # config.json also holds keys of transformers itself, and private ones such as _name_or_path.
            is_foreign = name in TRANSFORMERS_KEYS or name in extra or name.startswith("_")
            if name not in self.ALIASES and not is_foreign:
                raise ValueError(f"{type(self).__name__} has no field {name!r}{suggest(name, known)}")
        self.take_aliases(kwargs)
        super().__post_init__(**kwargs)
        validate_fields(self)

    def take_aliases(self, kwargs: dict[str, Any]) -> None:
        """Move aliases from keywords into their fields. Raises: ValueError: one contradicts its field."""
        defaults = {field.name: default_value(field) for field in declared_fields(self)}
        for name, owner in self.ALIASES.items():
            if name not in kwargs or (value := kwargs.pop(name)) == getattr(self, name):
                continue
            if (given := getattr(self, owner)) != defaults[owner]:
                raise ValueError(f"{name}={value!r} contradicts {owner}={given!r}; give one of them")
            setattr(self, name, value)

    def extra_attributes(self) -> dict[str, Any]:
        """Attributes that were set by hand and are neither fields nor known to transformers."""
        return {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name not in TRANSFORMERS_KEYS and not hasattr(type(self), name)
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields with their aliases, and what was set by hand."""
        extra = sorted(self.extra_attributes())
        aliases = {name: getattr(self, name) for name in self.ALIASES}
        return {**super().to_dict(), **aliases, **({EXTRA_KEY: extra} if extra else {})}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in self.ALIASES}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """That of transformers. Raises: ValueError: a field was set to a value that no file may hold."""
        validate_fields(self)
        super().save_pretrained(*args, **kwargs)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed; unknown names raise ValueError with a suggestion."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        extra = self.extra_attributes()
        # What transformers keeps elsewhere than in fields.
        elsewhere = {
            "name_or_path": self.name_or_path,
            "attn_implementation": self._attn_implementation,
            "output_attentions": self.output_attentions,
        }
        # An alias replaces its field.
        owners = {self.ALIASES[name] for name in changes if name in self.ALIASES}
        defaults = {field.name: default_value(field) for field in declared_fields(self) if field.name in owners}
        return type(self)(**{**fields, **elsewhere, **extra, EXTRA_KEY: list(extra), **defaults, **changes})

    def expect(self, holds: bool, name: str, rule: str) -> None:
        """Raise ValueError `<name>=<value> <rule>` unless it holds."""
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} {rule}")

    def validate_effects(self):
        """Refuse fields that differ from their defaults although other fields switch them off."""
        fields = declared_fields(self)
        check_effects(self, [field.name for field in fields if getattr(self, field.name) != default_value(field)])

    def describe(self) -> str:
        """All declared fields, one per line: `name = value   # meaning`, below the titles of their sections."""
        lines = []
        for section, fields in declared_sections(self).items():
            # Meanings are aligned within a section.
            rows = [(f"{field.name} = {getattr(self, field.name)!r}", field.metadata["meaning"]) for field in fields]
            width = max(len(setting) for setting, _ in rows)
            lines += ["", f"[{section.title}]"] if section.title else []
            lines += [f"{setting:<{width}}  # {meaning}" for setting, meaning in rows]
        return "\n".join(lines).lstrip("\n")


# The key of a config.json that lists the names which were set by hand.
EXTRA_KEY = "_extra_attributes"


# Keys that a config.json may have beyond the declared fields: those of every transformers configuration.
TRANSFORMERS_KEYS = {
    *(field.name for field in dataclasses.fields(PreTrainedConfig)),
    *("attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels"),
    *("output_attentions", "quantization_config", "torch_dtype", "use_cache"),
}
