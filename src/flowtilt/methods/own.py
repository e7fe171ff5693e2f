"""A user's own method, held to what flowtilt asks of it outside its loss: every mistake is one line that names the file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flowtilt.errors import UserError
from flowtilt.io.user_code import is_ours
from flowtilt.io.user_errors import HINT, describe_error, is_fault
from flowtilt.methods.base import Contrast, Guard, Method, Passes

if TYPE_CHECKING:
    from flowtilt.config import Recipe


def is_users(method: object) -> bool:
    """Whether the class of a method is a user's: of a file that a recipe names, or of a program's own module."""
    return not is_ours(type(method))


def name_of(method: object) -> str:
    """How errors call it: its type, or its class where it has none."""
    return getattr(method, "type", "") or type(method).__name__


def check(method: Method, recipe: "Recipe") -> None:
    """`Method.check`, and of a user's class also that of the class of flowtilt beneath, which an own check may have left out."""
    if not is_users(method):
        return method.check(recipe)
    beneath = next(one for one in type(method).__mro__ if issubclass(one, Method) and is_ours(one))
    beneath.check(method, recipe)
    with _named(method, "check", ValueError):
        method.check(recipe)
    return None


def passes(method: Method, recipe: "Recipe", step: int) -> Passes:
    """`Method.passes`."""
    with _named(method, "passes"):
        return _checked(method, "passes", method.passes(recipe, step), Passes)


def contrast(method: Method) -> Contrast | None:
    """`Method.contrast`."""
    with _named(method, "contrast"):
        found = method.contrast
        return None if found is None else _checked(method, "contrast", found, Contrast)


def guards(method: Method) -> dict[str, Guard]:
    """`Method.guards`, whose checks name the file where they fail."""
    if not is_users(method):
        return dict(method.guards())
    with _named(method, "guards"):
        found = dict(method.guards())
        own = {name: _checked(method, f"guards()[{name!r}]", guard, Guard) for name, guard in found.items()}
    return {name: Guard(guard.patience, _watched(method, name, guard.check)) for name, guard in own.items()}


def _watched(method: Method, name: str, say: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def watching(metrics: Any) -> str | None:
        with _named(method, f"guards()[{name!r}]"):
            return say(metrics)

    return watching


def _checked(method: Method, what: str, found: Any, kind: type) -> Any:
    if is_users(method) and not isinstance(found, kind):
        fields = ", ".join(getattr(kind, "_fields", None) or kind.__dataclass_fields__)
        raise UserError(
            f"objective {name_of(method)}: {what} must give a flowtilt.methods.base.{kind.__name__}({fields}), not a {type(found).__name__}"
        )
    return found


@contextmanager
def _named(method: Method, what: str, *meant: type[BaseException]) -> Iterator[None]:
    """Turns what a user's code raises into one line, but for errors that are `meant`."""
    try:
        yield
    except (UserError, *meant):
        raise
    except BaseException as error:
        if not is_users(method) or not is_fault(error):
            raise
        raise UserError(f"objective {name_of(method)}: {what} failed: {describe_error(error)} ({HINT})") from error
