-- token, name, JSON {tag: "<moved ms> <older versions>"} -> ok | over
--@include restoring

local histories = 'foundry:tag-history:' .. ARGV[2]
redis.call('DEL', histories)
for tag, history in pairs(cjson.decode(ARGV[3])) do redis.call('HSET', histories, tag, history) end
return {'ok'}
