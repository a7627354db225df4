-- name... -> ok, [name, digests of its durable versions], hot versions, [digest, what is said of its bytes] of each digest
-- among them, names that were left out: a key of theirs has another type
--@include pointers

local durable, hot, seen, kept, damaged = {}, 0, {}, {}, {}
-- Lua takes so many arguments, and some more.
local at_a_time = 1000

local function count(name)
  local versions, digests = call('SMEMBERS', key('durable', name)), {}
  for begin = 1, #versions, at_a_time do
    local some = {unpack(versions, begin, math.min(begin + at_a_time - 1, #versions))}
    for _, value in ipairs(call('HMGET', key('versions', name), unpack(some))) do
      table.insert(digests, value and digest_of(value) or '')
    end
  end
  for _, version in ipairs(call('ZRANGE', key('hot', name), 0, -1)) do
    local value = call('HGET', key('versions', name), version)
    local digest = value and digest_of(value)
    local meta = digest and call('GET', key('bytes', digest))
    if meta then
      hot = hot + 1
      if not seen[digest] then table.insert(kept, {digest, meta}) end
      seen[digest] = true
    end
  end
  table.insert(durable, {name, digests})
end

for _, name in ipairs(ARGV) do
  local whole, failure = pcall(count, name)
  if not whole then
    local said = type(failure) == 'table' and failure.err or failure
    if not string.find(said, 'WRONGTYPE', 1, true) then error(failure) end
    table.insert(damaged, name)
  end
end
return {'ok', durable, hot, kept, damaged}
