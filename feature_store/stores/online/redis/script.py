"""The one script that writes: what backend.Write says, inside Redis, where nothing comes between.

Keys of a call: for each write the keys that must be missing, those that must be equal, those that must begin with
something, then one a change. Arguments: the plan as MessagePack (per write the three counts and a letter a change),
then in the same order the expected values and the operands. It answers a list of results a write, or -1 where a guard
did not hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import msgspec

from feature_store.stores.online.backend import Write
from feature_store.stores.online.redis.packing import pack

#: Changes made by one call at most: Redis serves nobody else meanwhile.
_MOST_CHANGES = 256

SCRIPT = """
local plan = cmsgpack.unpack(ARGV[1])
local k, a, results = 1, 2, {}

-- Whether a value of one row replaces what is stored: rows.py says how it lies.
local function newer(key, offered)
  local stored = redis.call('GETRANGE', key, 0, 31)
  if stored == '' then return 1 end
  if string.sub(stored, 1, 16) ~= string.sub(offered, 1, 16) then
    return redis.call('GET', key) == offered and 0 or 2
  end
  local low, high, clow, chigh = struct.unpack('<I4i4I4i4', stored, 17)
  local olow, ohigh, oclow, ochigh = struct.unpack('<I4i4I4i4', offered, 17)
  if ohigh ~= high then return ohigh > high and 1 or 0 end
  if olow ~= low then return olow > low and 1 or 0 end
  if ochigh ~= chigh then return ochigh > chigh and 1 or 0 end
  if oclow ~= clow then return oclow > clow and 1 or 0 end
  return redis.call('GET', key) == offered and 0 or 2
end

local function change(what, key, operand)
  if what == 'S' then redis.call('SET', key, operand)
  elseif what == 'A' then return redis.call('APPEND', key, operand)
  elseif what == 'D' then redis.call('DEL', key)
  elseif what == 'N' then
    local decision = newer(key, operand)
    if decision == 1 then redis.call('SET', key, operand) end
    return decision
  else
    local length = struct.unpack('<I4', operand)
    local rest = string.sub(operand, 5) .. string.sub(redis.call('GET', key) or '', length + 1)
    if rest == '' then redis.call('DEL', key) else redis.call('SET', key, rest) end
  end
  return 0
end

for w = 1, #plan do
  local missing, equal, prefix, changes = plan[w][1], plan[w][2], plan[w][3], plan[w][4]
  local holds = true
  for i = 0, missing - 1 do
    if redis.call('EXISTS', KEYS[k + i]) == 1 then holds = false end
  end
  k = k + missing
  for i = 0, equal - 1 do
    if redis.call('GET', KEYS[k + i]) ~= ARGV[a + i] then holds = false end
  end
  k, a = k + equal, a + equal
  for i = 0, prefix - 1 do
    local wanted = ARGV[a + i]
    if redis.call('GETRANGE', KEYS[k + i], 0, #wanted - 1) ~= wanted then holds = false end
  end
  k, a = k + prefix, a + prefix
  if holds then
    local made = {}
    for i = 1, #changes do
      made[i] = change(string.sub(changes, i, i), KEYS[k + i - 1], ARGV[a + i - 1])
    end
    results[w] = made
  else
    results[w] = -1
  end
  k, a = k + #changes, a + #changes
end
return results
"""


#: The name by which Redis knows the script.
_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()


def call_of(writes: Sequence[Write]) -> bytes:
    """The packed command that makes these writes."""
    plan, keys, arguments = [], [], []
    for write in writes:
        missing = [key for key, value in write.equal if value is None]
        equal = [(key, value) for key, value in write.equal if value is not None]
        plan.append((len(missing), len(equal), len(write.prefix), "".join([what for what, _, _ in write.changes])))
        keys += missing
        for pairs in (equal, write.prefix):
            keys += [key for key, _ in pairs]
            arguments += [value for _, value in pairs]
        keys += [key for _, key, _ in write.changes]
        arguments += [operand for _, _, operand in write.changes]
    return pack("EVALSHA", _SHA, len(keys), *keys, msgspec.msgpack.encode(plan), *arguments)


def shared(writes: Sequence[Write], alone: bool) -> Iterator[Sequence[Write]]:
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
    return [None if result == -1 else result for result in answer]  # type: ignore[misc]
