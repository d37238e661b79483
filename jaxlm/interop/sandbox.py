"""Jinja for templates that strangers wrote: transformers' dialect, in a sandbox whose work and output are counted.

The sandbox of Jinja keeps a template from Python's insides, not from burning time and memory. So every loop step and
every call is work that is counted, every value that is printed, joined, repeated or written as JSON is weighed first,
and past a limit rendering stops.
"""

import json
import re
import threading
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_WORK = 2_000_000
"""Loop steps and calls of one rendering; static text inside loops counts too."""
MAX_TEXT = 20_000_000
"""Characters that one rendering may print, including those into variables."""
MAX_WIDTH = 10_000
"""Largest number that may pad, indent or repeat by a filter, a method or a format."""
MAX_SOURCE = 1_000_000
"""Characters of a template."""
TEXT_PER_STEP = 64
"""Characters of static text that weigh as much as a loop step."""


CALL, CONTAINER = 10, 20
"""What a call weighs in loop steps, and a list or dictionary in characters."""


class LimitError(Exception):
    """A template does more than any chat template needs."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: notes which characters of the output lie between the two."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        environment: Any = self.environment
        start = sum(map(len, environment.printed))
        environment.spans.append((start, start + len(text)))
        return text


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. Renders one conversation at a time; threads wait for each other."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            finalize=self._print,
        )
        self.printed: list[str] = []
        self.spans: list[tuple[int, int]] = []
        self._work = self._text = 0
        self._lock = threading.Lock()
        for name in ("center", "indent", "wordwrap", "truncate", "format", "batch", "slice"):
            self.filters[name] = self._narrow(self.filters[name])
        for name in ("join", "replace", "string", "pprint", "xmlattr", "urlize"):
            self.filters[name] = self._weighed(self.filters[name])
        self.filters |= {"tojson": self._tojson, "_steps": self._steps, "_concat": self._concat}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def run(self, template: jinja2.Template, context: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a template, and the character ranges of its generation blocks.

        Raises:
          jinja2.TemplateError and whatever the template's expressions raise; LimitError past a limit.
        """
        with self._lock:
            self.printed, self.spans, self._work, self._text = [], [], 0, 0
            for piece in template.generate(context):
                self.printed.append(piece)
                self._count(len(piece))
            return "".join(self.printed), self.spans

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise LimitError(f"the template has more than {MAX_SOURCE} characters")
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            static = sum(len(text.data) for text in loop.find_all(nodes.TemplateData))
            cost = nodes.Const(1 + static // TEXT_PER_STEP)
            loop.iter = nodes.Filter(loop.iter, "_steps", [cost], [], None, None).set_lineno(loop.lineno)
        return _replace_concats(tree)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call in a template; methods of text are weighed before they run."""
        self._tick(CALL)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            self._check_method(owner, obj.__name__, [*args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operation that can blow up."""
        sized = (str, list, tuple)
        if operator == "*" and (isinstance(left, sized) or isinstance(right, sized)):
            text, times = (left, right) if isinstance(left, sized) else (right, left)
            if isinstance(times, int) and len(text) * times > MAX_TEXT:
                raise LimitError("a repetition is too long")
        elif operator in ("**", "*") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_WIDTH:
                raise LimitError("a number is too large")
        elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
            if len(left) + len(right) > MAX_TEXT:
                raise LimitError("a concatenation is too long")
            self._tick((len(left) + len(right)) // TEXT_PER_STEP)
        elif operator == "%" and isinstance(left, str):
            _check_percent(left)
            self._weigh(right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format` in a template, its widths checked."""
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_braces(value.__self__)
            self._weigh([list(args), dict(kwargs)])
            return function(*args, **kwargs)

        return checked

    def _tick(self, cost: int) -> None:
        self._work += cost
        if self._work > MAX_WORK:
            raise LimitError("the template loops too long")

    def _count(self, characters: int) -> None:
        self._text += characters
        if self._text > MAX_TEXT:
            raise LimitError("the template prints too much")

    def _steps(self, items: Any, cost: int) -> Any:
        for item in items:
            self._tick(cost)
            yield item

    def _print(self, value: Any) -> Any:
        self._weigh(value)
        return value

    def _weigh(self, value: Any) -> None:
        """Counts the characters that a value takes as text, walking into containers, before that text is made."""
        if isinstance(value, str):
            self._count(len(value))
        elif isinstance(value, (list, tuple)):
            self._count(CONTAINER)
            for item in value:
                self._weigh(item)
        elif isinstance(value, dict):
            self._count(CONTAINER)
            for key, item in value.items():
                self._weigh(key)
                self._weigh(item)
        else:
            self._count(4)

    def _concat(self, parts: list[Any]) -> str:
        self._weigh(parts)
        return "".join(map(str, parts))

    def _tojson(
        self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own filter escapes < > & ', which would reach the model as such.
        self._weigh(x)
        _check_width(len(indent) if isinstance(indent, str) else indent)
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def _narrow(self, function: Any) -> Any:
        """A filter whose numbers are widths."""

        def narrow(*args: Any, **kwargs: Any) -> Any:
            self._weigh(list(args[-3:]))
            for value in (*args, *kwargs.values()):
                _check_width(value)
                if isinstance(value, str) and function.__name__ == "do_format":
                    _check_percent(value)
            return function(*args, **kwargs)

        return _as_filter(narrow, function)

    def _weighed(self, function: Any) -> Any:
        """A filter that makes text of its arguments, perhaps as many times as one of them is long."""

        def weighed(*args: Any, **kwargs: Any) -> Any:
            texts = [value for value in (*args, *kwargs.values()) if not isinstance(value, nodes.EvalContext)]
            for value in texts:
                self._weigh(value)
            if function.__name__ in ("do_replace", "sync_do_join", "do_join"):
                sizes = [len(value) for value in texts if isinstance(value, (str, list, tuple))]
                self._count(max(sizes, default=0) * min(sizes[1:], default=0))
            return function(*args, **kwargs)

        return _as_filter(weighed, function)

    def _check_method(self, text: str, name: str, args: list[Any]) -> None:
        for value in args:
            if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
                _check_width(value)
        if name in ("replace", "join", "translate"):
            self._weigh(args)
            longest = max((len(value) for value in args if isinstance(value, (str, list, tuple))), default=0)
            self._count(len(text) * longest if name != "translate" else 0)


class _Dict:
    """`dict` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates; names with a leading underscore are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _replace_concats(tree: nodes.Node) -> Any:
    """`a ~ b` as a filter over a list, which can be weighed; the operator itself cannot be intercepted."""
    for field, value in tree.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(tree, field, _replace_concats(value))
        elif isinstance(value, list):
            setattr(tree, field, [_replace_concats(v) if isinstance(v, nodes.Node) else v for v in value])
    if not isinstance(tree, nodes.Concat):
        return tree
    parts = nodes.List(tree.nodes).set_lineno(tree.lineno)
    joined = nodes.Filter(parts, "_concat", [], [], None, None).set_lineno(tree.lineno)
    return joined.set_environment(tree.environment)  # type: ignore[arg-type]


def _as_filter(wrapper: Any, function: Any) -> Any:
    """Marks a wrapper with what Jinja passes first to the function: the environment, the context, or nothing."""
    if hasattr(function, "jinja_pass_arg"):
        wrapper.jinja_pass_arg = function.jinja_pass_arg
    return wrapper


def _check_width(value: Any) -> None:
    if isinstance(value, int) and abs(value) > MAX_WIDTH:
        raise LimitError(f"a width of {value} is too large")


def _check_percent(form: str) -> None:
    """Widths and precisions of `%` formats."""
    if re.search(r"%[-+ #0\d.]*\*", form):
        raise LimitError("a width in a format is not plain")
    for digits in re.findall(r"%[-+ #0]*(\d*)\.?(\d*)", form):
        for width in filter(None, digits):
            _check_width(int(width[:20]))


def _check_braces(form: str) -> None:
    """Widths and precisions of `str.format`."""
    if re.search(r"\{[^{}]*:[^{}]*\{", form):
        raise LimitError("a width in a format is not plain")
    for spec in re.findall(r"\{[^{}]*:([^{}]*)\}", form):
        for width in re.findall(r"\d+", spec):
            _check_width(int(width[:20]))


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)
