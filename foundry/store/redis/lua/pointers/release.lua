-- name, run, attempt -> ok | fenced, run or '', attempt or ''
--@include pointers

local held = call('HMGET', key('name', ARGV[1]), 'owner_run', 'owner_attempt')
if held[1] ~= ARGV[2] or held[2] ~= ARGV[3] then return {'fenced', held[1] or '', held[2] or ''} end
call('HSET', key('name', ARGV[1]), 'released', '1')
return {'ok'}
