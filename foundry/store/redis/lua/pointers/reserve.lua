-- Take the next version number for one publication; the same publication gets the same number again.
-- name, run, attempt, step, digest, durable 0|1
-- -> ok, version | committed, version, value | limit, counter | marked | fenced, run or '', attempt or ''
--@include pointers

local name, run, attempt, step, digest, durable = unpack(ARGV)
local refused = fence(name, run, attempt)
if refused then return refused end
local seen = call('HGET', key('steps', name), run .. ' ' .. step)
if seen then
  local version, published = string.match(seen, '^(%d+) (.*)$')
  local value = version and call('HGET', key('versions', name), version)
  if published == digest and value then return {'committed', version, value} end
end
local pending = key('pending', name)
local mine = table.concat({run, attempt, step, digest}, ' ')
local reserved = call('HGETALL', pending)
for i = 1, #reserved, 2 do
  if string.sub(reserved[i + 1], 1, -3) == mine then
    if durable == '1' then call('HSET', pending, reserved[i], mine .. ' 1') end
    return {'ok', reserved[i]}
  end
end
-- The collector is deleting the blob. From the reservation on it refuses to.
if durable == '1' and call('EXISTS', key('condemned', digest)) == 1 then return {'marked'} end
local state = key('name', name)
local counts = call('HMGET', state, 'counter', 'limit')
if tonumber(counts[1] or 0) >= tonumber(counts[2] or 0) then return {'limit', counts[1] or '0'} end
local version = string.format('%d', call('HINCRBY', state, 'counter', 1))
call('HSET', pending, version, mine .. ' ' .. durable)
call('SADD', 'foundry:reserving', name)
return {'ok', version}
