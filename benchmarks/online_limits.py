"""The best online stores a good engineer writes by hand for one task, with no contract to keep beyond it.

They know what a general store has to find out: that every feature is a double, the key one integer, the view one of
three. A row is one packed string, a log of an entity another; each is one key of nine bytes in Redis.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
import numpy as np
import redis

from benchmarks.online_data import KEY, Rows, Values, View
from benchmarks.online_sides import HOST, Place, Read

#: A key is a letter for the view, then the entity's key.
_KEY = struct.Struct("<cq")
_LETTERS = {"plain": b"p", "wide": b"w", "written": b"n"}
_BLOCK = 1_000
#: Rows of one script call: while Redis runs one the next is on its way.
_SCRIPT_ROWS = 250
#: Writes the rows (key and row, key and row ...) that are not older than what is stored, and says how many. Times lead
#: the rows, high byte first, so that they compare as text; Redis must run in the C locale. Nearly always all are newer:
#: then one MSET puts them all.
_NEWER_WINS = """
local call, sub, pairs_of = redis.call, string.sub, ARGV
local all_newer = true
for i = 1, #pairs_of, 2 do
  if call('GETRANGE', pairs_of[i], 0, 7) > sub(pairs_of[i + 1], 1, 8) then all_newer = false break end
end
if all_newer then call('MSET', unpack(pairs_of)) return #pairs_of / 2 end
local written = 0
for i = 1, #pairs_of, 2 do
  if call('GETRANGE', pairs_of[i], 0, 7) <= sub(pairs_of[i + 1], 1, 8) then
    call('SET', pairs_of[i], pairs_of[i + 1])
    written = written + 1
  end
