-- id, attempt, event, events -> ok, event id | fenced, attempt, state | missing
--@include runs

local refused = fence(ARGV[1], ARGV[2])
if refused then return refused end
call('HSET', run_key(ARGV[1]), 'last_event', ARGV[3])
return {'ok', tell(ARGV[1], ARGV[3], ARGV[4])}
