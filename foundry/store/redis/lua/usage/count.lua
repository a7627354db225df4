-- name... -> ok, durable versions, hot versions, [digest, what is said of its bytes] of each digest among them
--@include pointers

local durable, hot, seen, kept = 0, 0, {}, {}
for _, name in ipairs(ARGV) do
  durable = durable + call('SCARD', key('durable', name))
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
end
return {'ok', durable, hot, kept}
