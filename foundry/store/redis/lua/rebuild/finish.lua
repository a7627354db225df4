-- server run -> ok | over

if server_run ~= ARGV[1] then return {'over'} end
redis.call('SET', 'foundry:epoch', server_run)
return {'ok'}
