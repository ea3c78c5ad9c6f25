"""Reads the lists of arrays that mmdet pickles, without running anything they say.

A pickle is a program. This reads its opcodes one by one and keeps a stack of its own, on which
lists, numbers, words and plain numeric arrays can be made and nothing else: no name is imported,
nothing is called. A program that asks for more is refused with the name it asked for.
"""

import pickletools
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np

from dkdetr.errors import CorruptArtefactError

Nested: TypeAlias = "np.ndarray | list[Nested]"

_MARK = object()
_MAX_DEPTH = 2
_RECONSTRUCT, _FROM_BUFFER = "_reconstruct", "_frombuffer"
_HOMES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_KNOWN = {
    **dict.fromkeys([f"{home}.{_RECONSTRUCT}" for home in _HOMES], _RECONSTRUCT),
    **dict.fromkeys([f"{home}.{_FROM_BUFFER}" for home in _NUMERIC], _FROM_BUFFER),
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
    # Old protocols have no other way to write an empty array's bytes.
    **dict.fromkeys(["builtins.bytes", "__builtin__.bytes"], "bytes"),
}
"""The names that a pickle may say; they are words here, and stand for no object."""

_NUMBERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"}
_WORDS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_OLD_STRINGS = {"BINSTRING", "SHORT_BINSTRING", "STRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STORE, _FETCH = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


@dataclass(frozen=True)
class _Name:
    word: str


@dataclass
class _DType:
    code: str
    order: str = "="


@dataclass
class _Array:
    value: np.ndarray | None = None


def read_pickled_lists(data: bytes, where: str) -> list[Nested]:
    """Returns the list of numeric arrays, or of lists of them, that a pickle describes.

    Args:
        data: the whole pickle, of any protocol.
        where: its name, for the message.

    Raises:
        CorruptArtefactError: it asks for anything else (names it), or is cut short or malformed.
    """
    try:
        top = _Machine(where).run(data)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, CorruptArtefactError):
            raise
        raise CorruptArtefactError(f"{where} is no whole pickle: {error}") from None
    if not isinstance(top, list):
        raise CorruptArtefactError(f"{where}: the pickle holds no list but a {_kind(top)}")
    return [_plain(entry, where, depth=1) for entry in top]


class _Machine:
    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _NUMBERS or name in _WORDS:
            stack.append(argument)
        elif name in _BYTES:
            stack.append(bytes(argument))
        elif name in _OLD_STRINGS:
            stack.append(argument.encode("latin1") if isinstance(argument, str) else argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            count = _TUPLES[name]
            self._push(tuple(self._pop(count)))
        elif name == "TUPLE":
            self._push(tuple(self._pop_to_mark()))
        elif name in {"EMPTY_LIST", "LIST"}:
            self._push(self._pop_to_mark() if name == "LIST" else [])
        elif name in {"APPEND", "APPENDS"}:
            entries = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            self._list_on_top().extend(entries)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _STORE:
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _FETCH:
            stack.append(self._memo[int(argument)])
        elif name in {"GLOBAL", "INST"}:
            self._name(str(argument).replace(" ", "."), inst=name == "INST")
        elif name == "STACK_GLOBAL":
            module, attribute = self._pop(2)
            self._name(f"{module}.{attribute}")
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            self._push(self._call(function, arguments))
        elif name == "BUILD":
            (state,) = self._pop(1)
            self._build(stack[-1], state)
        elif name not in {"PROTO", "FRAME"}:
            raise self._refusal(f"the opcode {name}")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise ValueError("its stack is empty")
        start = len(self._stack) - count
        values, self._stack[start:] = self._stack[start:], []
        return values

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _MARK:
                values = stack[place + 1 :]
                del stack[place:]
                return values
        raise ValueError("a mark is missing")

    def _list_on_top(self) -> list[Any]:
        if not isinstance(self._stack[-1], list):
            raise self._refusal(f"an append to a {_kind(self._stack[-1])}")
        return self._stack[-1]

    def _name(self, name: str, *, inst: bool = False) -> None:
        if name not in _KNOWN or inst:
            raise self._refusal(f"the pickle GLOBAL {name}")
        self._push(_Name(_KNOWN[name]))

    def _call(self, function: Any, arguments: Any) -> Any:
        word = function.word if isinstance(function, _Name) else ""
        if not isinstance(arguments, tuple):
            raise self._refusal("a call without a tuple")
        if word == "encode":
            text, encoding = arguments
            if encoding not in {"latin1", b"latin1"}:
                raise self._refusal(f"the encoding {encoding!r}")
            return text.encode("latin1")
        if word == "bytes" and not arguments:
            return b""
        if word == "dtype":
            return self._dtype(arguments[0])
        if word == _RECONSTRUCT and arguments[0] == _Name("ndarray"):
            return _Array()
        if word == _FROM_BUFFER:
            buffer, dtype, shape, order = arguments
            return _Array(self._array(buffer, dtype, shape, fortran=order in {"F", b"F"}))
        raise self._refusal(f"a call of {word or _kind(function)}")

    def _build(self, made: Any, state: Any) -> None:
        if isinstance(made, _DType):
            order, subtype, fields = state[1], state[2], state[3]
            order = order.decode() if isinstance(order, bytes) else order
            if order not in {"<", ">", "|", "="} or subtype is not None or fields is not None:
                raise self._refusal("a structured dtype")
            made.order = order
        elif isinstance(made, _Array):
            _, shape, dtype, fortran, data = state
            made.value = self._array(data, dtype, shape, fortran=bool(fortran))
        else:
            raise self._refusal(f"a state for a {_kind(made)}")

    def _dtype(self, code: Any) -> _DType:
        code = code.decode() if isinstance(code, bytes) else code
        if not isinstance(code, str) or code[:1] not in "fiu" or not code[1:].isdigit():
            raise self._refusal(f"an array of objects (numpy dtype {code!r})")
        return _DType(code)

    def _array(self, data: Any, dtype: Any, shape: Any, *, fortran: bool) -> np.ndarray:
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise self._refusal("an array of objects")
        kind = np.dtype(dtype.order.replace("|", "=") + dtype.code)
        sides = tuple(int(side) for side in shape)
        if min(sides, default=0) < 0 or prod(sides) * kind.itemsize != len(data):
            raise ValueError(f"an array of shape {sides} has {len(data)} bytes")
        flat = np.frombuffer(data, kind)
        return flat.reshape(sides, order="F" if fortran else "C")

    def _refusal(self, what: str) -> CorruptArtefactError:
        return CorruptArtefactError(
            f"{self._where} contains {what}, which has no place in a list of boxes and could run "
            "code; nothing of it was run. Load it where you trust it and write a COCO results "
            "json: [{image_id, bbox: [x, y, w, h], score}, ...]"
        )


def _plain(value: Any, where: str, *, depth: int) -> Nested:
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, list) and depth < _MAX_DEPTH:
        return [_plain(entry, where, depth=depth + 1) for entry in value]
    raise CorruptArtefactError(
        f"{where}: a list of arrays, or of lists of arrays, is wanted, and it has a {_kind(value)}"
    )


def _kind(value: Any) -> str:
    names = {_Name: "name", _DType: "dtype", _Array: "array"}
    return names.get(type(value), type(value).__name__)
