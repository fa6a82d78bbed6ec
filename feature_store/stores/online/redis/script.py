"""The one script that writes: what backend.Write says, inside Redis, where nothing comes between.

Keys of a call: for each write the keys that must be missing, those that must be equal, those that must begin with
something, then one a change. Arguments: the plan as MessagePack (per write the three counts and a letter a change, or
their number where all are NEWER), then in the same order the expected values and the operands. It answers a list of
results a write, their number where all are REPLACED, or -1 where a guard did not hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from feature_store.stores.online.backend import NEWER, REPLACED, Write
from feature_store.stores.online.redis.packing import command, pack

#: The answer for a write of which a guard did not hold.
_BROKEN = -1

#: Keys from which on it pays to look for runs of equal length in them.
_MANY = 16

#: Changes made by one call at most: Redis serves nobody else meanwhile.
_MOST_CHANGES = 256

SCRIPT = """
local plan = cmsgpack.unpack(ARGV[1])
local k, a, results = 1, 2, {}
local call, sub, unpacked = redis.call, string.sub, struct.unpack
local lowest, exact, most = -2^63, 2^53, 1000

local function inexact(time) return time >= exact or time <= -exact end

-- Whether a value of one row replaces what is stored: rows.py says how it lies, `head` is how it begins. Times are
-- doubles here: where not every integer is one, it is left for the reader of values to tell them apart.
local function newer(key, offered, head)
  local stored = call('GETRANGE', key, 0, 31)
  if stored == '' then return 1 end
  if sub(stored, 1, 16) == head then
    local time, created = unpacked('<i8i8', stored, 17)
    local otime, ocreated = unpacked('<i8i8', offered, 17)
    if inexact(time) or inexact(otime) then return 2 end
    if otime > time then return 1 end
    if otime < time then return 0 end
    if ocreated ~= created then
      if (inexact(created) and created > lowest) or (inexact(ocreated) and ocreated > lowest) then return 2 end
      return ocreated > created and 1 or 0
    end
  end
  return call('GET', key) == offered and 0 or 2
end

-- As many NEWERs, of a key each: those that are newer are set at once. The answer is one number where all are.
local function newest(count)
  local made, pairs_of, n, head = {}, {}, 0, sub(ARGV[a], 1, 16)
  for i = 0, count - 1 do
    local key, offered = KEYS[k + i], ARGV[a + i]
    local decision = newer(key, offered, head)
    made[i + 1] = decision
    if decision == 1 then
      pairs_of[n + 1], pairs_of[n + 2] = key, offered
      n = n + 2
    end
  end
  for low = 1, n, most do call('MSET', unpack(pairs_of, low, math.min(low + most - 1, n))) end
  if n == 2 * count then return count end
  return made
end

-- Whether keys have the values they must have.
local function equals(count)
  for low = 0, count - 1, most do
    local high = math.min(low + most, count)
    local found = call('MGET', unpack(KEYS, k + low, k + high - 1))
    for i = low, high - 1 do
      if found[i - low + 1] ~= ARGV[a + i] then return false end
    end
  end
  return true
end

local function change(what, key, operand)
  if what == 'S' then call('SET', key, operand)
  elseif what == 'A' then return call('APPEND', key, operand)
  elseif what == 'D' then call('DEL', key)
  elseif what == 'N' then
    local decision = newer(key, operand, sub(operand, 1, 16))
    if decision == 1 then call('SET', key, operand) end
    return decision
  else
    local length = unpacked('<I4', operand)
    local rest = sub(operand, 5) .. sub(call('GET', key) or '', length + 1)
    if rest == '' then call('DEL', key) else call('SET', key, rest) end
  end
  return 0
end

for w = 1, #plan do
  local missing, equal, prefix, changes = plan[w][1], plan[w][2], plan[w][3], plan[w][4]
  local holds = true
  for i = 0, missing - 1 do
    if call('EXISTS', KEYS[k + i]) == 1 then holds = false end
  end
  k = k + missing
  holds = equals(equal) and holds
  k, a = k + equal, a + equal
  for i = 0, prefix - 1 do
    local wanted = ARGV[a + i]
    if call('GETRANGE', KEYS[k + i], 0, #wanted - 1) ~= wanted then holds = false end
  end
  k, a = k + prefix, a + prefix
  local all_newer = type(changes) == 'number'
  if not holds then
    results[w] = -1
  elseif all_newer then
    results[w] = newest(changes)
  else
    local made = {}
    for i = 1, #changes do
      made[i] = change(sub(changes, i, i), KEYS[k + i - 1], ARGV[a + i - 1])
    end
    results[w] = made
  end
  local count = all_newer and changes or #changes
  k, a = k + count, a + count
end
return results
"""


#: The name by which Redis knows the script.
_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest().encode()


def call_of(writes: Sequence[Write]) -> bytes:
    """The packed command that makes these writes."""
    plan, keys, arguments = [], [], []
    for write in writes:
        missing = [key for key, value in write.equal if value is None]
        equal = [(key, value) for key, value in write.equal if value is not None]
        letters = "".join([what for what, _, _ in write.changes])
        all_newer = bool(letters) and letters == NEWER * len(letters)
        plan.append((len(missing), len(equal), len(write.prefix), len(letters) if all_newer else letters))
        keys += missing
        for pairs in (equal, write.prefix):
            keys += [key for key, _ in pairs]
            arguments += [value for _, value in pairs]
        keys += [key for _, key, _ in write.changes]
        arguments += [operand for _, _, operand in write.changes]
    packed = msgspec.msgpack.encode(plan)
    if len(keys) < _MANY:
        return pack("EVALSHA", _SHA, len(keys), *keys, packed, *arguments)
    return command([b"EVALSHA", _SHA, b"%d" % len(keys)], keys, [packed], arguments)


def shared(writes: Iterable[Write], alone: bool) -> Iterator[Sequence[Write]]:
    """Writes as they are made by one call each: `alone` one by one, else together up to a bound."""
    if alone:
        yield from ([write] for write in writes)
        return
    some: list[Write] = []
    count = 0
    for write in writes:
        if some and count + len(write.changes) > _MOST_CHANGES:
            yield some
            some, count = [], 0
        some.append(write)
        count += len(write.changes)
    if some:
        yield some


def results_of(answer: Sequence[list[int] | int]) -> list[list[int] | None]:
    """The results by write, of one call."""
    return [
        result if isinstance(result, list) else None if result == _BROKEN else [REPLACED] * result for result in answer
    ]
