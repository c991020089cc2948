"""Reading YAML that people write, with every mistake in it said in one line."""

from __future__ import annotations

from pathlib import Path

import yaml

from selfrepair.errors import UserError

#: Largest whole number that a profile may hold: Python refuses to write far larger ones.
MOST_BITS = 4096


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice, where YAML's own takes the last, and a number too large to
    write are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):  # its nodes written out may be many times the file
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if value.bit_length() > MOST_BITS:
            raise yaml.constructor.ConstructorError(
                None, None, "a number with too many digits", node.start_mark
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: Path) -> object:
    """What a YAML file holds.

    Raises:
        OSError: it cannot be read.
        UserError: it is no YAML, or gives a key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError:
        raise
    except yaml.MarkedYAMLError as error:
        raise UserError(f"not YAML (line {error.problem_mark.line + 1}: {error.problem})") from error
    except (
        Exception
    ) as error:  # PyYAML raises many types for bytes, dates and numbers that are none, or nesting too deep
        raise UserError(f"not YAML ({' '.join(str(error).split())})") from error