end
return written
"""


# -- packed rows ----------------------------------------------------------------------------------------------------


class RowCodec:
    """A row as bytes: event time (microseconds, high byte first), null bitmap (eight bytes or a multiple, lowest bit
    first), doubles (a null's is zero).
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._bitmap = -(-len(names) // 64) * 8
        self._words = 1 + self._bitmap // 8 + len(names)
        self.width = 8 * self._words
        self._row = struct.Struct(f"<8x{self._bitmap}s{len(names)}d")
        self._no_nulls = bytes(self._bitmap)
        self._unknown = bytes(8) + b"\xff" * self._bitmap + bytes(8 * len(names))
        self.dtype = np.dtype([("time", ">i8"), ("nulls", "u1", self._bitmap), ("values", "<f8", len(names))])

    def encode_into(self, out: np.ndarray, rows: Rows) -> None:
        """Fills an array of `dtype`."""
        null = np.isnan(rows.values)
        out["time"], out["values"], out["nulls"] = rows.times, rows.values, 0
        if null.any():
            out["values"][null] = 0.0
            bits = np.packbits(null, axis=1, bitorder="little")
            out["nulls"][:, : bits.shape[1]] = bits

    def encode(self, rows: Rows) -> list[bytes]:
        out = np.empty(len(rows), self.dtype)
        self.encode_into(out, rows)
        joined, width = out.tobytes(), self.width
        return [joined[start : start + width] for start in range(0, len(joined), width)]

    def decode(self, keys: list[int], stored: list[bytes | None]) -> Values:
        """Key column and features as lists, of one stored row a key; None for a null, and for what is not stored."""
        if len(stored) == 1:
            return self._decode_one(keys, stored[0] or self._unknown)
        try:
            joined = b"".join(stored)
        except TypeError:
            joined = b"".join([row or self._unknown for row in stored])
        words = np.frombuffer(joined, "<f8").reshape(len(keys), self._words)
        head = 1 + self._bitmap // 8
        columns = words[:, head:].T.tolist()
        if words[:, 1:head].view("<i8").any():
            self._put_nulls(columns, words[:, 1:head].view("u1"))
        values: Values = {KEY: keys}
        values.update(zip(self.names, columns, strict=True))
        return values

    def _decode_one(self, keys: list[int], stored: bytes) -> Values:
        # For one row struct is faster than numpy.
        nulls, *values = self._row.unpack(stored)
        answer: Values = {KEY: keys}
        if nulls != self._no_nulls:
            bits = int.from_bytes(nulls, "little")
            values = [None if bits >> place & 1 else value for place, value in enumerate(values)]
        for name, value in zip(self.names, values, strict=True):
            answer[name] = [value]
        return answer

    def _put_nulls(self, columns: list[list[Any]], bitmaps: np.ndarray) -> None:
        null = np.unpackbits(bitmaps, axis=1, count=len(self.names), bitorder="little")
        for row, feature in zip(*(places.tolist() for places in np.nonzero(null)), strict=True):
            columns[feature][row] = None


class PackedRows:
    """Plain views by hand."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._redis = redis.Redis(HOST, place.port)

    def fill(self, view: View) -> None:
        codec, letter = RowCodec(view.names), _LETTERS[view.name]
        for block in view.rows().blocks(_BLOCK):
            stored = zip(_packed_keys(letter, block.keys.tolist()), codec.encode(block), strict=True)
            self._redis.mset(dict(stored))

    def reader(self, view: View) -> Read:
        """One MGET through redis-py, decoded."""
        codec, letter, mget = RowCodec(view.names), _LETTERS[view.name], self._redis.mget

        def read(keys: list[int]) -> Values:
            return codec.decode(keys, mget(_packed_keys(letter, keys)))

        return read

    def bare_reader(self, view: View) -> Read:
        """One MGET over a socket of our own, parsed by hiredis, decoded."""
        codec, letter, mget = RowCodec(view.names), _LETTERS[view.name], bare_mget(self._place.port)

        def read(keys: list[int]) -> Values:
            return codec.decode(keys, mget(_packed_keys(letter, keys)))

        return read

    def writer(self, view: View) -> PackedWriter:
        return PackedWriter(self._redis, RowCodec(view.names), _LETTERS[view.name])


class PackedWriter:
    """Newer-wins by a script, which gets the bytes of its command from numpy: nothing is packed a row at a time."""

    def __init__(self, client: redis.Redis, codec: RowCodec, letter: bytes) -> None:
        self._connection = client.connection_pool.get_connection()
        self._script = client.script_load(_NEWER_WINS).encode()
        self._codec = codec
        #: What stands before, between and behind the two arguments of a row in the command, always the same.
        self._constants = {
            "key_size": b"$%d\r\n" % _KEY.size,
            "letter": letter,
            "row_size": b"\r\n$%d\r\n" % codec.width,
            "end": b"\r\n",
        }
        sizes = {name: f"V{len(constant)}" for name, constant in self._constants.items()}
        sizes |= {"key": "<i8", "row": codec.dtype}
        order = ("key_size", "letter", "key", "row_size", "row", "end")
        self._arguments = np.dtype([(name, sizes[name]) for name in order])

    def prepare(self, rows: Rows) -> Rows:
        return rows

    def write(self, prepared: Rows) -> None:
        blocks = list(newest(prepared).blocks(_SCRIPT_ROWS))
        for block in blocks:
            self._connection.send_packed_command(self._command(block))
        for _ in blocks:
            self._connection.read_response()

    def _command(self, rows: Rows) -> list[bytes]:
        arguments = np.empty(len(rows), self._arguments)
        for name, constant in self._constants.items():
            arguments[name] = np.void(constant)
        arguments["key"] = rows.keys
        self._codec.encode_into(arguments["row"], rows)
        head = b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n$1\r\n0\r\n" % (3 + 2 * len(rows), self._script)
        return [head + arguments.tobytes()]


def newest(rows: Rows) -> Rows:
    """Of each key the row with the latest time, of equal ones the last."""
    if len(rows) == 1 or len(np.unique(rows.keys)) == len(rows):
        return rows
    order = np.lexsort((rows.times, rows.keys))
    keys = rows.keys[order]
    kept = order[np.append(keys[1:] != keys[:-1], True)]
    return Rows(rows.keys[kept], rows.times[kept], rows.values[kept])


def _packed_keys(letter: bytes, keys: list[int]) -> list[bytes]:
    pack = _KEY.pack
    return [pack(letter, key) for key in keys]


# -- without a client -----------------------------------------------------------------------------------------------


def bare_mget(port: int) -> Callable[[list[bytes]], list[bytes | None]]:
    """MGET over a socket of its own, for keys of one length: what is left when redis-py is not there."""
    connection = socket.create_connection((HOST, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader, buffer = hiredis.Reader(), bytearray(1 << 20)

    def mget(keys: list[bytes]) -> list[bytes | None]:
        before = b"\r\n$%d\r\n" % len(keys[0])
        connection.sendall(b"*%d\r\n$4\r\nMGET" % (len(keys) + 1) + before + before.join(keys) + b"\r\n")
        while True:
            reader.feed(buffer, 0, connection.recv_into(buffer))
            if (answer := reader.gets()) is not False:
                return answer

    return mget


class BareMget:
    """MGET of given keys through redis-py and nothing else: what no read of these keys can be faster than."""

    def __init__(self, place: Place) -> None:
        self._mget = redis.Redis(HOST, place.port).mget

    def reader(self) -> Callable[[list[bytes]], list[bytes | None]]:
        return self._mget
