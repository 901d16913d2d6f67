"""HTML whose texts are escaped by construction: `tag` escapes everything that is not `Markup`."""

import html
from collections.abc import Iterable
from typing import Any

WITHOUT_END = {"img", "meta", "line", "path", "circle"}


class Markup(str):
    """HTML that is written as it is."""

    __slots__ = ()


def escape(content: Any) -> Markup:
    """Any value as HTML that shows it; `Markup` and lists of it stay as they are, None is nothing."""
    if isinstance(content, Markup):
        return content
    if content is None:
        return Markup("")
    if not isinstance(content, str) and isinstance(content, Iterable):
        return Markup("".join(map(escape, content)))
    return Markup(html.escape(str(content), quote=True))


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """An element. Attributes that are None or False are left out, True is one without value; `class_` is `class`, and
    `_` in other names is `-`."""
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{escape(value)}"')
    opening = " ".join(words)
    return Markup(f"<{opening}/>" if name in WITHOUT_END else f"<{opening}>{escape(content)}</{name}>")
