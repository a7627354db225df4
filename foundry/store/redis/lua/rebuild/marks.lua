-- A garbage collector that met the loss may yet delete these blobs.
-- server run, ms that the marks stand, digest... -> ok | over

if restored or server_run ~= ARGV[1] then return {'over'} end
for i = 3, #ARGV do redis.call('SET', 'foundry:condemned:' .. ARGV[i], '1', 'PX', ARGV[2]) end
return {'ok'}
