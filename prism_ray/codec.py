"""Records to msgpack bytes and back; arrays travel as raw buffers.

A record is a msgpack extension holding its class name and its fields, so a journal or a client in another language
can read it without Python's pickle. Unknown classes and fields are errors: a file from a newer version says so.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgpack
import numpy as np

from prism_ray.records import Group, Prompt, Rollout, Trajectory, Verdict

_RECORDS: dict[str, type] = {cls.__name__: cls for cls in (Prompt, Rollout, Verdict, Trajectory, Group)}
_ARRAY, _RECORD, _TUPLE = 1, 2, 3
_DTYPES = {"<i4", "<i8", "<f4", "<f8", "<u4", "|u1", "|b1", "|i1"}


class CodecError(ValueError):
    """Bytes that are not a record of this version, or a value that no record may hold."""


def encode(value: Any) -> bytes:
    """The msgpack bytes of a record, or of plain data (dict, list, str, bytes, numbers, arrays) that holds records."""
    try:
        packed: Any = msgpack.packb(_lower(value), use_bin_type=True)
    except (TypeError, OverflowError) as error:
        raise CodecError(f"cannot encode: {error}") from error
    return packed


def decode(data: bytes) -> Any:
    """The value `encode` was given; raises CodecError with a sentence on anything else."""
    try:
        return msgpack.unpackb(data, raw=False, ext_hook=_raise_ext, strict_map_key=False)
    except CodecError:
        raise
    except Exception as error:  # msgpack raises a dozen classes on garbage, some of them bare ValueErrors
        raise CodecError(f"these bytes are not a record ({type(error).__name__}: {error})") from error


def _lower(value: Any) -> Any:
    """The value in msgpack's own types, records and arrays as extensions."""
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, np.generic):
        return value.item()
    if type(value).__name__ in _RECORDS and isinstance(value, _RECORDS[type(value).__name__]):
        body = {f.name: _lower(getattr(value, f.name)) for f in fields(value)}
        return msgpack.ExtType(_RECORD, msgpack.packb([type(value).__name__, body], use_bin_type=True))
    if isinstance(value, dict):
        return {key: _lower(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, msgpack.packb([_lower(item) for item in value], use_bin_type=True))
    if isinstance(value, list):
        return [_lower(item) for item in value]
    return value


def _array(array: np.ndarray) -> msgpack.ExtType:
    array = np.ascontiguousarray(array).reshape(array.shape)
    dtype = array.dtype.newbyteorder("<").str if array.dtype.byteorder == ">" else array.dtype.str
    if dtype not in _DTYPES:
        raise CodecError(f"cannot encode an array of dtype {array.dtype}; use one of {', '.join(sorted(_DTYPES))}")
    return msgpack.ExtType(_ARRAY, msgpack.packb([dtype, list(array.shape), array.astype(dtype).tobytes()]))


def _raise_ext(code: int, data: bytes) -> Any:
    body = msgpack.unpackb(data, raw=False, ext_hook=_raise_ext, strict_map_key=False)
    if code == _TUPLE:
        return tuple(body)
    if code == _ARRAY:
        dtype, shape, raw = body
        if dtype not in _DTYPES:
            raise CodecError(f"an array of dtype {dtype!r} cannot be decoded")
        return np.frombuffer(raw, dtype=dtype).reshape(shape)
    if code == _RECORD:
        name, content = body
        if name not in _RECORDS:
            raise CodecError(f"unknown record {name!r}; it was written by another version")
        try:
            return _RECORDS[name](**content)
        except TypeError as error:
            raise CodecError(f"record {name} has other fields here ({error}); another version wrote it") from error
    raise CodecError(f"unknown msgpack extension {code}")
