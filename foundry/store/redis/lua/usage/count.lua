-- name... -> ok, durable versions, hot versions, [digest, what is said of its bytes] of each digest among them, names that
-- were left out: a key of theirs has another type
--@include pointers

local durable, hot, seen, kept, damaged = 0, 0, {}, {}, {}

local function count(name)
  local num_durable = call('SCARD', key('durable', name))
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
  durable = durable + num_durable
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
