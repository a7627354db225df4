-- Become the owner of a name.
-- name, run, attempt, ms to hold it or ''
-- -> ok, pending durable versions of others | conflict, owner | fenced, run, attempt
--@include pointers

local name, run, attempt = ARGV[1], ARGV[2], ARGV[3]
local newest = call('HGET', key('run', run), 'attempt')
if (number(newest) or 0) > tonumber(attempt) then return {'fenced', run, newest} end
local state = key('name', name)
local held = call('HMGET', state, 'owner_run', 'owner_attempt')
if held[1] == run and tonumber(attempt) < (number(held[2]) or 0) then return {'fenced', run, held[2]} end
local other = holder(name)
if other and other ~= run then return {'conflict', other} end
local held_until = ARGV[4] ~= '' and string.format('%d', now_ms() + ARGV[4]) or ''
call('HSET', state, 'owner_run', run, 'owner_attempt', attempt, 'released', '0', 'held_until', held_until)
local stale, pending = {}, call('HGETALL', key('pending', name))
for i = 1, #pending, 2 do
  local by, as, durable = string.match(pending[i + 1], '^(%S+) (%d+) .* (%d)$')
  if by ~= run or as ~= attempt then
    if durable == '1' then table.insert(stale, pending[i]) else call('HDEL', key('pending', name), pending[i]) end
  end
end
return {'ok', stale}
