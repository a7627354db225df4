-- Only a run in the queue: of a held one its worker says what it waits for.
-- id, waiting_for, events -> ok
--@include runs

local id = ARGV[1]
local before = call('HMGET', run_key(id), 'state', 'waiting_for')
if before[1] == 'queued' and before[2] ~= ARGV[2] then
  call('HSET', run_key(id), 'waiting_for', ARGV[2])
  tell_state(id, 'queued', ARGV[3])
end
return {'ok'}
