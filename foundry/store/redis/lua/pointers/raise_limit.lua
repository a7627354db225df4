-- name, limit -> ok
--@include pointers

local state = key('name', ARGV[1])
if tonumber(call('HGET', state, 'limit') or 0) < tonumber(ARGV[2]) then call('HSET', state, 'limit', ARGV[2]) end
return {'ok'}
