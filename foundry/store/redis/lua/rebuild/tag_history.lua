-- server run, name, JSON {tag: "<moved ms> <older versions>"} -> ok | over

if restored or server_run ~= ARGV[1] then return {'over'} end
local histories = 'foundry:tag-history:' .. ARGV[2]
redis.call('DEL', histories)
for tag, history in pairs(cjson.decode(ARGV[3])) do redis.call('HSET', histories, tag, history) end
return {'ok'}
