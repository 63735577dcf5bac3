"""Read settings in YAML, of recipes and command lines, with errors that name the position."""

import re
from typing import Any

import yaml

from .reading import check_texts


MAX_YAML_CHARACTERS = 1_000_000  # a recipe has some thousand, and PyYAML takes a second for every 100,000


class RecipeLoader(yaml.SafeLoader):
    """
    YAML in which 1e-3 is a number, as YAML 1.2 has it, and PyYAML has not; a name counts once in a mapping; and
    aliases are refused, with which a few lines can stand for any number of values.
    """

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        """Compose as PyYAML does, but no alias."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor} is not taken: write the values out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        """Construct as PyYAML does, but no mapping that has a name twice."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = [self.construct_object(key) for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} occurs twice", node.start_mark)
        return mapping


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str, where: str) -> Any:
    """
    Parse a text in YAML.

    Raises:
        ValueError: beginning with `where`, if it is not YAML, is over `MAX_YAML_CHARACTERS`, is nested too deeply, has
            an alias or a name twice, or a text that `check_text` refuses.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"{where} has {len(text):,} characters, more than {MAX_YAML_CHARACTERS:,}.")
    try:
        value = yaml.load(text, RecipeLoader)
    except RecursionError as error:
        raise ValueError(f"{where} is not YAML: its values are nested too deeply.") from error
    except Exception as error:  # a value that its tag is not of raises anything: !!bool 1, !!timestamp x
        reason = str(error) if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{where} is not YAML: {' '.join(reason.split())}.") from error
    check_texts(value, where)
    return value
